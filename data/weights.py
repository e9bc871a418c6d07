"""Finding a model's files, and reading safetensors into a module with every name and shape checked."""

import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data.common import UserError

TINY = Path(__file__).parent / "tiny"


def find(name_or_dir):
    """The directory of a model: "tiny", or a path. Raises UserError if there is none."""
    folder = TINY if name_or_dir == "tiny" else Path(name_or_dir)
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {name_or_dir}: there is no {folder}/config.json; give \"tiny\" or a "
                        f"directory in Hugging Face layout.")
    return folder


def positive_int(raw, key, folder):
    """raw[key], which must be a positive whole number."""
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise UserError(f"{folder}/config.json: {key} should be a positive whole number, and is {value!r}.")
    return value


def read_tensors(path):
    """(name, tensor) for every tensor of a safetensors file, one at a time. Raises UserError if the file is
    damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); it may be cut short: fetch or make it "
                        f"again.") from error


def load_into(model, folder, rename, device, dtype):
    """Fill a module made on the meta device from the folder's *.safetensors, tensor by tensor.

    rename: a checkpoint's name -> ours, or None for a tensor to leave out. Raises UserError if a tensor is
    missing, unknown or of another shape; then the module is not to be used.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors file; fetch the model's weights into it.")
    found = {}
    for path in files:
        for theirs, tensor in read_tensors(path):
            ours = rename(theirs)
            if ours is None:
                continue
            if ours not in expected:
                raise UserError(f"{path}: tensor {theirs} is not part of this model; config.json and the "
                                f"weights do not belong together.")
            if tuple(tensor.shape) != expected[ours]:
                raise UserError(f"{path}: tensor {theirs} has shape {tuple(tensor.shape)}, and config.json "
                                f"asks for {expected[ours]}.")
            found[ours] = tensor.to(device, dtype)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing from the weights, the first is "
                        f"{missing[0]}; fetch the file again.")
    model.load_state_dict(found, assign=True)
