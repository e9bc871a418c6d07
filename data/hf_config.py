"""Hugging Face's layout of GPT-2 and Gemma: what config.json says, and what the tensors are called.

Every option that a checkpoint may have is read, or known to be the default, or refused by its name.
"""

from typing import Callable, NamedTuple

from data.errors import UserError
from data.files import read_json

GEMMA_VERSIONS = {"gemma": 1, "gemma2": 2, "gemma3_text": 3}


class Layout(NamedTuple):
    """How a checkpoint's tensors become parameters."""
    rename: Callable        # their name -> ours; None for a tensor without weights of its own
    transposed: tuple       # endings of our names whose tensors are stored (d_out, d_in)
    embedding: str          # our name of the token embedding, to which the unembedding is tied


def read_config(path):
    """config.json -> ("gpt2" or "gemma", the fields of GPT2Config or GemmaConfig, Layout).

    Raises UserError for an option that is not implemented and for a number that cannot be one.
    """
    raw = read_json(path)
    check_options(raw, {"model_type": ["gpt2", *GEMMA_VERSIONS]}, path)
    if raw.get("model_type", "gpt2") == "gpt2":
        return "gpt2", gpt2_settings(raw, path), Layout(gpt2_name, (), "wte.weight")
    version = GEMMA_VERSIONS[raw["model_type"]]
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layout = Layout(lambda name: gemma_name(name, version),
                    tuple(f".{name}.weight" for name in projections), "embed_tokens.weight")
    return "gemma", gemma_settings(raw, version, path), layout


def check_options(raw, implemented, path):
    """Raise UserError for an option with a value that is not implemented; the first of a list is
    the default."""
    for key, values in implemented.items():
        if raw.get(key, values[0]) not in values:
            raise UserError(f"{path}: {key} {raw[key]!r} is not supported, only "
                            f"{' or '.join(repr(value) for value in values)}.")


class Numbers:
    """The numbers of a config.json, checked."""

    def __init__(self, raw, path):
        self.raw = raw
        self.path = path

    def __call__(self, key, kind=int, default=None, below=2**24):
        """The number under `key`, or the default if it is null or not there. Raises UserError if it
        is not positive, of a size that no model has, or, for int, not whole."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        allowed = (int,) if kind is int else (int, float)
        if type(value) not in allowed or not 0 < value < below:
            whole = "whole " if kind is int else ""
            raise UserError(f"{self.path}: {key} should be a positive {whole}number below {below}, "
                            f"and is {value!r}.")
        return kind(value)


# ---- GPT-2 ----


def gpt2_settings(raw, path):
    """The fields of GPT2Config."""
    check_options(raw, {"activation_function": ["gelu_new"], "scale_attn_weights": [True],
                        "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False],
                        "tie_word_embeddings": [True]}, path)
    number = Numbers(raw, path)
    d_model = number("n_embd")
    n_heads = number("n_head")
    if d_model % n_heads:
        raise UserError(f"{path}: n_embd {d_model} is not a multiple of n_head {n_heads}.")
    return {"n_layers": number("n_layer", below=1000), "n_heads": n_heads, "d_model": d_model,
            "d_mlp": number("n_inner", default=4 * d_model), "d_vocab": number("vocab_size"),
            "n_ctx": number("n_positions"), "eps": number("layer_norm_epsilon", float, 1e-5)}


def gpt2_name(name):
    """Our name of a tensor; None for masks, which are computed."""
    name = name.removeprefix("transformer.")
    return None if name.endswith((".attn.bias", ".attn.masked_bias")) else name


# ---- Gemma ----


def gemma_settings(raw, version, path):
    """The fields of GemmaConfig."""
    # early files of Gemma 1 say gelu and mean its tanh form
    gelu = ["gelu_pytorch_tanh", None, "gelu"] if version == 1 else ["gelu_pytorch_tanh", None]
    check_options(raw, {"hidden_act": gelu, "hidden_activation": gelu, "attention_bias": [False],
                        "tie_word_embeddings": [True], "rope_scaling": [None],
                        "use_bidirectional_attention": [None, False]}, path)
    if version == 3:
        check_options(raw, {"attn_logit_softcapping": [None], "final_logit_softcapping": [None]},
                      path)
    number = Numbers(raw, path)
    n_layers = number("num_hidden_layers", below=1000)
    n_heads = number("num_attention_heads")
    n_kv_heads = number("num_key_value_heads")
    d_head = number("head_dim", default=256)
    if n_heads % n_kv_heads or d_head % 2:
        raise UserError(f"{path}: num_attention_heads {n_heads} must be a multiple of "
                        f"num_key_value_heads {n_kv_heads}, and head_dim {d_head} even.")
    query_scale = d_head if version == 1 else number("query_pre_attn_scalar", float, 256)
    is_local = local_layers(raw, version, n_layers, path)
    window = number("sliding_window", default=4096) if any(is_local) else None
    global_theta, local_theta = rotation_thetas(raw, version, path)
    has_softcaps = version == 2
    return {"n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads,
            "d_model": number("hidden_size"), "d_head": d_head,
            "d_mlp": number("intermediate_size"), "d_vocab": number("vocab_size"),
            "n_ctx": number("max_position_embeddings", default=8192),
            "eps": number("rms_norm_eps", float, 1e-6),
            "score_scale": query_scale**-0.5,
            "windows": tuple(window if local else None for local in is_local),
            "thetas": tuple(local_theta if local else global_theta for local in is_local),
            "score_softcap": softcap(number, "attn_logit_softcapping", 50.0, has_softcaps),
            "logit_softcap": softcap(number, "final_logit_softcapping", 30.0, has_softcaps),
            "post_norms": version > 1, "qk_norm": version == 3}


def softcap(number, key, default, is_implemented):
    """A soft cap, which an explicit null switches off."""
    is_off = key in number.raw and number.raw[key] is None
    if not is_implemented or is_off:
        return None
    return number(key, float, default)


def local_layers(raw, version, n_layers, path):
    """For each layer whether its queries see only a window: none in Gemma 1, every second in Gemma
    2, all but each sixth in Gemma 3, unless the file lists them."""
    kinds = raw.get("layer_types") if version > 1 else None
    if kinds is None:
        default = {1: 1, 2: 2, 3: 6}[version]
        every = Numbers(raw, path)("sliding_window_pattern", default=default) if version == 3 \
            else default
        return [(layer + 1) % every != 0 for layer in range(n_layers)]
    known = {"sliding_attention", "full_attention"}
    if not isinstance(kinds, list) or len(kinds) != n_layers or not set(map(str, kinds)) <= known:
        raise UserError(f"{path}: layer_types should be a list of sliding_attention or "
                        f"full_attention for each of {n_layers} layers.")
    return [kind == "sliding_attention" for kind in kinds]


def rotation_thetas(raw, version, path):                    # -> global, local
    """The base of the rotation in layers that see everything, and in those that see a window.

    It stands under rope_parameters, as transformers 5 writes it, or where files had it before.
    """
    rope = raw.get("rope_parameters") or {}
    is_right = isinstance(rope, dict)
    if is_right and version == 3:
        is_right = all(isinstance(of_kind, dict) for of_kind in rope.values())
    if not is_right:
        raise UserError(f"{path}: rope_parameters is not what this Gemma has.")
    if version == 3:
        global_rope = {"rope_theta": raw.get("rope_theta", 1e6)} | rope.get("full_attention", {})
        local_rope = {"rope_theta": raw.get("rope_local_base_freq", 1e4)} \
            | rope.get("sliding_attention", {})
    else:
        global_rope = local_rope = {"rope_theta": raw.get("rope_theta", 1e4)} | rope
    for of_kind in (global_rope, local_rope):
        check_options(of_kind, {"rope_type": ["default"]}, path)
    return (Numbers(global_rope, path)("rope_theta", float),
            Numbers(local_rope, path)("rope_theta", float))


def gemma_name(name, version):
    """Our name of a tensor; None for rotations, which are computed."""
    name = name.removeprefix("model.")
    if name.endswith("rotary_emb.inv_freq"):
        return None
    if version == 1:    # it names its second pre-norm by where it stands, which in 2 is a post-norm
        name = name.replace("post_attention_layernorm", "pre_feedforward_layernorm")
    return name
