"""Hugging Face's layout of GPT-2 and Gemma: what config.json says, and what the tensors are called.

Every option that a checkpoint may have is read, or known to be the default, or refused by its name.
"""

from typing import Callable, NamedTuple

from data.common import UserError, read_json


class Layout(NamedTuple):
    """How a checkpoint's tensors become parameters."""
    rename: Callable        # their name -> ours, or None for a tensor that carries no weight of its own
    transposed: tuple       # endings of our names whose tensors are stored (d_out, d_in)


def read_config(path):
    """config.json -> ("gpt2" or "gemma", the fields of GPT2Config or GemmaConfig, Layout).

    Raises UserError for an option that is not implemented and for a number that cannot be one.
    """
    raw = read_json(path)
    check_options(raw, {"model_type": ["gpt2", "gemma", "gemma2", "gemma3_text"]}, path)
    return _gpt2(raw, path) if raw.get("model_type", "gpt2") == "gpt2" else _gemma(raw, path)


def check_options(raw, implemented, path):
    """Raise UserError for an option with a value that is not implemented; the first of a list is the default.
    """
    for key, values in implemented.items():
        if raw.get(key, values[0]) not in values:
            raise UserError(f"{path}: {key} {raw[key]!r} is not supported, only "
                            f"{' or '.join(repr(value) for value in values)}.")


def _gpt2(raw, path):
    check_options(raw, {"activation_function": ["gelu_new"], "scale_attn_weights": [True],
                        "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False],
                        "tie_word_embeddings": [True]}, path)
    number = _numbers(raw, path)
    settings = {"n_layers": number("n_layer", below=1000), "n_heads": number("n_head"),
                "d_model": number("n_embd"),
                "d_mlp": number("n_inner", int, None) or 4 * number("n_embd"),
                "d_vocab": number("vocab_size"), "n_ctx": number("n_positions"),
                "eps": number("layer_norm_epsilon", float, 1e-5)}
    if settings["d_model"] % settings["n_heads"]:
        raise UserError(f"{path}: n_embd {settings['d_model']} is not a multiple of n_head "
                        f"{settings['n_heads']}.")
    return "gpt2", settings, Layout(_gpt2_name, ())


def _gpt2_name(name):
    name = name.removeprefix("transformer.")
    # tied; the causal mask
    if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    return name


def _gemma(raw, path):
    version = {"gemma": 1, "gemma2": 2, "gemma3_text": 3}[raw["model_type"]]
    gelu = ["gelu_pytorch_tanh", None] + ["gelu"] * (version == 1)      # early files say gelu and mean tanh
    check_options(raw, {"hidden_act": gelu, "hidden_activation": gelu, "attention_bias": [False],
                        "tie_word_embeddings": [True], "rope_scaling": [None],
                        "use_bidirectional_attention": [None, False]}, path)
    number = _numbers(raw, path)
    settings = {"n_layers": number("num_hidden_layers", below=1000), "n_heads": number("num_attention_heads"),
                "n_kv_heads": number("num_key_value_heads"), "d_model": number("hidden_size"),
                "d_head": number("head_dim", int, 256), "d_mlp": number("intermediate_size"),
                "d_vocab": number("vocab_size"), "n_ctx": number("max_position_embeddings", int, 8192),
                "eps": number("rms_norm_eps", float, 1e-6), "post_norms": version > 1,
                "qk_norm": version == 3}
    if settings["n_heads"] % settings["n_kv_heads"] or settings["d_head"] % 2:
        raise UserError(f"{path}: num_attention_heads {settings['n_heads']} must be a multiple of "
                        f"num_key_value_heads {settings['n_kv_heads']}, and head_dim {settings['d_head']} "
                        "even.")
    scalar = settings["d_head"] if version == 1 else number("query_pre_attn_scalar", float, 256)
    settings |= {"score_scale": scalar**-0.5,
                 "score_cap": _cap(raw, number, "attn_logit_softcapping", 50.0) if version == 2 else None,
                 "logit_cap": _cap(raw, number, "final_logit_softcapping", 30.0) if version == 2 else None}
    if version == 3:
        check_options(raw, {"attn_logit_softcapping": [None], "final_logit_softcapping": [None]}, path)
    local = _local_layers(raw, path, version, settings["n_layers"])
    window = number("sliding_window", int, 4096) if any(local) else None
    theta, local_theta = _thetas(raw, path, version)
    settings |= {"windows": tuple(window if one else None for one in local),
                 "thetas": tuple(local_theta if one else theta for one in local)}

    def rename(name):
        name = name.removeprefix("model.")
        if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):        # tied; computed
            return None
        if version == 1:    # Gemma 1 names its second pre-norm by where it stands, which in 2 is a post-norm
            name = name.replace("post_attention_layernorm", "pre_feedforward_layernorm")
        return name

    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return "gemma", settings, Layout(rename, tuple(f".{name}.weight" for name in projections))


def _cap(raw, number, key, default):
    """A soft cap, which an explicit null switches off."""
    return None if key in raw and raw[key] is None else number(key, float, default)


def _local_layers(raw, path, version, n_layers):
    """For each layer whether its queries see only a window: none in Gemma 1, every second in Gemma 2, all but
    each sixth in Gemma 3, unless the file lists them."""
    every = {1: 1, 2: 2, 3: _numbers(raw, path)("sliding_window_pattern", int, 6)}[version]
    kinds = raw.get("layer_types") if version > 1 else None
    if kinds is None:
        return [(layer + 1) % every != 0 for layer in range(n_layers)]
    if not isinstance(kinds, list) or len(kinds) != n_layers \
            or not {*map(str, kinds)} <= {"sliding_attention", "full_attention"}:
        raise UserError(f"{path}: layer_types should be a list of sliding_attention or full_attention for "
                        f"each of {n_layers} layers.")
    return [kind == "sliding_attention" for kind in kinds]


def _thetas(raw, path, version):
    """The base of the rotation in layers that see everything, and in those that see a window: under
    rope_parameters as transformers 5 writes them, or as files had them before."""
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or not all(isinstance(one, dict) for one in rope.values()) and version == 3:
        raise UserError(f"{path}: rope_parameters is not what this Gemma has.")
    full, local = (rope.get(f"{kind}_attention", {}) if version == 3 else rope
                   for kind in ("full", "sliding"))
    for one in (full, local):
        check_options(one, {"rope_type": ["default"]}, path)
    before = {"rope_theta": raw.get("rope_theta", 1e6 if version == 3 else 1e4)}
    before_local = {"rope_theta": raw.get("rope_local_base_freq", 1e4)} if version == 3 else before
    return (_numbers(before | full, path)("rope_theta", float),
            _numbers(before_local | local, path)("rope_theta", float))


def _numbers(raw, path):
    """-> number(key, kind=int, default=..., below=...): raw[key], checked to be positive and of a size that a
    model can have, and, for int, whole; with a default for a key that is null or not there."""
    def number(key, kind=int, default=..., below=2**24):
        value = raw.get(key)
        if value is None and default is not ...:
            return default
        right = type(value) in ((int,) if kind is int else (int, float))
        if not right or not 0 < value < below:
            raise UserError(f"{path}: {key} should be a positive {'whole ' * (kind is int)}number below "
                            f"{below}, and is {value!r}.")
        return kind(value)
    return number
