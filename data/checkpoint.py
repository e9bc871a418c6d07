"""One file from which a stopped run goes on: named tensors, and the settings they were made
with."""

import json

from safetensors import safe_open
from safetensors.torch import save_file

from data.errors import UserError
from data.files import atomic, parse_json
from data.weights import read_tensors


def save_checkpoint(path, tensors, settings):
    """Write {name: tensor} and the settings, a dict that JSON can hold."""
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"settings": json.dumps(settings)})


def load_checkpoint(path, settings):                        # -> {name: tensor}
    """Read the tensors back. Raises UserError if the file is damaged or of other settings."""
    tensors = dict(read_tensors(path))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        saved_settings = dict(parse_json(metadata["settings"]))
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path) from error
    for key, value in settings.items():
        if saved_settings.get(key) != value:
            raise UserError(f"--resume: {path} was made with {key} = {saved_settings.get(key)}, "
                            f"not {value}; use the same settings, or another --out.")
    return tensors


def restore_(tensor, saved):
    """Copy a saved tensor into one that it belongs to -> the tensor. Raises ValueError if its shape
    or type is another, or if it is not finite."""
    if saved.shape != tensor.shape or saved.dtype != tensor.dtype or not saved.isfinite().all():
        raise ValueError("not the tensor that was saved here")
    return tensor.copy_(saved)


def damaged(path):
    """The UserError for a checkpoint that cannot be gone on from."""
    return UserError(f"--resume: {path} is damaged: it lacks something, or holds other numbers "
                     "than a checkpoint; remove it and start anew.")
