"""What every program here shares: flags from a dataclass, one-sentence errors, atomic writes, a progress
line, Ctrl-C between two steps, device and number type, intervals."""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import sys
import time
import typing
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError


class UserError(Exception):
    """Something the user can put right. The message is one sentence that names the file or flag and the way
    out."""


def run(main):
    """Run a program's `main`: a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130.
    """
    try:
        main()
    except UserError as error:
        sys.exit(_say(error, 2))
    except KeyboardInterrupt as stop:
        sys.exit(_say(stop if str(stop) else "stopped.", 130))


@contextlib.contextmanager
def keep_freed_memory():
    """A block, or a function that this decorates, in which freed tensors stay with the process.

    By default glibc returns every large block of memory to the system, which clears each page again at the
    next use: a fifth of the time of a training step. A loop asks for the same sizes over and over, so little
    is wasted; work of ever other sizes would leave holes. Does nothing where the C library is another.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        set_limit, give_back = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    set_limit(-4, 0)                        # M_MMAP_MAX: no block is too large for the heap
    set_limit(-1, 2**31 - 1)                # M_TRIM_THRESHOLD: the heap does not shrink
    try:
        yield
    finally:
        set_limit(-4, 65536)                # glibc's defaults
        set_limit(-1, 128 * 1024)
        give_back(0)


def _say(message, code):
    print(f"\n{Path(sys.argv[0]).name}: {message}" if sys.stdout.isatty()
          else f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """One sentence for a flag that is not there, as for all other input."""

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags.")


def parse_flags(config_class, description, argv=None, preset=None):
    """A config dataclass from the command line: field d_sae becomes --d-sae, with its default and its help
    text.

    Whole numbers may be written 1e6; a bool x gets --x and --no-x; a tuple of whole numbers is written 0,2,3.
    The help of a field is `metadata["help"]`. preset: a function from the config to {field: value}, which
    take the place of the defaults; a flag given by hand still wins. Raises UserError for a value that is not
    of the field's type.
    """
    parser = _Parser(description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for one in dataclasses.fields(config_class):
        flag, help_text = "--" + one.name.replace("_", "-"), one.metadata.get("help", "")
        if one.metadata.get("positional"):
            parser.add_argument(one.name, nargs="?", default=one.default, help=f"{help_text} [{one.default}]")
            continue
        kind, element = _base_type(one.type)
        shown = ",".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=one.default,
                                help=help_text)
        else:
            parser.add_argument(flag, default=one.default, metavar=kind.__name__.upper(),
                                help=f"{help_text} [{shown}]",
                                type=lambda text, kind=kind, element=element,
                                flag=flag: _convert(text, kind, element, flag))
    if preset:
        parser.set_defaults(**preset(config_class(**vars(parser.parse_args(argv)))))
    return config_class(**vars(parser.parse_args(argv)))


def field(default, help, positional=False):
    """A config field with its help text: what it is, its unit, the paper's value. A positional one is given
    without its name."""
    return dataclasses.field(default=default, metadata={"help": help, "positional": positional})


def _base_type(annotation):
    """-> (int, None) for int, (tuple, float) for tuple[float, ...]."""
    if typing.get_origin(annotation) is tuple:
        return tuple, typing.get_args(annotation)[0]
    return annotation, None


def _convert(text, kind, element, flag):
    try:
        if kind is tuple:
            return tuple(_number(part, element) for part in text.split(","))
        return text if kind is str else _number(text, kind)
    except (ValueError, OverflowError):
        one = {int: "a whole number", float: "a number"}.get(element or kind)
        raise UserError(f"{flag} takes {one + ', or several with commas' if element else one}, not "
                        f"{text!r}.") from None


def _number(text, kind):
    """"1e6" is a whole number, "1.5" is not; infinity and NaN are not numbers here."""
    value = float(text)
    if not np.isfinite(value) or kind is int and value != int(value):
        raise ValueError
    return kind(value)


@contextlib.contextmanager
def atomic(path, way_out="choose another --out"):
    """Yields a temporary path that takes the name `path` only when the block ends well: never half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)             # safetensors writes for the owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:     # safetensors has its own for a disk that is full
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {why}; {way_out}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def run_folder(out, model):
    """Where a program writes what it finds about a model: <out>/<name of the model or of its directory>."""
    return Path(out) / Path(model).resolve().name


def check_writable(folder):
    """Make the folder. Raises UserError now, rather than in an hour, if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}.tmp"     # its own, should several processes try
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out.") from error


def write_json(path, value):
    """Plain numbers and lists as JSON, written atomically. NaN is refused, since it is not JSON."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def parse_json(text):
    """The value of a JSON text. Raises ValueError if it is none, or is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path):
    """The JSON object in `path`. Raises UserError if the file is missing or is not JSON."""
    try:
        value = parse_json(Path(path).read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be cut short: fetch or make it "
                        f"again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, and holds a {type(value).__name__}.")
    return value


class Progress:
    """One line, redrawn in place on a terminal, a plain line now and then when piped."""

    def __init__(self, total, unit="tokens", every=None):
        self.total, self.unit, self.start, self.first, self.shown = total, unit, time.monotonic(), None, 0.0
        self.every = every if every is not None else (0.5 if sys.stdout.isatty() else 10.0)
        self.ended = False

    def __call__(self, done, text="", last=False):
        """Show `done` of `total`, its rate, the time left and `text`; silent if the last line is younger than
        `every` seconds. The line ends where all is done, or where `last` says so."""
        now, last = time.monotonic(), last or done >= self.total
        if self.ended:
            return
        self.ended = last
        if self.first is None:
            self.first = done                           # a resumed run starts with work already done
        if now - self.shown < self.every and not last:
            return
        self.shown = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = "" if last or rate == 0 else f"  {_clock((self.total - done) / rate)} left"
        line = f"{done:>{len(f'{self.total:,}')},}/{self.total:,} {self.unit}  {rate:,.0f}/s{left}  {text}"
        print(f"\r\033[K{line}" if sys.stdout.isatty() else line,
              end="\n" if last or not sys.stdout.isatty() else "", flush=True)


def _clock(seconds):
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def bootstrap(statistic, n, samples=1000, seed=0):
    """95% interval of `statistic(rows)` when the n rows are drawn anew with replacement: percentile bootstrap
    -> [low, high].

    `statistic` gets an (n,) integer array of row numbers and returns a float, or an array of statistics
    (intervals then have its shape). Rows, not tokens, are drawn, since the tokens of a row are not
    independent.
    """
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(rng.integers(0, n, n)) for _ in range(samples)])
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return [low.tolist(), high.tolist()]


@contextlib.contextmanager
def deferred_interrupt():
    """Yields a function that tells whether Ctrl-C was pressed, so that a loop can stop between two steps;
    pressed twice, it stops at once."""
    pressed = []

    def handler(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def pick_device(name):
    """"auto" is CUDA, else Apple's MPS, else the CPU. Raises UserError if the named device is not there."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if have[kind]))
    if not have.get(name.split(":")[0], False):
        raise UserError(f"--device {name} is not available here; use one of: auto, "
                        f"{', '.join(k for k in have if have[k])}.")
    return torch.device(name)


def pick_dtype(name):
    """float32 or bfloat16. Raises UserError for another name."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in kinds:
        raise UserError(f"--dtype {name} is unknown; use one of: {', '.join(kinds)}.")
    return kinds[name]


def fast_bfloat16(device):
    """Whether the processor multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return (device.type == "cpu" and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mean_of(values, rows=None, samples=1000):                           # (n,...), (n,) -> mean, [low, high]
    """A mean over n values with its 95% bootstrap interval; values with the same number in `rows` belong
    together and are drawn together. None, None for no values."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return None, None
    group = np.arange(len(values)) if rows is None else np.unique(np.asarray(rows), return_inverse=True)[1]
    sums = np.zeros((group.max() + 1, *values.shape[1:]))
    np.add.at(sums, group, values)
    counts = np.bincount(group)
    mean = lambda i: sums[i].sum(0) / counts[i].sum()
    return values.mean(0).tolist(), bootstrap(mean, len(sums), samples)


def with_interval(value, bounds, form=".3f"):
    """"0.812 [0.790, 0.831]", and "n/a" where there is no value."""
    return "n/a" if value is None else "{:{f}} [{:{f}}, {:{f}}]".format(value, *bounds, f=form)


def wilson(k, n):
    """95% interval of a share of which k of n were seen (Wilson 1927): also where all or none were."""
    if n == 0:
        return None
    z, p = 1.959964, k / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
