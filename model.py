"""GPT-2 and Gemma, written out by hand, with a seam in every attention layer at z_cat.

    z_h    = softmax(scale * q_h k_h^T, causal) v_h               what head h gathered, at every position
    z_cat  = [z_0 | z_1 | ... ]                                   all heads side by side: D = H*d_head numbers
    attn_out = z_cat @ W_O + b_O                                  what the layer adds to the residual stream

`heads(x)` is everything before z_cat and `rest(x, z_cat)` everything after it, so reading or changing z_cat
needs no hooks: `model(tokens, edit_z={5: fn}, keep=(5,))` applies fn between the two halves of layer 5 and
returns what it computed.

Weights are (d_in, d_out) and activations are rows, `y = x @ W + b`, as in GPT-2's own checkpoint; Gemma's are
transposed once, at load. Parameters keep the checkpoint's names (Radford et al. 2019; Gemma Team 2024, 2025).

Shapes: B batch, T positions (q query/destination, k key/source), H heads, G heads of keys and values (Gemma;
each serves H/G heads in a row), d_head, D = H*d_head (the SAE's d_in).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import weights
from data.common import UserError, fast_bfloat16
from data.layout import read_config


class Heads(NamedTuple):
    """The first half of an attention layer. pattern[b,h,q,k] is the weight with which query q reads key k."""
    pattern: Tensor | None  # (B,H,q,k); None unless asked for
    v: Tensor               # (B,k,H,d_head), one for every query head
    z_cat: Tensor           # (B,q,D)
    q: Tensor               # (B,q,H,d_head), as they enter the score
    k: Tensor               # (B,k,H,d_head), as they enter the score, one for every query head


class LayerCache(NamedTuple):
    """What one layer computed. resid_pre + attn_out + mlp_out is the next layer's resid_pre."""
    resid_pre: Tensor       # (B,T,d_model)
    pattern: Tensor         # (B,H,q,k)
    q: Tensor               # (B,T,H,d_head)
    k: Tensor               # (B,T,H,d_head)
    v: Tensor               # (B,T,H,d_head)
    z_cat: Tensor           # (B,T,D), after the edit if there was one
    attn_out: Tensor        # (B,T,d_model), as added to the residual stream
    mlp_out: Tensor         # (B,T,d_model), as added to the residual stream
    scales: dict            # what each norm divided by: "attn_in" and "mlp_in" (B,T,1); in Gemma 2 and 3 also
                            # "attn_out" and "mlp_out" (B,T,1); in Gemma 3 also "q" and "k" (B,T,H,1)


class HeadMatrices(NamedTuple):
    """One layer's weights per head, with the norms' gains, biases and centring folded in; at least float32.

    With x = resid_pre: v_h = (x / scales["attn_in"]) @ W_V[h] + b_V[h], and so for q and k, which are then
    divided by their own scales, if they have any, and rotated (`model.rotate`).
    attn_out = (sum_h z_h @ W_O[h] + b_O) / scales["attn_out"], if it has that scale.
    """
    W_Q: Tensor             # (H,d_model,d_head)
    W_K: Tensor
    W_V: Tensor
    b_Q: Tensor             # (H,d_head)
    b_K: Tensor
    b_V: Tensor
    W_O: Tensor             # (H,d_head,d_model)
    b_O: Tensor             # (d_model,)


class Linear(nn.Module):
    """x @ weight + bias, weight (d_in, d_out): GPT-2's layout, the transpose of torch's."""

    def __init__(self, d_in, d_out, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_in, d_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x):                                               # (...,d_in) -> (...,d_out)
        return F.linear(x, self.weight.T, self.bias)


def attend(q, k, v, scale, window=None, cap=None, with_pattern=True):   # (B,T,H,d_head) each -> Heads
    """Every head's pattern and what it gathers: z = softmax(scale * q k^T over the keys up to the query) v.

    window: a query sees the last `window` keys, its own among them; None: all up to and including its own.
    cap: scores become cap * tanh(score / cap), before the mask. Without the pattern, and with no cap, fused
    attention gives the same z_cat and builds no (q,k) tensor.
    """
    T = q.shape[1]
    if not with_pattern and not cap:
        mask = None if window is None or window >= T else visible(T, window, q.device)
        by_head = (t.transpose(1, 2) for t in (q, k, v))                              # (B,H,T,d_head)
        z = F.scaled_dot_product_attention(*by_head, attn_mask=mask, is_causal=mask is None, scale=scale)
        return Heads(None, v, z.transpose(1, 2).flatten(-2), q, k)
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible(T, window, q.device), -torch.inf)
    pattern = scores.softmax(-1, dtype=wide(scores)).to(v.dtype)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)                                   # (B,q,H,d_head)
    return Heads(pattern, v, z.flatten(-2), q, k)


def visible(T, window, device):                                         # -> (q,k) bool
    """Which keys a query may see: not later than itself, and not further back than the window."""
    ago = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    return (ago >= 0) & (ago < (window or T))


def wide(x):
    """float32, or float64 for a float64 tensor: the type in which norms and softmax are computed."""
    return torch.promote_types(x.dtype, torch.float32)


class Transformer(nn.Module):
    """What GPT-2 and Gemma share: the way through the layers, with the seam. A subclass has `config`,
    `blocks`, `embed_parts`, `unembed`, `final_scale`, `logit_directions`, `head_matrices` and `rotate`; a
    block has `heads` and `rest`."""

    def forward(self, tokens, edit_z=None, keep=()):  # (B,T) -> (B,T,d_vocab), {layer: LayerCache}
        """Logits and, for the layers in `keep`, what the layer computed.

        edit_z: {layer: function from z_cat (B,T,D) to the z_cat (B,T,D) that goes on}. A function and not a
        tensor, so that an edit of layer 6 sees what an edit of layer 5 led to.
        """
        x, cache = self.through(self.embed(tokens), edit_z, keep)
        return self.unembed(x), cache

    def through(self, x, edit_z=None, keep=(), layers=None):  # (B,T,d_model) -> the same, {layer: LayerCache}
        """The way through `layers` (consecutive; all of them if None): from the residual stream before the
        first of them to the one after the last."""
        edit_z, cache = edit_z or {}, {}
        layers = range(self.config.n_layers) if layers is None else layers
        self.check_layers([*edit_z, *keep, *layers])
        for layer in layers:
            block = self.blocks[layer]
            heads = block.heads(x, with_pattern=layer in keep)
            z_cat = edit_z[layer](heads.z_cat) if layer in edit_z else heads.z_cat
            attn_out, mlp_out, scales = block.rest(x, z_cat, with_scales=layer in keep)
            if layer in keep:
                cache[layer] = LayerCache(x, heads.pattern, heads.q, heads.k, heads.v, z_cat, attn_out,
                                          mlp_out, scales)
            x = x + attn_out + mlp_out
        return x, cache

    def layer_by_layer(self, tokens, depth=None):                       # (B,T) -> (layer, LayerCache), ...
        """What the first `depth` layers (None: all) compute, in turn, so that one cache is held at a time."""
        x = self.embed(tokens)
        for layer in range(self.config.n_layers if depth is None else depth):
            x, cache = self.through(x, keep=(layer,), layers=(layer,))
            yield layer, cache[layer]

    def z_cat_at(self, tokens, layers, edit_z=None):                    # (B,T) -> {layer: (B,T,D)}
        """z_cat of some layers and nothing more: stops in the middle of the last one, builds no pattern."""
        edit_z = edit_z or {}
        self.check_layers([*edit_z, *layers])
        x, found = self.embed(tokens), {}
        for layer, block in enumerate(self.blocks[: max(layers, default=-1) + 1]):
            z_cat = block.heads(x, with_pattern=False).z_cat
            z_cat = edit_z[layer](z_cat) if layer in edit_z else z_cat
            if layer in layers:
                found[layer] = z_cat
            if layer < max(layers):
                attn_out, mlp_out, _ = block.rest(x, z_cat)
                x = x + attn_out + mlp_out
        return found

    @torch.no_grad()
    def z_cat_fast(self, tokens, layers):                               # (B,T) -> {layer: (B,T,D)} float32
        """z_cat_at with products in bfloat16 where that is faster; the residual stream stays float32."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=fast_bfloat16(tokens.device)):
            return {layer: z.float() for layer, z in self.z_cat_at(tokens, layers).items()}

    def embed(self, tokens):                                            # (B,T) -> (B,T,d_model)
        """The residual stream before layer 0."""
        return sum(self.embed_parts(tokens).values())

    @torch.no_grad()
    def value_bias(self, layer):                                        # -> (D,)
        """c = ln_1.bias @ W_V + b_V: the part of z_cat that never changes, as pattern rows sum to 1. Gemma
        has none."""
        return self.head_matrices(layer).b_V.flatten()

    def check_layers(self, layers):
        """Raise UserError for a layer that the model does not have."""
        for layer in layers:
            if not 0 <= layer < self.config.n_layers:
                raise UserError(f"layer {layer} is out of range: this model has layers 0 to "
                                f"{self.config.n_layers - 1}.")

    def check_length(self, T):
        """Raise UserError for a prompt that is empty or longer than the model was trained for."""
        if not 1 <= T <= self.config.n_ctx:
            raise UserError(f"a prompt of {T} tokens does not fit this model, which takes 1 to "
                            f"{self.config.n_ctx}; shorten it.")


# ---- GPT-2 ----


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

    @property
    def score_scale(self):
        """What q . k is multiplied by."""
        return self.d_head**-0.5


class LayerNorm(nn.Module):
    """weight * (x - mean x) / scale(x) + bias, with scale(x) = sqrt(var x + eps)."""

    def __init__(self, d_model, eps):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x):                                               # (...,d_model) -> (...,d_model)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def scale(self, x):                                                 # (...,d_model) -> (...,1)
        return (x.to(wide(x)).var(-1, unbiased=False, keepdim=True) + self.eps).sqrt()


class Attention(nn.Module):
    """Causal self-attention in two halves with a seam at z_cat."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.score_scale = config.n_heads, config.score_scale
        self.c_attn = Linear(config.d_model, 3 * config.d_model)        # W_Q | W_K | W_V, side by side
        self.c_proj = Linear(config.d_model, config.d_model)            # W_O

    def heads(self, x, with_pattern=True):                              # (B,T,d_model), normalised -> Heads
        """Everything before z_cat."""
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)       # (B,T,H,d_head) each
        return attend(q, k, v, self.score_scale, with_pattern=with_pattern)

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

    def heads(self, x, with_pattern=True):                              # resid_pre (B,T,d_model) -> Heads
        return self.attn.heads(self.ln_1(x), with_pattern)

    def rest(self, x, z_cat, with_scales=False):  # (B,T,d_model), (B,T,D) -> attn_out, mlp_out, scales | None
        attn_out = self.attn.out(z_cat)
        resid_mid = x + attn_out
        mlp_out = self.mlp(self.ln_2(resid_mid))
        if not with_scales:
            return attn_out, mlp_out, None
        return attn_out, mlp_out, {"attn_in": self.ln_1.scale(x), "mlp_in": self.ln_2.scale(resid_mid)}


class GPT2(Transformer):
    """tokens -> logits. The unembedding is the token embedding (tied weights)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.d_vocab, config.d_model)
        self.wpe = nn.Embedding(config.n_ctx, config.d_model)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = LayerNorm(config.d_model, config.eps)

    @property
    def blocks(self):
        return self.h

    def embed_parts(self, tokens):                                      # (B,T) -> {name: (B,T,d_model)}
        """What the residual stream begins with: token and position embedding."""
        self.check_length(tokens.shape[1])
        positions = self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        return {"embedding": self.wte(tokens), "position": positions.expand(len(tokens), -1, -1)}

    def unembed(self, x):                                               # (B,T,d_model) -> (B,T,d_vocab)
        """Final norm, then the dot product with every token's embedding."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def final_scale(self, x):                                           # (...,d_model) -> (...,1)
        """What the final norm divides by."""
        return self.ln_f.scale(x)

    @torch.no_grad()
    def logit_directions(self, tokens):                                 # (...) -> (...,d_model)
        """What a token's logit, less the mean over all tokens, reads from the stream: (x / final_scale(x)) .
        direction, plus a constant. The norm's gain and centring are folded in."""
        wte = self.wte.weight.to(wide(self.wte.weight))
        direction = self.ln_f.weight * (wte[tokens] - wte.mean(0))
        return direction - direction.mean(-1, keepdim=True)

    @torch.no_grad()
    def head_matrices(self, layer):                                     # -> HeadMatrices
        """(x - mean x) * gain @ W = x @ (gain * W, less the mean of each column): centring is a matrix
        too."""
        self.check_layers([layer])
        norm, attn, H = self.h[layer].ln_1, self.h[layer].attn, self.config.n_heads
        parameters = (norm.weight, norm.bias, *attn.c_attn.parameters(), *attn.c_proj.parameters())
        gain, bias, c_weight, c_bias, W_O, b_O = (parameter.to(wide(parameter)) for parameter in parameters)
        W = gain[:, None] * c_weight                                                  # (d_model,3*D)
        W = (W - W.mean(0)).unflatten(1, (3, H, -1)).permute(1, 2, 0, 3)              # (3,H,d_model,d_head)
        b = (bias @ c_weight + c_bias).unflatten(0, (3, H, -1))                       # (3,H,d_head)
        return HeadMatrices(*W, *b, W_O.unflatten(0, (H, -1)), b_O)

    def rotate(self, x, layer, positions=None):                         # (B,T,H,d_head) -> the same
        """Queries and keys enter the score as they are: positions came with the embedding."""
        return x


# ---- Gemma ----


@dataclass(frozen=True)
class GemmaConfig:
    n_layers: int
    n_heads: int
    n_kv_heads: int         # heads of keys and values: 1 in Gemma 1 2B, half of n_heads in Gemma 2
    d_model: int
    d_head: int             # its own setting: n_heads * d_head need not be d_model
    d_mlp: int
    d_vocab: int
    n_ctx: int              # the longest prompt
    eps: float              # RMSNorm adds it to the mean square
    score_scale: float      # what q . k is multiplied by: query_pre_attn_scalar^-0.5
    windows: tuple          # per layer: how many keys a query sees, its own included; None: all up to its own
    thetas: tuple           # per layer: the base of the rotation's wave lengths
    score_cap: float | None     # soft cap of the scores (Gemma 2)
    logit_cap: float | None     # soft cap of the logits (Gemma 2)
    post_norms: bool        # a norm after attention and after the MLP as well (Gemma 2, 3)
    qk_norm: bool           # a norm of every query and key (Gemma 3)


class RMSNorm(nn.Module):
    """(1 + weight) * x / scale(x), with scale(x) = sqrt(mean x^2 + eps), in float32."""

    def __init__(self, d_model, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(d_model)), eps

    def forward(self, x):                                               # (...,d_model) -> (...,d_model)
        gain = 1 + self.weight.to(wide(x))
        return (x.to(wide(x)) / self.scale(x) * gain).to(x.dtype)

    def scale(self, x):                                                 # (...,d_model) -> (...,1)
        return (x.to(wide(x)).square().mean(-1, keepdim=True) + self.eps).sqrt()


def rotate(x, theta, positions=None):                                   # (B,T,H,d_head) -> the same
    """Rotary position embedding (Su et al. 2021): at position t, the pair of dimensions i and i + d_head/2
    turns by t / theta^(2i / d_head), so that q . k depends on the distance of the two positions.

    positions (T,): those of x along its second dimension, 0 to T-1 if not given.
    """
    half = x.shape[-1] // 2
    number = lambda n: torch.arange(n, dtype=torch.float32, device=x.device)
    positions = number(x.shape[1]) if positions is None else positions.float()
    angle = positions[:, None, None] * (1 / theta ** (number(half) / half))           # (T,1,half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class GemmaAttention(nn.Module):
    """Attention with rotary positions, in which H/G heads in a row share a key and a value. No biases."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.window, self.theta = config, config.windows[layer], config.thetas[layer]
        D, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.q_proj = Linear(config.d_model, D, bias=False)
        self.k_proj = Linear(config.d_model, kv, bias=False)
        self.v_proj = Linear(config.d_model, kv, bias=False)
        self.o_proj = Linear(D, config.d_model, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.d_head, config.eps)
            self.k_norm = RMSNorm(config.d_head, config.eps)

    def qkv(self, x):                                                   # (B,T,d_model) -> (B,T,H,d_head) each
        """Queries, keys and values before norm and rotation, one of each for every query head."""
        shared = self.config.n_heads // self.config.n_kv_heads
        q, k, v = (proj(x).unflatten(-1, (-1, self.config.d_head))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)

    def heads(self, x, with_pattern=True):                              # (B,T,d_model), normalised -> Heads
        """Everything before z_cat."""
        q, k, v = self.qkv(x)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return attend(rotate(q, self.theta), rotate(k, self.theta), v, self.config.score_scale, self.window,
                      self.config.score_cap, with_pattern)

    def out(self, z_cat):                                               # (B,T,D) -> (B,T,d_model)
        """Everything after z_cat, up to the norm that Gemma 2 and 3 put behind it."""
        return self.o_proj(z_cat)


class GemmaMLP(nn.Module):
    """(gelu(x W_gate) * x W_up) W_down, GELU in its tanh form."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_mlp, bias=False)
        self.up_proj = Linear(config.d_model, config.d_mlp, bias=False)
        self.down_proj = Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, x):                                               # (B,T,d_model) -> (B,T,d_model)
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaBlock(nn.Module):
    """x += post(attention(pre(x))); x += post(mlp(pre(x))), each with its own norms. Gemma 1 has no
    post-norms (and calls the second pre-norm post_attention_layernorm, renamed at load)."""

    def __init__(self, config, layer):
        super().__init__()
        norm = lambda there=True: RMSNorm(config.d_model, config.eps) if there else None
        self.self_attn, self.mlp = GemmaAttention(config, layer), GemmaMLP(config)
        self.input_layernorm, self.pre_feedforward_layernorm = norm(), norm()
        self.post_attention_layernorm = norm(config.post_norms)
        self.post_feedforward_layernorm = norm(config.post_norms)

    def heads(self, x, with_pattern=True):                              # resid_pre (B,T,d_model) -> Heads
        return self.self_attn.heads(self.input_layernorm(x), with_pattern)

    def rest(self, x, z_cat, with_scales=False):  # (B,T,d_model), (B,T,D) -> attn_out, mlp_out, scales | None
        attn_raw = self.self_attn.out(z_cat)
        attn_out = self.post_attention_layernorm(attn_raw) if self.post_attention_layernorm else attn_raw
        resid_mid = x + attn_out
        mlp_raw = self.mlp(self.pre_feedforward_layernorm(resid_mid))
        mlp_out = self.post_feedforward_layernorm(mlp_raw) if self.post_feedforward_layernorm else mlp_raw
        return attn_out, mlp_out, self.scales(x, attn_raw, resid_mid, mlp_raw) if with_scales else None

    def scales(self, x, attn_raw, resid_mid, mlp_raw):
        """What each norm divided by, for LayerCache."""
        found = {"attn_in": self.input_layernorm.scale(x),
                 "mlp_in": self.pre_feedforward_layernorm.scale(resid_mid)}
        if self.post_attention_layernorm:
            found |= {"attn_out": self.post_attention_layernorm.scale(attn_raw),
                      "mlp_out": self.post_feedforward_layernorm.scale(mlp_raw)}
        if self.self_attn.config.qk_norm:
            q, k, _ = self.self_attn.qkv(self.input_layernorm(x))
            found |= {"q": self.self_attn.q_norm.scale(q), "k": self.self_attn.k_norm.scale(k)}
        return found


class Gemma(Transformer):
    """Gemma 1, 2 and the text models of Gemma 3: tokens -> logits. The unembedding is the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.d_vocab, config.d_model)
        self.layers = nn.ModuleList(GemmaBlock(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.eps)

    @property
    def blocks(self):
        return self.layers

    def embed_parts(self, tokens):                                      # (B,T) -> {name: (B,T,d_model)}
        """Token embedding times sqrt(d_model), a factor that Gemma rounds to the weights' type."""
        self.check_length(tokens.shape[1])
        x = self.embed_tokens(tokens)
        return {"embedding": x * torch.tensor(self.config.d_model**0.5, dtype=x.dtype, device=x.device)}

    def unembed(self, x):                                               # (B,T,d_model) -> (B,T,d_vocab)
        """Final norm, the dot product with every token's embedding, and the soft cap if there is one."""
        logits, cap = F.linear(self.norm(x), self.embed_tokens.weight), self.config.logit_cap
        return cap * torch.tanh(logits / cap) if cap else logits

    def final_scale(self, x):                                           # (...,d_model) -> (...,1)
        """What the final norm divides by."""
        return self.norm.scale(x)

    @torch.no_grad()
    def logit_directions(self, tokens):                                 # (...) -> (...,d_model)
        """What a token's logit before the soft cap, less the mean over all tokens, reads from the stream:
        (x / final_scale(x)) . direction. The norm's gain is folded in."""
        embed = self.embed_tokens.weight.to(wide(self.embed_tokens.weight))
        return (1 + self.norm.weight) * (embed[tokens] - embed.mean(0))

    @torch.no_grad()
    def head_matrices(self, layer):                                     # -> HeadMatrices
        """RMSNorm has a gain of 1 + weight, no centring and no bias; a shared key or value is repeated."""
        self.check_layers([layer])
        config, block, attn = self.config, self.layers[layer], self.layers[layer].self_attn
        precise = lambda parameter: parameter.to(wide(parameter))
        gain = 1 + precise(block.input_layernorm.weight)

        def per_head(proj, norm=None):                                  # -> (H,d_model,d_head)
            W = (gain[:, None] * precise(proj.weight)).unflatten(1, (-1, config.d_head)).transpose(0, 1)
            W = W.repeat_interleave(config.n_heads // len(W), 0)
            return W * (1 + precise(norm.weight)) if norm else W

        q_norm, k_norm = (attn.q_norm, attn.k_norm) if config.qk_norm else (None, None)
        W_O, post = precise(attn.o_proj.weight), block.post_attention_layernorm
        W_O = W_O * (1 + precise(post.weight)) if post else W_O
        none = gain.new_zeros(config.n_heads, config.d_head)
        return HeadMatrices(per_head(attn.q_proj, q_norm), per_head(attn.k_proj, k_norm),
                            per_head(attn.v_proj), none, none, none,
                            W_O.unflatten(0, (config.n_heads, -1)), gain.new_zeros(config.d_model))

    def rotate(self, x, layer, positions=None):                         # (B,T,H,d_head) -> the same
        """The rotation by which queries and keys of this layer know their position; see `rotate`."""
        return rotate(x, self.config.thetas[layer], positions)


# ---- loading ----


def load(name_or_dir, device="cpu", dtype=torch.float32):
    """"tiny" (shipped), a published name ("gpt2", "gemma-2-2b" ...: data/weights.py), or a directory in
    Hugging Face layout (config.json, *.safetensors) -> GPT2 or Gemma, in eval mode, without gradients.

    Strict: every tensor in the files is used or known to carry nothing, every parameter is found, every shape
    is checked. Takes no more memory than the model and its largest tensor. Raises UserError, naming the file,
    if something is missing, damaged, cannot be fetched or is not of a kind this module implements.
    """
    kind, settings, layout = read_config(weights.find_config(name_or_dir))
    with torch.device("meta"):  # no memory yet: the weights are put in one by one
        model = Gemma(GemmaConfig(**settings)) if kind == "gemma" else GPT2(GPT2Config(**settings))
    weights.load_into(model, name_or_dir, layout, device, dtype)
    return model.eval().requires_grad_(False)
