"""SAEs on disk: our own files, and those that others have published, all turned into one form.

    pre = (z - b_dec) @ W_enc + b_enc,   f = pre where pre > threshold,   z_hat = f @ W_dec + b_dec

    file                                from                     what is converted
    *.safetensors                       this project             nothing
    *.pt, with *_cfg.json beside it     the paper's GPT-2 SAEs   threshold 0
    *.npz                               Gemma Scope (JumpReLU)   b_enc += b_dec @ W_enc
    cfg.json, sae_weights.safetensors   SAELens                  the same if configured; scale of z;
                                                                 decoder rows to unit norm

What an SAE is of goes with it as `about`, in the header of our own files and in the config.json
beside them, and as far as the others say it:

    model, architecture, weights    the model's name, its shape, and the digest of its weights
    layer, reads                    which layer, and what of it: z_cat, or a z_cat without its
                                    constant part
    left_out, units                 positions that it was not trained on; what a number of its input
                                    stands for
    top_k                           of a TopK SAE, the features that an input has at most

Where LayerNorm and value biases were folded into the model's weights, as for the paper's SAEs, z
lacks model.value_bias(layer); `sae.shift(model.value_bias(layer))` makes such an SAE read ours.
"""

import re
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import hub
from data.errors import UserError
from data.files import atomic, parse_json, read_json, run_folder, write_json
from data.hf_config import check_options
from data.weights import TINY, read_tensors

Z_CAT = "z_cat"                                 # what an SAE of this project reads
FOLDED_Z_CAT = "z_cat less value_bias"          # what the paper's read
MLP = "mlp"                                     # what a transcoder reads: the MLP's input
NAMES = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
ABOUT = ("model", "architecture", "weights", "layer", "reads", "left_out", "units", "top_k")

# Published sets: (repository on the hub, {layer: file}).
_KISSANE_RUNS = [
    "1.80e+00_ds24576_bs4096_dc1.00e-06 v9", "8.00e-01_ds24576_bs4096_dc1.00e-06 v5",
    "1.00e+00_ds24576_bs4096_dc1.00e-06 v4", "9.00e-01_ds24576_bs4096_dc1.00e-06 v9",
    "1.10e+00_ds24576_bs4096_dc1.00e-06 v7", "1.00e+00_ds49152_bs4096_dc1.00e-06 v9",
    "1.10e+00_ds24576_bs4096_dc1.00e-06 v9", "1.10e+00_ds49152_bs4096_dc1.00e-06 v9",
    "1.30e+00_ds24576_bs4096_dc1.00e-05 v6", "1.20e+00_ds24576_bs4096_dc1.00e-06 v9",
    "1.30e+00_ds24576_bs4096_dc1.00e-05 v9", "3.00e+00_ds24576_bs4096_dc3.16e-06 v9"]
_KISSANE_FILES = {
    layer: f"gpt2-small_L{layer}_Hcat_z_lr1.20e-03_l1"
           f"{run.replace(' ', '_rsanthropic_rie25000_nr4_')}.pt"
    for layer, run in enumerate(_KISSANE_RUNS)}
_GEMMA_SCOPE_L0 = [104, 79, 93, 117, 116, 135, 61, 99, 129, 127, 70, 80, 85, 92, 71, 98, 71, 79, 72,
                   122, 62, 65, 106, 73, 96, 77]
_GEMMA_SCOPE_FILES = {layer: f"layer_{layer}/width_16k/average_l0_{l0}/params.npz"
                      for layer, l0 in enumerate(_GEMMA_SCOPE_L0)}
PUBLISHED = {"kissane": ("ckkissane/attn-saes-gpt2-small-all-layers", _KISSANE_FILES),
             "gemma-scope": ("google/gemma-scope-2b-pt-att", _GEMMA_SCOPE_FILES)}


# ---- where they are ----


def find_saes(saes, out, model):
    """Where a study's SAEs are: what --saes says, else the run in --out, else, for tiny, those that
    ship."""
    run = run_folder(out, model)
    if saes:
        return saes
    if any(run.glob("L*/sae.safetensors")):
        return run
    if model == "tiny":
        return TINY
    raise UserError(f"there are no SAEs of {model} in {run}; train some with python train.py "
                    f"--model {model}, or name others with --saes.")


def sae_paths(where, layers, n_layers):
    """{layer: its SAE's file or SAELens folder}, of a folder with L0/, L1/ ... or of a published
    set (fetched if need be).

    layers: those wanted; none for all there are. Raises UserError if one is missing, or if a
    published set is of a model with another number of layers.
    """
    repo, files = PUBLISHED.get(str(where), (None, {}))
    if repo is None:
        folders = {layer: Path(where) / f"L{layer}" for layer in range(n_layers)}
        files = {layer: folder for layer, folder in folders.items() if folder.is_dir()}
    elif len(files) != n_layers:
        raise UserError(f"--saes {where} is of a model with {len(files)} layers, and this one has "
                        f"{n_layers}.")
    wanted = list(layers or [layer for layer in files if layer < n_layers])
    missing = [layer for layer in wanted if layer not in files]
    if missing:
        raise UserError(f"--saes {where} has no SAE of layer {missing[0]}; it has: "
                        f"{', '.join(map(str, files)) or 'none'}.")
    if not wanted:
        raise UserError(f"--saes {where} has no SAEs of this model; give a folder with L0/, L1/ "
                        f"..., as train.py writes it, or one of: {', '.join(PUBLISHED)}.")
    if repo is None:
        return {layer: sae_file(files[layer]) for layer in wanted}
    paths = {}
    for layer in wanted:
        paths[layer] = hub.fetch(repo, files[layer])
    if None in paths.values():
        raise UserError(f"{repo} on the hub has no longer all of its files; fetch what it has into "
                        "a folder with L0/, L1/ ..., and name that.")
    return paths


def sae_file(path):
    """What a path means: itself if it is a file or a SAELens folder, else the SAE's file in that
    folder."""
    path = Path(path)
    if not path.is_dir() or (path / "cfg.json").is_file():
        return path
    own = path / "sae.safetensors"
    published = [*sorted(path.glob("*.npz")), *sorted(path.glob("*.pt"))]
    return published[0] if published and not own.is_file() else own


# ---- reading ----


def read_sae(path):                                         # -> {name: tensor}, about
    """The five tensors of an SAE in any of these formats, float32, shapes and values checked; and
    what the file says the SAE is of. "reads" is always there: Z_CAT if nothing else is said.

    Raises UserError if a file is missing, damaged, has an option that our form lacks, or numbers
    that are not finite. Nothing is unpickled with code execution.
    """
    path = sae_file(path)
    if not path.exists():
        raise UserError(f"there is no SAE at {path}; train one with python train.py, or name "
                        "another place with --saes.")
    if path.is_dir():
        return read_saelens(path)
    readers = {".safetensors": read_own, ".npz": read_gemma_scope, ".pt": read_kissane}
    if path.suffix not in readers:
        raise UserError(f"{path} is not an SAE: .safetensors, .pt, .npz or a SAELens folder.")
    return readers[path.suffix](path)


def read_own(path):
    """What `SAE.save` wrote. In float16, rows of W_dec get their unit norm back, which rounding
    took."""
    stored = dict(read_tensors(path))
    about = {"reads": Z_CAT} | about_own(path)
    tensors = checked(stored, NAMES, path, is_transcoder=about["reads"] == MLP)
    check_top_k(about, tensors, path)
    norms = tensors["W_dec"].norm(dim=-1, keepdim=True)
    if stored["W_dec"].dtype == torch.float16 and (norms - 1).abs().max() < 1e-2:
        tensors["W_dec"] /= norms
    return tensors, about


def check_top_k(about, tensors, path):
    """Raise UserError where the number of features of a TopK SAE cannot be."""
    k = about.get("top_k", 0)
    d_sae = len(tensors["W_dec"])
    if type(k) is not int or not 0 <= k <= d_sae:
        raise UserError(f"{path} keeps the {k!r} largest of {d_sae} features, which cannot be.")
    if k and (tensors["threshold"] != 0).any():
        raise UserError(f"{path} keeps the {k} largest features and has thresholds too; that is "
                        f"not supported.")


def about_own(path):
    """What our own file says of its SAE: in its header, or, if it is too old for that, as far as
    the config.json beside it does."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("about")
        about = parse_json(header) if header else None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); make it again.") from error
    if about is not None and not isinstance(about, dict):
        raise UserError(f"{path}: its header is not what this project writes; make it again.")
    if unknown := sorted((about or {}).keys() - set(ABOUT)):
        raise UserError(f"{path}: its header says {unknown[0]}, which is not in "
                        f"data.sae_files.ABOUT and would be lost; add it there, and its meaning "
                        f"to SAE.load.")
    config = path.with_name("config.json")
    if about is None and config.is_file():
        about = read_json(config)
    if not isinstance(about, dict):
        return {}
    return {name: about[name] for name in ABOUT if name in about}


def read_kissane(path):
    """The paper's file, a torch archive, without running what is in it."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # so many kinds does a damaged archive raise
        raise UserError(f"{path} is damaged, or holds more than tensors and would run code, for "
                        f"which it is refused; fetch it again.") from error
    tensors = checked(tensors, NAMES - {"threshold"}, path)
    about = {"reads": FOLDED_Z_CAT}
    if match := re.match(r"(gpt2-small)_L(\d+)_Hcat_z_", path.name):
        about |= {"model": match[1], "layer": int(match[2])}
    config = path.with_name(path.stem + "_cfg.json")
    if config.is_file():
        d_sae, d_in = tensors["W_dec"].shape
        settings = read_json(config)
        check_options(settings, {"act_size": [d_in], "dict_size": [d_sae]}, config)
        if "act_name" in settings:
            about["layer"] = layer_of_hook(settings["act_name"], config)
    return tensors, about


def read_gemma_scope(path):
    """f = relu(pre) * (pre > threshold) with pre = z @ W_enc + b_enc: b_dec is not subtracted."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            tensors = {name: torch.from_numpy(archive[name]) for name in archive.files}
    except Exception as error:      # so many kinds does a damaged archive raise
        raise UserError(f"{path} is damaged, or holds more than numbers and would run code, for "
                        f"which it is refused; fetch it again.") from error
    tensors = checked(tensors, NAMES, path)
    tensors["threshold"].clamp_(min=0)
    tensors["b_enc"] += tensors["b_dec"] @ tensors["W_enc"]
    about = {"reads": Z_CAT}
    # as the published files are named
    if match := re.search(r"layer_(\d+)/width_\w+/average_l0_\d+/[^/]+$", path.as_posix()):
        about |= {"model": "gemma-2-2b", "layer": int(match[1])}
    return tensors, about


def read_saelens(folder):
    """A SAELens folder of the plain, the JumpReLU or the TopK kind, on hook_z."""
    config = folder / "cfg.json"
    settings = read_json(config)
    is_topk = settings.get("architecture") == "topk"
    activation = "topk" if is_topk else "relu"
    check_options(settings, {
        "architecture": ["standard", "jumprelu", "topk"],
        "activation_fn": [activation], "activation_fn_str": [activation],
        "normalize_activations": ["none", None, False, True, "expected_average_only_in"],
        "apply_b_dec_to_input": [True, False],
        "reshape_activations": ["none", "hook_z"],
        "hook_head_index": [None], "hook_point_head_index": [None]}, config)
    about = about_saelens(settings, config)
    is_jumprelu = settings.get("architecture") == "jumprelu"
    names = NAMES if is_jumprelu else NAMES - {"threshold"}
    stored = dict(read_tensors(folder / "sae_weights.safetensors"))
    drop_finetuning(stored, folder)
    tensors = checked(stored, names, folder)
    tensors["threshold"].clamp_(min=0)              # their f = relu(pre) * (pre > threshold)
    if not settings.get("apply_b_dec_to_input", True):
        tensors["b_enc"] += tensors["b_dec"] @ tensors["W_enc"]
    # True is what 2024 wrote
    if settings.get("normalize_activations") in (True, "expected_average_only_in"):
        factor = read_json(folder / "activation_scaler.json").get("scaling_factor")
        if type(factor) not in (int, float) or not 1e-9 < factor < 1e9:
            raise UserError(f"{folder}: normalize_activations expected_average_only_in needs a "
                            f"scaling_factor in activation_scaler.json, and there is {factor!r}.")
        for name in ("b_enc", "b_dec", "threshold"):        # its features were factor times ours
            tensors[name] = tensors[name] / factor
    if is_topk:
        kwargs = settings.get("activation_fn_kwargs")       # where it was until version 6
        about["top_k"] = settings.get("k", kwargs.get("k") if isinstance(kwargs, dict) else None)
        check_top_k(about, tensors, folder)
    # A TopK SAE chooses by its own pre-activations, unless it says that norms count.
    if not is_topk or settings.get("rescale_acts_by_decoder_norm"):
        fold_norms(tensors)
    return tensors, about


def drop_finetuning(stored, folder):
    """Take out what SAELens saved with every SAE until 2024, a factor for each feature's output.
    Raises UserError if one is not 1."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factor = stored.pop(name, torch.ones(1))
        if not torch.allclose(factor, torch.ones_like(factor)):
            raise UserError(f"{folder}: {name} is not 1 for all features; an SAE whose outputs "
                            f"were scaled in finetuning is not supported.")


def fold_norms(tensors):
    """Bring decoder rows to unit norm, with encoder, bias and threshold times the row's norm: the
    same reconstruction, and activations as published dashboards show them (SAELens'
    fold_W_dec_norm). A row of zeros stays."""
    norms = tensors["W_dec"].norm(dim=-1)
    norms[norms == 0] = 1
    tensors["W_dec"] /= norms[:, None]
    for name in ("W_enc", "b_enc", "threshold"):
        tensors[name] *= norms


def about_saelens(settings, config):
    """What a SAELens SAE is of. Raises UserError if it reads another site than z, or does not say
    what it reads."""
    metadata = settings.get("metadata")
    settings = settings | (metadata if isinstance(metadata, dict) else {})
    # hook_point is the name of 2024
    layer = layer_of_hook(settings.get("hook_name", settings.get("hook_point")), config)
    about = {"reads": FOLDED_Z_CAT if is_folded(settings, config) else Z_CAT, "layer": layer}
    if isinstance(settings.get("model_name"), str):
        about["model"] = settings["model_name"]
    return about


def is_folded(settings, config):
    """Whether a SAELens SAE was trained on a model whose value biases were folded into b_O.

    What model_from_pretrained_kwargs asks for, was done. As to what it does not name, SAELens
    before 3.19.2 loaded models as TransformerLens does by itself, which folds; since then as they
    are. (Centring of what is written to the stream does not reach z.) Raises UserError where
    nothing tells, and for value biases folded without those of LayerNorm.
    """
    asked = settings.get("model_from_pretrained_kwargs")
    version = settings.get("sae_lens_training_version") or settings.get("sae_lens_version")
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", str(version))
    is_asked = isinstance(asked, dict)
    if not numbers and not is_asked:
        raise UserError(f"{config} does not say whether value biases were folded into b_O, on "
                        f"which z depends: put \"model_from_pretrained_kwargs\" there, {{}} for "
                        f"plain weights, or the \"sae_lens_training_version\".")
    folds_by_itself = bool(numbers) and tuple(map(int, numbers.groups())) < (3, 19, 2)
    done = {"fold_ln": folds_by_itself, "fold_value_biases": folds_by_itself}
    if is_asked:
        done |= asked
    if done["fold_value_biases"] and not done["fold_ln"]:
        raise UserError(f"{config}: value biases were folded into b_O, and LayerNorm was not "
                        f"folded (fold_ln False); that is not supported: its z lacks a part of "
                        f"model.value_bias.")
    return bool(done["fold_value_biases"])


def layer_of_hook(hook, config):
    """The layer in TransformerLens' name of z, blocks.<layer>.attn.hook_z. Raises UserError for
    another site, and for none."""
    match = re.fullmatch(r"blocks\.(\d+)\.attn\.hook_z", str(hook))
    if not match:
        raise UserError(f"{config}: hook_name {hook!r} is not supported, only blocks.<layer>.attn."
                        f"hook_z: this SAE does not read z_cat, or does not say so.")
    return int(match[1])


def checked(tensors, names, path, is_transcoder=False):
    """The tensors as float32, with a threshold of 0 if there is none. Raises UserError if they are
    not `names`, do not fit each other, or are not finite. A transcoder may write another number of
    dimensions than it reads."""
    is_dict = isinstance(tensors, dict)
    if not is_dict or tensors.keys() != names \
            or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()) \
            or tensors["W_dec"].dim() != 2 or tensors["W_enc"].dim() != 2:
        present = sorted(map(str, tensors)) if is_dict else type(tensors).__name__
        raise UserError(f"{path} is not an SAE of this kind: it has {present}, and {sorted(names)} "
                        f"are needed.")
    d_sae, d_out = tensors["W_dec"].shape
    d_in = tensors["W_enc"].shape[0] if is_transcoder else d_out
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out),
              "b_dec": (d_out,), "threshold": (d_sae,)}
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or not tensor.is_floating_point() \
                or not tensor.isfinite().all():
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, {shapes[name]} is "
                            f"needed, of finite numbers.")
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    return {"threshold": torch.zeros(d_sae)} | copies


# ---- writing for others ----


def write_saelens(tensors, folder, model_name, layer, n_ctx, top_k=0):
    """Write an SAE's five tensors (its state_dict) as a SAELens folder; top_k: of a TopK SAE.

    It reads z of the model's plain weights, which its cfg.json says as SAELens does (no folding at
    load): for a TransformerLens model with folded LayerNorm and value biases,
    shift(-model.value_bias(layer)) first.
    """
    is_jumprelu = bool((tensors["threshold"] != 0).any())
    stored = {}
    for name, tensor in tensors.items():
        if is_jumprelu or name != "threshold":
            stored[name] = tensor.detach().to("cpu", torch.float32).contiguous()
    d_sae, d_in = stored["W_dec"].shape
    with atomic(Path(folder) / "sae_weights.safetensors") as temporary:
        save_file(stored, temporary)
    architecture = "topk" if top_k else "jumprelu" if is_jumprelu else "standard"
    of_topk = {"k": top_k, "rescale_acts_by_decoder_norm": False} if top_k else {}
    plain_weights = {"fold_ln": False, "fold_value_biases": False, "center_writing_weights": False,
                     "center_unembed": False}
    write_json(Path(folder) / "cfg.json", {
        "architecture": architecture, **of_topk,
        "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "hook_z",
        "metadata": {"model_name": model_name, "hook_name": f"blocks.{layer}.attn.hook_z",
                     "hook_head_index": None, "prepend_bos": True, "context_size": n_ctx,
                     "model_from_pretrained_kwargs": plain_weights, "sae_lens_version": "6.0.0"}})
