"""Command-line flags from a dataclass: each field becomes a flag, with its default and its help
text."""

import argparse
import contextlib
import dataclasses
import math
import typing

from data.errors import UserError


def field(default, help, positional=False):
    """A field with its help text: what it is, its unit, the paper's value. A positional one is
    given without its name."""
    return dataclasses.field(default=default, metadata={"help": help, "positional": positional})


def parse_flags(config_class, description, argv=None, preset=None):
    """A config dataclass from the command line: the field d_sae becomes --d-sae.

    Whole numbers may be written 1e6; a bool x gets --x and --no-x; a tuple of numbers is written
    0,2,3. preset: a function from the config to {field: value}, which take the place of defaults; a
    flag given by hand still wins. Raises UserError for an unknown flag and for a value that is not
    of the field's type.
    """
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for config_field in dataclasses.fields(config_class):
        add_flag(parser, config_field)
    config = config_class(**vars(parser.parse_args(argv)))
    if preset is None:
        return config
    parser.set_defaults(**preset(config))
    return config_class(**vars(parser.parse_args(argv)))


class Parser(argparse.ArgumentParser):
    """argparse prints its usage and exits; here a wrong flag is one sentence, like all other wrong
    input."""

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags.")


def add_flag(parser, config_field):
    """One field of the dataclass as a flag of the parser."""
    name = config_field.name
    default = config_field.default
    flag = "--" + name.replace("_", "-")
    help_text = config_field.metadata.get("help", "")
    shown_default = ",".join(map(str, default)) if isinstance(default, tuple) else default
    help_with_default = f"{help_text} [{shown_default}]"

    if config_field.metadata.get("positional"):
        parser.add_argument(name, nargs="?", default=default, help=help_with_default)
    elif config_field.type is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default,
                            help=help_text)
    else:
        kind = typing.get_origin(config_field.type) or config_field.type    # tuple[int, ...]: tuple
        parser.add_argument(flag, default=default, metavar=kind.__name__.upper(),
                            help=help_with_default,
                            type=lambda text: converted(text, config_field.type, flag))


def converted(text, kind, flag):
    """The text as a str, int, float or tuple of these. Raises UserError if it is none."""
    if kind is str:
        return text
    is_tuple = typing.get_origin(kind) is tuple
    number = typing.get_args(kind)[0] if is_tuple else kind
    try:
        if is_tuple:
            return tuple(as_number(part, number) for part in text.split(","))
        return as_number(text, number)
    except (ValueError, OverflowError):
        wanted = {int: "a whole number", float: "a number"}[number]
        several = ", or several with commas" if is_tuple else ""
        raise UserError(f"{flag} takes {wanted}{several}, not {text!r}.") from None


def as_number(text, kind):
    """"1e6" is a whole number, "1.5" is not; infinity and NaN are no numbers here."""
    if kind is int:
        with contextlib.suppress(ValueError):
            return int(text)                                # a float would round a large one
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    if kind is int and value != int(value):
        raise ValueError
    return kind(value)
