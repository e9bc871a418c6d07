"""Finding a model's files, reading safetensors into a module with every name and shape checked, and
a digest by which weights are known again."""

import hashlib
import re
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data import hub
from data.errors import UserError
from data.files import read_json

UNEMBEDDING = "lm_head.weight"
TINY = Path(__file__).parent / "tiny"
PUBLISHED = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
             "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
             "gemma-2b": "google/gemma-2b", "gemma-7b": "google/gemma-7b",
             "gemma-2-2b": "google/gemma-2-2b", "gemma-2-9b": "google/gemma-2-9b",
             "gemma-3-270m": "google/gemma-3-270m", "gemma-3-1b-pt": "google/gemma-3-1b-pt"}


def local_folder(name_or_dir):                                  # -> Path | None
    """The directory of a model that is here, "tiny" among them; None for one of the hub, and for
    nothing.

    A directory that happens to have a published name counts only if it holds a model.
    """
    folder = TINY if name_or_dir == "tiny" else Path(name_or_dir)
    if (folder / "config.json").is_file() or folder.is_dir() and name_or_dir not in PUBLISHED:
        return folder
    return None


def find(name_or_dir, *filenames, optional=False):              # -> Path | None
    """The path of the first of these files that a model has; None if it has none of them.

    name_or_dir: "tiny" (shipped), a directory, or a model of the Hugging Face hub, as owner/name or
    by one of the short names in PUBLISHED. optional: where nobody can be asked, a model has no more
    of these files than are in the cache. Raises UserError for what is no model, and for a fetch
    that fails.
    """
    if folder := local_folder(name_or_dir):
        return next((folder / name for name in filenames if (folder / name).is_file()), None)
    repo = PUBLISHED.get(name_or_dir, str(name_or_dir))
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise UserError(f"--model {name_or_dir} is unknown; give a directory in Hugging Face "
                        f"layout, the owner/name of a model on the hub, or one of: tiny, "
                        f"{', '.join(PUBLISHED)}.")
    unanswered = None
    for name in filenames:
        try:
            if path := hub.fetch(repo, name):
                return path
        except hub.NobodyAnswers as error:      # the next may be in the cache
            unanswered = error
    if unanswered and not optional:
        raise unanswered
    return None


def find_config(name_or_dir):
    """The path of a model's config.json."""
    path = find(name_or_dir, "config.json")
    if path is None:
        raise UserError(f"--model {name_or_dir}: there is no {name_or_dir}/config.json; give "
                        "\"tiny\", a directory in Hugging Face layout, or the owner/name of a "
                        "model on the hub.")
    return path


def read_tensors(path):
    """(name, tensor) for every tensor of a safetensors file, one at a time. Raises UserError if the
    file is damaged.

    Tensors are views of the mapped file, which is opened anew for each, so that pages read for one
    do not stay in memory with the next.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); it may be cut short: fetch or make it "
                        f"again.") from error


def load_into(model, name_or_dir, layout, device, dtype):
    """Fill a module made on the meta device from a model's safetensors, one file or many, tensor by
    tensor.

    layout: a data.hf_config.Layout. Raises UserError if a file or a tensor is missing, unknown or
    of another shape; then the module is not to be used.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    loaded = {}
    for path in weight_files(name_or_dir):
        for theirs, tensor in read_tensors(path):
            ours = layout.rename(theirs)
            if theirs == UNEMBEDDING:
                # Tied to the embedding, for which it stands where a file keeps one of the two.
                ours = None if layout.embedding in loaded else layout.embedding
            if ours is None:
                continue
            if ours not in expected:
                raise UserError(f"{path}: tensor {theirs} is not part of this model; config.json "
                                "and the weights do not belong together.")
            if ours.endswith(layout.transposed):
                tensor = tensor.T
            if not tensor.is_floating_point():
                raise UserError(f"{path}: tensor {theirs} holds {tensor.dtype}, and floating-point "
                                "numbers are needed.")
            if tuple(tensor.shape) != expected[ours]:
                raise UserError(f"{path}: tensor {theirs} has shape {tuple(tensor.shape)}, and "
                                f"config.json asks for {expected[ours]}.")
            loaded[ours] = torch.empty(expected[ours], dtype=dtype, device=device).copy_(tensor)
            if not loaded[ours].isfinite().all():
                raise UserError(f"{path}: tensor {theirs} has numbers that are not finite, in "
                                f"{str(dtype).removeprefix('torch.')}; fetch it again, or load it "
                                f"in another --dtype.")
    missing = sorted(expected.keys() - loaded.keys())
    if missing:
        raise UserError(f"--model {name_or_dir}: {len(missing)} tensors are missing from the "
                        f"weights, the first is {missing[0]}; fetch the files again.")
    model.load_state_dict(loaded, assign=True)


def weight_files(name_or_dir):
    """model.safetensors, or all the shards that model.safetensors.index.json names."""
    path = find(name_or_dir, "model.safetensors", "model.safetensors.index.json")
    if path is None:
        raise UserError(f"--model {name_or_dir} has no model.safetensors; fetch the model's "
                        "weights into it.")
    if path.suffix == ".safetensors":
        return [path]
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and Path(name).name == name
                                               for name in shards.values()):
        raise UserError(f"{path} names no weights; fetch it again.")
    files = {name: find(name_or_dir, name) for name in sorted(set(shards.values()))}
    if missing := [name for name, file in files.items() if file is None]:
        raise UserError(f"--model {name_or_dir}: {missing[0]} is missing, which {path} names; "
                        "fetch it.")
    return list(files.values())


def digest(module, n_values=4096):
    """16 hex digits by which a module's weights are known again: a hash of every tensor's name and
    shape, and of up to n_values of its numbers, evenly spaced, as float32.

    So it does not depend on how the files are cut, nor on the number type where that holds the same
    numbers; and it takes no time.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        last = len(flat) - 1
        n = min(len(flat), n_values)
        index = torch.arange(n, device=flat.device) * last // max(n - 1, 1)
        total.update(f"{name} {tuple(tensor.shape)} ".encode())
        total.update(flat[index].float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]
