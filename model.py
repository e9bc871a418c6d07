"""GPT-2, written out by hand, with a seam in every attention layer at z_cat.

    z_h    = softmax(q_h k_h^T / sqrt(d_head), causal) v_h        what head h gathered, at every position
    z_cat  = [z_0 | z_1 | ... ]                                   all heads side by side: D = H*d_head numbers
    attn_out = z_cat @ W_O + b_O                                  what the layer adds to the residual stream

`attn.heads(x)` is everything before z_cat and `attn.out(z_cat)` everything after it, so reading or changing
z_cat needs no hooks: `model(tokens, edit_z={5: fn}, keep=(5,))` applies fn between the two halves of layer 5
and returns what it computed.

Weights are (d_in, d_out) and activations are rows, `y = x @ W + b`, as in GPT-2's own checkpoint, whose names
the parameters keep (Radford et al. 2019; wte, wpe, h.5.attn.c_attn, ...).

Shapes: B batch, T positions (q query/destination, k key/source), H heads, d_head, D = H*d_head (the SAE's
d_in).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import weights
from data.common import UserError, read_json


@dataclass(frozen=True)
class GPT2Config:
    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int
    d_vocab: int
    n_ctx: int              # positions that have an embedding: the longest prompt
    eps: float = 1e-5       # LayerNorm adds it to the variance

    @property
    def d_head(self):
        return self.d_model // self.n_heads


class Heads(NamedTuple):
    """The first half of an attention layer. pattern[b,h,q,k] is the weight with which query q reads key k."""
    pattern: Tensor | None  # (B,H,q,k); None unless asked for
    v: Tensor               # (B,k,H,d_head)
    z_cat: Tensor           # (B,q,D)
    q: Tensor               # (B,q,H,d_head)
    k: Tensor               # (B,k,H,d_head)


class LayerCache(NamedTuple):
    """What one layer computed. resid_pre + attn_out + mlp_out is the next layer's resid_pre."""
    resid_pre: Tensor       # (B,T,d_model)
    pattern: Tensor         # (B,H,q,k)
    q: Tensor               # (B,T,H,d_head)
    k: Tensor               # (B,T,H,d_head), one for every query head
    v: Tensor               # (B,T,H,d_head), one for every query head
    z_cat: Tensor           # (B,T,D), after the edit if there was one
    attn_out: Tensor        # (B,T,d_model), as added to the residual stream
    mlp_out: Tensor         # (B,T,d_model), as added to the residual stream
    scales: dict            # {"ln_1": (B,T,1), "ln_2": (B,T,1)}: what each norm divided by


class HeadMatrices(NamedTuple):
    """One layer's weights per head, the norm's gain and bias folded in: they read (x - mean x) / scale(x)."""
    W_Q: Tensor             # (H,d_model,d_head)
    W_K: Tensor
    W_V: Tensor
    b_Q: Tensor             # (H,d_head)
    b_K: Tensor
    b_V: Tensor


class LayerNorm(nn.Module):
    """weight * (x - mean x) / scale(x) + bias, with scale(x) = sqrt(var x + eps)."""

    def __init__(self, d_model, eps):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x):                                               # (...,d_model) -> (...,d_model)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def scale(self, x):                                                 # (...,d_model) -> (...,1)
        return (x.var(-1, unbiased=False, keepdim=True) + self.eps).sqrt()


class Linear(nn.Module):
    """x @ weight + bias, weight (d_in, d_out): GPT-2's layout, the transpose of torch's."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_in, d_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x):                                               # (...,d_in) -> (...,d_out)
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    """Causal self-attention in two halves with a seam at z_cat."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.c_attn = Linear(config.d_model, 3 * config.d_model)        # W_Q | W_K | W_V, side by side
        self.c_proj = Linear(config.d_model, config.d_model)            # W_O

    def heads(self, x, with_pattern=True):                              # (B,T,d_model), normalised -> Heads
        """Everything before z_cat. Without the pattern, fused attention gives the same z_cat and no (q,k)."""
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)       # (B,T,H,d_head) each
        if with_pattern:
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            pattern = scores.masked_fill(future, -torch.inf).softmax(-1)              # (B,H,q,k)
            z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)                           # (B,q,H,d_head)
        else:
            pattern, (q_, k_, v_) = None, (t.transpose(1, 2) for t in (q, k, v))      # (B,H,T,d_head)
            z = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True).transpose(1, 2)
        return Heads(pattern, v, z.flatten(-2), q, k)

    def out(self, z_cat):                                               # (B,T,D) -> attn_out (B,T,d_model)
        """Everything after z_cat."""
        return self.c_proj(z_cat)


class MLP(nn.Module):
    """gelu(x W_in + b_in) W_out + b_out, with the tanh form of GELU that GPT-2 was trained with."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.d_model, config.d_mlp)
        self.c_proj = Linear(config.d_mlp, config.d_model)

    def forward(self, x):                                               # (B,T,d_model) -> (B,T,d_model)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """x += attention(ln_1(x)); x += mlp(ln_2(x))."""

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(config.d_model, config.eps), Attention(config)
        self.ln_2, self.mlp = LayerNorm(config.d_model, config.eps), MLP(config)

    def forward(self, x, edit=None, keep=False):  # (B,T,d_model) -> (B,T,d_model), LayerCache or None
        heads = self.attn.heads(self.ln_1(x), with_pattern=keep)
        z_cat = heads.z_cat if edit is None else edit(heads.z_cat)
        attn_out = self.attn.out(z_cat)
        resid_mid = x + attn_out
        mlp_out = self.mlp(self.ln_2(resid_mid))
        if not keep:
            return resid_mid + mlp_out, None
        scales = {"ln_1": self.ln_1.scale(x), "ln_2": self.ln_2.scale(resid_mid)}
        cache = LayerCache(x, heads.pattern, heads.q, heads.k, heads.v, z_cat, attn_out, mlp_out, scales)
        return resid_mid + mlp_out, cache


class GPT2(nn.Module):
    """tokens -> logits. The unembedding is the token embedding (tied weights)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.d_vocab, config.d_model)
        self.wpe = nn.Embedding(config.n_ctx, config.d_model)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = LayerNorm(config.d_model, config.eps)

    def forward(self, tokens, edit_z=None, keep=()):  # (B,T) -> (B,T,d_vocab), {layer: LayerCache}
        """Logits and, for the layers in `keep`, what the layer computed.

        edit_z: {layer: function from z_cat (B,T,D) to the z_cat (B,T,D) that goes on}. A function and not a
        tensor, so that an edit of layer 6 sees what an edit of layer 5 led to.
        """
        edit_z, cache = edit_z or {}, {}
        self._check_layers([*edit_z, *keep])
        x = self.embed(tokens)
        for layer, block in enumerate(self.h):
            x, kept = block(x, edit_z.get(layer), layer in keep)
            if kept:
                cache[layer] = kept
        return self.unembed(x), cache

    def z_cat_at(self, tokens, layers):                                 # (B,T) -> {layer: (B,T,D)}
        """z_cat of some layers and nothing more: stops in the middle of the last one, builds no pattern."""
        self._check_layers(layers)
        x, found = self.embed(tokens), {}
        for layer, block in enumerate(self.h[: max(layers) + 1]):
            z_cat = block.attn.heads(block.ln_1(x), with_pattern=False).z_cat
            if layer in layers:
                found[layer] = z_cat
            if layer < max(layers):
                x = x + block.attn.out(z_cat)
                x = x + block.mlp(block.ln_2(x))
        return found

    def embed(self, tokens):                                            # (B,T) -> (B,T,d_model)
        """Token plus position embedding."""
        T = tokens.shape[1]
        if not 1 <= T <= self.config.n_ctx:
            raise UserError(f"a prompt of {T} tokens does not fit this model, which takes 1 to "
                            f"{self.config.n_ctx}; shorten it.")
        return self.wte(tokens) + self.wpe(torch.arange(T, device=tokens.device))

    def unembed(self, x):                                               # (B,T,d_model) -> (B,T,d_vocab)
        """Final norm, then the dot product with every token's embedding."""
        return F.linear(self.ln_f(x), self.wte.weight)

    @torch.no_grad()
    def value_bias(self, layer):                                        # -> (D,)
        """c = ln_1.bias @ W_V + b_V: the part of z_cat that never changes, as pattern rows sum to 1."""
        self._check_layers([layer])
        return self.head_matrices(layer).b_V.flatten()

    @torch.no_grad()
    def head_matrices(self, layer):
        """W_Q, W_K, W_V per head with ln_1's gain folded in, and their biases with ln_1's bias folded in.

        With n = (x - mean x) / scale(x):  q_h = n @ W_Q[h] + b_Q[h], and so for k and v.
        """
        self._check_layers([layer])
        norm, c_attn, H = self.h[layer].ln_1, self.h[layer].attn.c_attn, self.config.n_heads
        W = (norm.weight[:, None] * c_attn.weight).unflatten(1, (3, H, -1))           # (d_model,3,H,d_head)
        b = (norm.bias @ c_attn.weight + c_attn.bias).unflatten(0, (3, H, -1))        # (3,H,d_head)
        return HeadMatrices(*W.permute(1, 2, 0, 3), *b)

    def _check_layers(self, layers):
        for layer in layers:
            if not 0 <= layer < self.config.n_layers:
                raise UserError(f"layer {layer} is out of range: this model has layers 0 to "
                                f"{self.config.n_layers - 1}.")


def load(name_or_dir, device="cpu", dtype=torch.float32):
    """"tiny" (shipped), or a directory in Hugging Face layout (config.json, *.safetensors) -> GPT2.

    Strict: every tensor in the files is used or known to carry nothing, every parameter is found, every shape
    is checked. Raises UserError, naming the file, if something is missing, damaged or not of a kind this
    module implements.
    """
    folder = weights.find(name_or_dir)
    config = gpt2_config(read_json(folder / "config.json"), folder)
    with torch.device("meta"):  # no memory yet: the weights are put in one by one
        model = GPT2(config)
    weights.load_into(model, folder, gpt2_name, device, dtype)
    return model.eval().requires_grad_(False)


def gpt2_config(raw, folder):
    """Hugging Face's config.json -> GPT2Config. Raises UserError for an option that is not implemented."""
    implemented = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
                   "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
                   "tie_word_embeddings": True}
    for key, value in implemented.items():
        if raw.get(key, value) != value:
            raise UserError(f"{folder}/config.json: {key} {raw[key]!r} is not supported, only {value!r}.")
    sizes = {key: weights.positive_int(raw, key, folder)
             for key in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")}
    if sizes["n_embd"] % sizes["n_head"]:
        raise UserError(f"{folder}/config.json: n_embd {sizes['n_embd']} is not a multiple of n_head "
                        f"{sizes['n_head']}.")
    d_mlp = weights.positive_int(raw, "n_inner", folder) if raw.get("n_inner") else 4 * sizes["n_embd"]
    return GPT2Config(sizes["n_layer"], sizes["n_head"], sizes["n_embd"], d_mlp, sizes["vocab_size"],
                      sizes["n_positions"],
                      raw.get("layer_norm_epsilon", 1e-5))


def gpt2_name(name):
    """A checkpoint's tensor name -> our parameter's name, or None for a tensor that carries no weight of its
    own."""
    name = name.removeprefix("transformer.")
    # tied; the causal mask
    if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    return name
