"""GPT-2 and Gemma, written out by hand, with a seam in every attention layer at z_cat.

    z_h      = softmax(scale * q_h k_h^T, causal) v_h       what head h gathers, at every position
    z_cat    = [z_0 | z_1 | ... ]                           all heads side by side: D numbers
    attn_out = z_cat @ W_O + b_O                            what attention adds to the stream

(Gemma rotates q and k, and Gemma 2 and 3 normalise z_cat @ W_O before it is added.) A block
computes everything up to z_cat in `heads` and everything after it in `after_heads`, so reading or
changing z_cat needs no hooks:

    logits, cache = model(tokens, edit_z={5: fn}, keep=(5,))

applies fn to the z_cat of layer 5 and returns what layer 5 computed. `edit_mlp` is the same seam
after an MLP. (`run` and `rerun`, which a first reading skips, do the same for many edits of one
run, and compute only what an edit changes.)

Read GPT-2 first, and `load_model` after it. Gemma, which comes last, has the same structure with
different parts.

Weights are (d_in, d_out) and activations are rows, `y = x @ W + b`, as in GPT-2's own checkpoint;
Gemma's are transposed once, at load. Parameters keep the checkpoint's names, with one exception in
Gemma 1. The models are those of Radford et al. 2019 and of the Gemma Team 2024, 2025.

Shapes: B batch, T positions (q query/destination, k key/source), H heads, d_head, D = H*d_head.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import weights
from data.errors import UserError
from data.hf_config import read_config
from data.machine import fast_bfloat16

# ---- attention ----


class Heads(NamedTuple):
    """What an attention layer computes up to z_cat. Where heads share a key and a value (Gemma),
    these are repeated. (In `Transformer.rerun` queries are fewer than keys: q < k.)"""
    pattern: Tensor | None  # (B,H,q,k): how much query q reads from key k; None if not computed
    q: Tensor               # (B,q,H,d_head) as it enters the score, after Gemma's rotation
    k: Tensor               # (B,k,H,d_head) the same
    v: Tensor               # (B,k,H,d_head)
    z_cat: Tensor           # (B,q,D)


def attend(q, k, v, scale, window=None, softcap=None, with_pattern=True, positions=None):
    """Every head's pattern, and what it gathers: z = softmax(scale * q k^T, causal) v -> Heads.

    q: (B,q,H,d_head); k, v: (B,k,H,d_head). window: a query sees the last `window` keys, its own
    among them; None: all keys up to its own. softcap: scores become softcap * tanh(score /
    softcap), before the mask. positions (B,q): where among the keys each query stands; None where
    there are as many queries as keys.

    with_pattern=False: fused attention, which builds no scores; the pattern is None. It rounds
    differently, so that logits may depend on it in their last digit. It knows no soft cap: with
    one, scores and pattern are computed in any case.
    """
    n_keys = k.shape[1]
    if not with_pattern and not softcap:
        is_plain = positions is None and (window is None or window >= n_keys)
        mask = None if is_plain else causal_mask(n_keys, window, q.device, positions)
        q_by_head, k_by_head, v_by_head = (t.transpose(1, 2) for t in (q, k, v))  # (B,H,T,d_head)
        z = F.scaled_dot_product_attention(q_by_head, k_by_head, v_by_head, attn_mask=mask,
                                           is_causal=is_plain, scale=scale)
        return Heads(None, q, k, v, z_cat=z.transpose(1, 2).flatten(-2))
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~causal_mask(n_keys, window, q.device, positions), -torch.inf)
    pattern = scores.softmax(-1, dtype=wide_dtype(scores)).to(v.dtype)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)                     # (B,q,H,d_head)
    return Heads(pattern, q, k, v, z_cat=z.flatten(-2))


def causal_mask(n_keys, window, device, positions=None):    # -> (q,k) or (B,1,q,k) bool
    """True where a query may see a key: not after itself, and not further back than the window.

    positions (B,q): those of the queries, if they are not all of 0 to n_keys-1.
    """
    key = torch.arange(n_keys, device=device)
    query = key if positions is None else positions[:, None]            # (B,1,q): for every head
    distance = query[..., None] - key                                   # from the key to the query
    return (distance >= 0) & (distance < (window or n_keys))


def wide_dtype(x):
    """The type in which norms and softmax are computed: float32, or float64 for a float64 x."""
    return torch.promote_types(x.dtype, torch.float32)


def precise(parameter):
    """A parameter in float32 at least, so that bfloat16 weights do not cost further digits."""
    return parameter.to(wide_dtype(parameter))


# ---- what GPT-2 and Gemma share ----


class LayerCache(NamedTuple):
    """What one layer computed. (In `Transformer.rerun` only k and v have all T positions; the rest
    has those that are computed anew.)"""
    resid_pre: Tensor       # (B,T,d_model) the residual stream that the layer reads
    pattern: Tensor         # (B,H,q,k)
    q: Tensor               # (B,T,H,d_head) as it enters the score, after Gemma's rotation
    k: Tensor               # (B,T,H,d_head) the same
    v: Tensor               # (B,T,H,d_head)
    z_cat: Tensor           # (B,T,D), after the edit if there was one
    attn_out: Tensor        # (B,T,d_model), as added to the residual stream
    mlp_in: Tensor          # (B,T,d_model) what the MLP reads, its norm applied
    mlp_out: Tensor         # (B,T,d_model), as added to the residual stream
    scales: dict            # what each norm divided by, (B,T,1): "attn_in" and "mlp_in"; in Gemma 2
                            # and 3 also "attn_out" and "mlp_out"; in Gemma 3 "q" and "k" (B,T,H,1)

    @property
    def resid_post(self):
        """(B,T,d_model) the residual stream after the layer: the next one's resid_pre."""
        return self.resid_pre + self.attn_out + self.mlp_out


class AfterHeads(NamedTuple):
    """What a layer computes after z_cat: the fields of LayerCache."""
    attn_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor
    scales: dict | None     # None if not asked for


def as_layer_cache(resid_pre, heads, z_cat, after):         # -> LayerCache
    """Put together from `Heads`, z_cat as it was after edits, and `AfterHeads`."""
    return LayerCache(resid_pre, heads.pattern, heads.q, heads.k, heads.v, z_cat, after.attn_out,
                      after.mlp_in, after.mlp_out, after.scales)


class Transformer(nn.Module):
    """A stack of blocks with the seam at z_cat.

    A subclass has `blocks`, each with `heads` (attention up to z_cat) and `after_heads` (the rest
    of the layer, and the scales by which its norms divide), and says how the residual stream begins
    (`embed_parts`, whose names are kinds in attribution.py) and ends (`unembed`, `final_scale`,
    `logit_directions`, `logit_constants`). For attribution.py it takes itself apart:
    `head_matrices`, `rotate` and `mlp_directions`, with the norm's gain in them. Its config has
    n_layers, n_heads, n_kv_heads, d_head, d_model, n_ctx, d_vocab and score_scale, and `windows`
    where some layers see only so far.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Embeddings are often padded to a round number of rows. Rows from n_tokens on are no
        # tokens: they have logits, but no part in means over tokens, effects and ranks.
        self.n_tokens = config.d_vocab                      # until `data.tokens.set_n_tokens`

    def forward(self, tokens, edit_z=None, keep=(), edit_mlp=None):
        """Logits and, for the layers in `keep`, what the layer computed: (B,T) -> (B,T,d_vocab),
        {layer: LayerCache}.

        edit_z: {layer: function from z_cat (B,T,D) to the z_cat (B,T,D) that goes on}. A function
        and not a tensor, so that an edit of layer 6 sees what an edit of layer 5 led to. edit_mlp:
        {layer: function from mlp_in and mlp_out, (B,T,d_model) each, to the mlp_out that goes on}.
        Keeping a layer switches fused attention off there, so that logits may differ in the last
        digit from a run without `keep`: see `attend`.
        """
        x, cache = self.run_layers(self.embed(tokens), edit_z, keep, edit_mlp=edit_mlp)
        return self.unembed(x), cache

    def run_layers(self, x, edit_z=None, keep=(), layers=None, edit_mlp=None):
        """Run consecutive layers, all of them if `layers` is None: residual stream in and out.

        (B,T,d_model) -> (B,T,d_model), {layer: LayerCache} of those in `keep`.
        """
        edit_z = edit_z or {}
        edit_mlp = edit_mlp or {}
        layers = range(self.config.n_layers) if layers is None else layers
        self.check_layers([*edit_z, *edit_mlp, *keep, *layers])
        cache = {}
        for layer in layers:
            block = self.blocks[layer]
            heads = block.heads(x, with_pattern=layer in keep)
            z_cat = heads.z_cat
            if layer in edit_z:
                z_cat = edit_z[layer](z_cat)
            after = block.after_heads(x, z_cat, layer in keep, edit_mlp.get(layer))
            if layer in keep:
                cache[layer] = as_layer_cache(x, heads, z_cat, after)
            x = x + after.attn_out + after.mlp_out
        return x, cache

    @torch.no_grad()
    def generate(self, tokens, n, temperature=0.0, generator=None, edit_z=None, edit_mlp=None):
        """Rows continued by n tokens, one at a time, (B,T) -> (B,T+n).

        temperature: of what is drawn from, softmax(logits / temperature); 0 takes the most likely
        token. generator: for the draw, on the model's device. edit_z, edit_mlp: as in `forward`;
        they see the whole row each time, as long as it is then (`sae.clamp` without `where` means
        every position of it but 0). Raises UserError if it gets too long for this model.
        """
        self.check_length(tokens.shape[1] + n)
        for _ in range(n):
            x, _ = self.run_layers(self.embed(tokens), edit_z, edit_mlp=edit_mlp)
            logits = self.unembed(x[:, -1])[:, :self.n_tokens].float()      # (B,n_tokens)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)                       # (B,1)
            else:
                p = (logits / temperature).softmax(-1)
                new = torch.multinomial(p, 1, generator=generator)
            tokens = torch.cat([tokens, new], 1)
        return tokens

    @torch.no_grad()
    def run(self, tokens, edit_z=None):                     # (B,T) -> Run
        """A run, with edits as in `forward`, and with all that `rerun` takes from it."""
        edit_z = edit_z or {}
        self.check_layers(edit_z)
        resid_pre, keys, values, z_of_layer = [], [], [], []
        x = self.embed(tokens)
        n_sharing = self.config.n_heads // self.config.n_kv_heads
        for layer, block in enumerate(self.blocks):
            heads = block.heads(x, with_pattern=False)
            z_cat = heads.z_cat
            if layer in edit_z:
                z_cat = edit_z[layer](z_cat)
            resid_pre.append(x)
            keys.append(heads.k[:, :, ::n_sharing].clone())
            values.append(heads.v[:, :, ::n_sharing].clone())
            z_of_layer.append(z_cat)
            after = block.after_heads(x, z_cat)
            x = x + after.attn_out + after.mlp_out
        return Run(tokens, resid_pre, keys, values, z_of_layer, x)

    @torch.no_grad()
    def rerun(self, run, rows, positions, edit_z=None, tokens=None):    # -> (B,S,d_model)
        """Rows of a run once more, with edits or with other tokens at some positions -> the stream
        after the last layer, at these positions.

        Only they are computed, with the keys and values of all others as they were. That equals
        the whole run if the positions of a row have in them whatever is changed, and whatever comes
        after the first change and is seen by a later one of them: all from the first change to the
        last position of interest, as `span` gives them, or fewer if heads cannot see the others.

        rows (B,): of the run; one may come several times. positions (B,S): S of each row, one of
        which may come several times too. edit_z: as in `forward`, functions of z_cat of whole rows
        (B,T,D), which may change nothing at other positions. tokens (B,T): what the rows are now.
        """
        for _, kept in self.rerun_caches(run, rows, positions, edit_z, tokens, with_pattern=False):
            pass
        return kept.resid_post

    @torch.no_grad()
    def rerun_caches(self, run, rows, positions, edit_z=None, tokens=None, with_pattern=True):
        """What the layers compute in a `rerun`, one after the other: (layer, LayerCache), ... from
        the first that differs. Without pattern there are no scales either."""
        edit_z = edit_z or {}
        self.check_layers(edit_z)
        of_batch = torch.arange(len(rows), device=positions.device)[:, None]
        if tokens is None:
            first = min(edit_z, default=0)
            x = run.resid_pre[first][rows[:, None], positions]          # (B,S,d_model)
        else:
            first = 0
            x = self.embed(tokens)[of_batch, positions]
        for layer in range(first, self.config.n_layers):
            block = self.blocks[layer]
            within = Within(positions, run.k[layer][rows], run.v[layer][rows])
            heads = block.heads(x, with_pattern, within)
            z_cat = heads.z_cat
            if layer in edit_z:
                whole = run.z_cat[layer][rows]                          # a copy
                whole[of_batch, positions] = z_cat
                z_cat = edit_z[layer](whole)[of_batch, positions]
            after = block.after_heads(x, z_cat, with_scales=with_pattern)
            kept = as_layer_cache(x, heads, z_cat, after)
            yield layer, kept
            x = kept.resid_post

    def layer_caches(self, tokens, layers=None):            # (B,T) -> (layer, LayerCache), ...
        """What some layers compute (all, if None), one after the other, so that not all caches are
        in memory at once. The layers after the last of them are not run."""
        layers = range(self.config.n_layers) if layers is None else layers
        self.check_layers(layers)
        x = self.embed(tokens)
        for layer in range(max(layers) + 1):
            kept = [layer] if layer in layers else []
            x, cache = self.run_layers(x, keep=kept, layers=(layer,))
            if kept:
                yield layer, cache[layer]

    def layer_cache(self, tokens, layer):                   # (B,T) -> LayerCache
        """What one layer computes; the layers after it are not run."""
        (_, cache), = self.layer_caches(tokens, [layer])
        return cache

    def z_cat_at(self, tokens, layers, edit_z=None, edit_mlp=None):
        """z_cat of some layers, after edits, and nothing more, (B,T) -> {layer: (B,T,D)}: stops
        inside the last of them."""
        edit_z = edit_z or {}
        edit_mlp = edit_mlp or {}
        self.check_layers([*edit_z, *edit_mlp, *layers])
        last = max(layers, default=-1)
        z_of_layer = {}
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks[:last + 1]):
            z_cat = block.heads(x, with_pattern=False).z_cat
            if layer in edit_z:
                z_cat = edit_z[layer](z_cat)
            if layer in layers:
                z_of_layer[layer] = z_cat
            if layer < last:                                # so an edit of its MLP has no part
                after = block.after_heads(x, z_cat, edit_mlp=edit_mlp.get(layer))
                x = x + after.attn_out + after.mlp_out
        return z_of_layer

    def mlp_at(self, tokens, layers, edit_z=None, edit_mlp=None):
        """What the MLPs of some layers read and write, mlp_in and mlp_out, after edits, (B,T) ->
        {layer: AfterHeads}: stops after the last of them."""
        edit_z = edit_z or {}
        edit_mlp = edit_mlp or {}
        self.check_layers([*edit_z, *edit_mlp, *layers])
        of_layer = {}
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks[:max(layers, default=-1) + 1]):
            z_cat = block.heads(x, with_pattern=False).z_cat
            if layer in edit_z:
                z_cat = edit_z[layer](z_cat)
            after = block.after_heads(x, z_cat, edit_mlp=edit_mlp.get(layer))
            if layer in layers:
                of_layer[layer] = after
            x = x + after.attn_out + after.mlp_out
        return of_layer

    @torch.no_grad()
    def z_cat_bfloat16(self, tokens, layers):               # (B,T) -> {layer: (B,T,D)} float32
        """z_cat_at with its matrix products in bfloat16, if that is faster on this device. What
        comes back is float32 either way."""
        with bfloat16_products(tokens.device):
            return {layer: z.float() for layer, z in self.z_cat_at(tokens, layers).items()}

    @torch.no_grad()
    def mlp_bfloat16(self, tokens, layers):                 # (B,T) -> {layer: (mlp_in, mlp_out)}
        """The same of what MLPs read and write, (B,T,d_model) each."""
        with bfloat16_products(tokens.device):
            return {layer: (after.mlp_in.float(), after.mlp_out.float())
                    for layer, after in self.mlp_at(tokens, layers).items()}

    def embed(self, tokens):                                # (B,T) -> (B,T,d_model)
        """The residual stream before layer 0."""
        return sum(self.embed_parts(tokens).values())

    @torch.no_grad()
    def value_bias(self, layer):                            # -> (D,)
        """HeadMatrices.b_V for all heads, the constant part of z_cat: a head's pattern sums to 1
        over the keys, so what all its values have in common reaches every z. In GPT-2 it is
        ln_1.bias @ W_V and the checkpoint's own bias of the values; in Gemma it is 0."""
        return self.head_matrices(layer).b_V.flatten()

    def architecture(self):
        """The model's shape in words; an SAE is refused by a model of another one."""
        c = self.config
        return (f"{type(self).__name__} of {c.n_layers} layers, {c.n_heads} heads of {c.d_head}, "
                f"d_model {c.d_model}")

    def check_layers(self, layers):
        """Raise UserError for a layer that the model does not have."""
        last = self.config.n_layers - 1
        for layer in layers:
            if not 0 <= layer <= last:
                raise UserError(f"layer {layer} is out of range: this model has layers 0 to "
                                f"{last}.")

    def check_length(self, T):
        """Raise UserError for a prompt that is empty or longer than the model was trained for."""
        if T < 1:
            raise UserError("the prompt is empty; give one token or more.")
        if T > self.config.n_ctx:
            raise UserError(f"a prompt of {T} tokens does not fit this model, which takes 1 to "
                            f"{self.config.n_ctx}; shorten it.")


def bfloat16_products(device):
    """Within it matrix products are in bfloat16, if that is faster on this device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


def dot_with_embeddings(x, embedding, tokens=None):         # (...,d), (d_vocab,d) -> (...,d_vocab)
    """Products with all embeddings, or with those of some tokens (...,m) -> (...,m)."""
    if tokens is None:
        return F.linear(x, embedding)
    return torch.einsum("...d,...md->...m", x, embedding[tokens])


class HeadMatrices(NamedTuple):
    """One layer's weights per head, with gains, bias and centring of the norms around attention
    folded in.

        n   = resid_pre / scales["attn_in"]                     centring is in W_Q, W_K, W_V
        v_h = n @ W_V[h] + b_V[h]
        q_h = rotate((n @ W_Q[h] + b_Q[h]) / scales["q"])       and so for k; only Gemma 3 divides
        attn_out = (sum_h z_h @ W_O[h] + b_O) / scales["attn_out"]      only Gemma 2 and 3 divide
    """
    W_Q: Tensor             # (H,d_model,d_head)
    W_K: Tensor
    W_V: Tensor
    b_Q: Tensor             # (H,d_head)
    b_K: Tensor
    b_V: Tensor
    W_O: Tensor             # (H,d_head,d_model)
    b_O: Tensor             # (d_model,)


# ---- what `rerun` takes and gives, which computes only what an edit changes ----


class Run(NamedTuple):
    """A run of the model on some rows, from which `Transformer.rerun` goes on. Lists are by
    layer."""
    tokens: Tensor          # (B,T)
    resid_pre: list         # (B,T,d_model) the residual stream that the layer reads
    k: list                 # (B,T,G,d_head) keys as they enter the score: G groups of heads have
                            # one each
    v: list                 # (B,T,G,d_head) values, the same
    z_cat: list             # (B,T,D)
    final: Tensor           # (B,T,d_model) the stream after the last layer

    def pick(self, rows):                                   # (n,) -> Run
        """The same of some rows."""
        def of_rows(value):
            return [one[rows] for one in value] if isinstance(value, list) else value[rows]
        return Run(*(of_rows(value) for value in self))


def span(start, end):                                       # (B,), (B,) -> (B,S)
    """Every position of a row from its start to its end, for `Transformer.rerun`; where that is
    fewer than in other rows, the end several times."""
    longest = max((end - start).tolist(), default=0)
    steps = torch.arange(longest + 1, device=start.device)
    return torch.minimum(start[:, None] + steps, end[:, None])


class Within(NamedTuple):
    """Where some positions stand among all of their rows, and the keys and values there."""
    positions: Tensor       # (B,S)
    k: Tensor               # (B,T,G,d_head)
    v: Tensor               # (B,T,G,d_head)

    def with_new(self, k, v):                               # (B,S,H,d_head) -> (B,T,H,d_head)
        """All keys and values of the rows, with new ones at these positions."""
        n_sharing = k.shape[2] // self.k.shape[2]
        row = torch.arange(len(k), device=k.device)[:, None]
        whole = []
        for of_rows, new in ((self.k, k), (self.v, v)):
            of_rows = of_rows.repeat_interleave(n_sharing, 2)           # a copy
            of_rows[row, self.positions] = new
            whole.append(of_rows)
        return whole


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
    def n_kv_heads(self):
        """Every head has its own keys and values."""
        return self.n_heads

    @property
    def d_z_cat(self):
        """D, the width of z_cat."""
        return self.n_heads * self.d_head

    @property
    def score_scale(self):
        """What q . k is multiplied by."""
        return self.d_head**-0.5


class Linear(nn.Module):
    """x @ weight + bias, weight (d_in, d_out): GPT-2's layout, the transpose of torch's."""

    def __init__(self, d_in, d_out, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_in, d_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x):                                   # (...,d_in) -> (...,d_out)
        return F.linear(x, self.weight.T, self.bias)


class LayerNorm(nn.Module):
    """weight * (x - mean x) / scale(x) + bias, with scale(x) = sqrt(var x + eps)."""

    def __init__(self, d_model, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x):                                   # (...,d_model) -> (...,d_model)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def scale(self, x):                                     # (...,d_model) -> (...,1)
        x = x.to(wide_dtype(x))
        return (x.var(-1, unbiased=False, keepdim=True) + self.eps).sqrt()


class Attention(nn.Module):
    """Causal self-attention in two halves with the seam between them."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.score_scale = config.score_scale
        self.c_attn = Linear(config.d_model, 3 * config.d_model)        # W_Q | W_K | W_V
        self.c_proj = Linear(config.d_model, config.d_model)            # W_O

    def heads(self, x, with_pattern=True, within=None):     # (B,T,d_model), normalised -> Heads
        """Everything up to z_cat. within: where x is only some positions of its rows."""
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_heads, -1))       # (B,T,3,H,d_head)
        q, k, v = qkv.unbind(2)
        positions = None
        if within:
            positions = within.positions
            k, v = within.with_new(k, v)
        return attend(q, k, v, self.score_scale, with_pattern=with_pattern, positions=positions)

    def out(self, z_cat):                                   # (B,T,D) -> attn_out (B,T,d_model)
        """Everything after z_cat."""
        return self.c_proj(z_cat)


class MLP(nn.Module):
    """gelu(x W_in + b_in) W_out + b_out, with the tanh form of GELU that GPT-2 was trained with."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.d_model, config.d_mlp)
        self.c_proj = Linear(config.d_mlp, config.d_model)

    def forward(self, x):                                   # (B,T,d_model) -> (B,T,d_model)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """x += attention(ln_1(x)); x += mlp(ln_2(x))."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.d_model, config.eps)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.d_model, config.eps)
        self.mlp = MLP(config)

    def heads(self, x, with_pattern=True, within=None):     # resid_pre (B,T,d_model) -> Heads
        return self.attn.heads(self.ln_1(x), with_pattern, within)

    def after_heads(self, x, z_cat, with_scales=False, edit_mlp=None):  # (B,T,d_model), (B,T,D)
        """The layer's two contributions to the residual stream, and what its norms divided by, if
        asked for -> AfterHeads. edit_mlp: see `Transformer.forward`."""
        attn_out = self.attn.out(z_cat)
        resid_mid = x + attn_out
        mlp_in = self.ln_2(resid_mid)
        mlp_out = self.mlp(mlp_in)
        if edit_mlp:
            mlp_out = edit_mlp(mlp_in, mlp_out)
        scales = None
        if with_scales:
            scales = {"attn_in": self.ln_1.scale(x), "mlp_in": self.ln_2.scale(resid_mid)}
        return AfterHeads(attn_out, mlp_in, mlp_out, scales)


class GPT2(Transformer):
    """tokens -> logits. The unembedding is the token embedding (tied weights)."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.d_vocab, config.d_model)
        self.wpe = nn.Embedding(config.n_ctx, config.d_model)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = LayerNorm(config.d_model, config.eps)

    @property
    def blocks(self):
        return self.h

    def embed_parts(self, tokens):                          # (B,T) -> {name: (B,T,d_model)}
        """What the residual stream begins with: token and position embedding."""
        B, T = tokens.shape
        self.check_length(T)
        positions = self.wpe(torch.arange(T, device=tokens.device))     # (T,d_model)
        return {"embedding": self.wte(tokens), "position": positions.expand(B, -1, -1)}

    def unembed(self, x, tokens=None):                      # (...,d_model) -> (...,d_vocab)
        """Final norm, then the dot product with every token's embedding, or with those of
        `tokens` (...,m) alone -> (...,m)."""
        return dot_with_embeddings(self.ln_f(x), self.wte.weight, tokens)

    def final_scale(self, x):                               # (...,d_model) -> (...,1)
        """What the final norm divides by."""
        return self.ln_f.scale(x)

    @torch.no_grad()
    def logit_directions(self, tokens):                     # (...) -> (...,d_model)
        """The direction along which the stream x raises a token's logit above the mean over all
        tokens:

            logit - mean = direction . x / final_scale(x) + ln_f.bias . (wte[token] - mean wte)

        The last term does not depend on x and is not in it; the norm's gain and centring are.
        """
        wte = precise(self.wte.weight)
        direction = precise(self.ln_f.weight) * (wte[tokens] - wte[:self.n_tokens].mean(0))
        return direction - direction.mean(-1, keepdim=True)

    @torch.no_grad()
    def logit_constants(self, tokens):                      # (...) -> (...)
        """The last term of `logit_directions`."""
        wte = precise(self.wte.weight)
        return (wte[tokens] - wte[:self.n_tokens].mean(0)) @ precise(self.ln_f.bias)

    @torch.no_grad()
    def mlp_directions(self, layer, W):                     # (d_model,m) -> (d_model,m), (m,)
        """What W reads of the MLP's input, as what it reads of the stream before the norm:

            mlp_in @ W = resid_mid / scales["mlp_in"] @ directions + constants
        """
        norm = self.h[layer].ln_2
        directions = precise(norm.weight)[:, None] * W
        return directions - directions.mean(0), precise(norm.bias) @ W

    @torch.no_grad()
    def head_matrices(self, layer):                         # -> HeadMatrices
        """Fold ln_1 into W_Q, W_K and W_V: multiply row i of W by gain[i], then subtract from each
        column its mean. For x - mean x = x @ C, where C = I - J / d_model and J is all ones, and so
        ((x @ C) * gain) @ W = x @ (C @ (gain[:, None] * W))."""
        self.check_layers([layer])
        H = self.config.n_heads
        norm = self.h[layer].ln_1
        attn = self.h[layer].attn
        gain, bias = precise(norm.weight), precise(norm.bias)
        W_qkv, b_qkv = precise(attn.c_attn.weight), precise(attn.c_attn.bias)
        W_O, b_O = precise(attn.c_proj.weight), precise(attn.c_proj.bias)

        W = gain[:, None] * W_qkv                                       # (d_model,3*D)
        W = W - W.mean(0)
        W_Q, W_K, W_V = W.unflatten(1, (3, H, -1)).permute(1, 2, 0, 3)  # (H,d_model,d_head) each
        b_Q, b_K, b_V = (bias @ W_qkv + b_qkv).unflatten(0, (3, H, -1)) # (H,d_head) each
        return HeadMatrices(W_Q, W_K, W_V, b_Q, b_K, b_V, W_O.unflatten(0, (H, -1)), b_O)

    def rotate(self, x, layer, positions=None):             # (B,T,H,d_head) -> the same
        """Queries and keys enter the score as they are: positions came with the embedding."""
        return x


# ---- loading ----


def load_model(name_or_dir, device="cpu", dtype=torch.float32):
    """A model in eval mode, without gradients -> GPT2 or Gemma.

    name_or_dir: "tiny" (shipped), a directory in Hugging Face layout (config.json, *.safetensors),
    or a model of the Hugging Face hub: owner/name, or a short name ("gpt2", "gemma-2-2b" ...:
    data/weights.py).

    Strict: every tensor in the files is used or known to carry nothing, every parameter is found,
    every shape is checked. Takes no more memory than the model and its largest tensor. Raises
    UserError, naming the file, if something is missing, damaged, cannot be fetched or is of a kind
    that this module does not implement.
    """
    kind, settings, layout = read_config(weights.find_config(name_or_dir))
    with torch.device("meta"):  # no memory yet: the weights are put in one by one
        if kind == "gemma":
            model = Gemma(GemmaConfig(**settings))
        else:
            model = GPT2(GPT2Config(**settings))
    weights.load_into(model, name_or_dir, layout, device, dtype)
    return model.eval().requires_grad_(False)


# ---- Gemma ----
#
# The same structure with different parts: RMSNorm, rotary positions, G heads of keys and values
# that H query heads share, a gated MLP. Gemma 2 and 3 have windows, and also normalise what
# attention (after W_O) and the MLP return before it is added to the stream.


@dataclass(frozen=True)
class GemmaConfig:
    n_layers: int
    n_heads: int
    n_kv_heads: int         # G: 1 in Gemma 1 2B, half of n_heads in Gemma 2
    d_model: int
    d_head: int             # its own setting: n_heads * d_head need not be d_model
    d_mlp: int
    d_vocab: int
    n_ctx: int              # the longest prompt
    eps: float              # RMSNorm adds it to the mean square
    score_scale: float      # what q . k is multiplied by
    windows: tuple          # per layer: how many keys a query sees, its own included; None: all
    thetas: tuple           # per layer: the base of the rotation's wave lengths
    score_softcap: float | None     # of the scores (Gemma 2)
    logit_softcap: float | None     # of the logits (Gemma 2)
    post_norms: bool        # a norm after attention and after the MLP as well (Gemma 2, 3)
    qk_norm: bool           # a norm of every query and key (Gemma 3)

    @property
    def d_z_cat(self):
        """D, the width of z_cat."""
        return self.n_heads * self.d_head


class RMSNorm(nn.Module):
    """(1 + weight) * x / scale(x), with scale(x) = sqrt(mean x^2 + eps), in float32 at least."""

    def __init__(self, d_model, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x):                                   # (...,d_model) -> (...,d_model)
        dtype = wide_dtype(x)
        gain = 1 + self.weight.to(dtype)
        return (x.to(dtype) / self.scale(x) * gain).to(x.dtype)

    def scale(self, x):                                     # (...,d_model) -> (...,1)
        x = x.to(wide_dtype(x))
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


def rotary(x, theta, positions=None):                       # (B,T,H,d_head) -> the same
    """Rotary position embedding (Su et al. 2021): at position t, the pair of dimensions i and
    i + d_head/2 turns by t / theta^(2i / d_head), so that q . k depends on the distance of the two
    positions.

    positions (T,) or (B,T): those of x along its second dimension, 0 to T-1 if not given.
    """
    half = x.shape[-1] // 2
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)
    i = torch.arange(half, dtype=torch.float32, device=x.device)
    frequency = 1 / theta ** (i / half)
    angle = positions.float()[..., None, None] * frequency              # (...,T,1,half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class GemmaAttention(nn.Module):
    """Attention with rotary positions. H/G query heads in a row share a key and a value. No
    biases."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.window = config.windows[layer]
        self.theta = config.thetas[layer]
        d_kv = config.n_kv_heads * config.d_head
        self.q_proj = Linear(config.d_model, config.d_z_cat, bias=False)
        self.k_proj = Linear(config.d_model, d_kv, bias=False)
        self.v_proj = Linear(config.d_model, d_kv, bias=False)
        self.o_proj = Linear(config.d_z_cat, config.d_model, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.d_head, config.eps)
            self.k_norm = RMSNorm(config.d_head, config.eps)

    def qkv(self, x):                                       # (B,T,d_model) -> (B,T,H,d_head) each
        """Queries, keys and values before norm and rotation, one of each for every query head."""
        n_sharing = self.config.n_heads // self.config.n_kv_heads
        q = self.q_proj(x).unflatten(-1, (-1, self.config.d_head))
        k = self.k_proj(x).unflatten(-1, (-1, self.config.d_head))      # (B,T,G,d_head)
        v = self.v_proj(x).unflatten(-1, (-1, self.config.d_head))
        return q, k.repeat_interleave(n_sharing, 2), v.repeat_interleave(n_sharing, 2)

    def heads(self, x, with_pattern=True, within=None):     # (B,T,d_model), normalised -> Heads
        """Everything up to z_cat. within: where x is only some positions of its rows."""
        q, k, v = self.qkv(x)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        positions = within.positions if within else None
        q, k = rotary(q, self.theta, positions), rotary(k, self.theta, positions)
        if within:
            k, v = within.with_new(k, v)
        return attend(q, k, v, self.config.score_scale, self.window, self.config.score_softcap,
                      with_pattern, positions)

    def out(self, z_cat):                                   # (B,T,D) -> (B,T,d_model)
        """z_cat @ W_O. Gemma 2 and 3 normalise the result, in `GemmaBlock.after_heads`."""
        return self.o_proj(z_cat)


class GemmaMLP(nn.Module):
    """(gelu(x W_gate) * x W_up) W_down, GELU in its tanh form."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_mlp, bias=False)
        self.up_proj = Linear(config.d_model, config.d_mlp, bias=False)
        self.down_proj = Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, x):                                   # (B,T,d_model) -> (B,T,d_model)
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class GemmaBlock(nn.Module):
    """x += post(attention(pre(x))); x += post(mlp(pre(x))), each with its own norms.

    Gemma 1 has no post-norms (and calls the second pre-norm post_attention_layernorm, which is
    renamed at load).
    """

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = GemmaAttention(config, layer)
        self.mlp = GemmaMLP(config)
        self.input_layernorm = RMSNorm(config.d_model, config.eps)
        self.pre_feedforward_layernorm = RMSNorm(config.d_model, config.eps)
        self.post_attention_layernorm = None
        self.post_feedforward_layernorm = None
        if config.post_norms:
            self.post_attention_layernorm = RMSNorm(config.d_model, config.eps)
            self.post_feedforward_layernorm = RMSNorm(config.d_model, config.eps)

    def heads(self, x, with_pattern=True, within=None):     # resid_pre (B,T,d_model) -> Heads
        return self.self_attn.heads(self.input_layernorm(x), with_pattern, within)

    def after_heads(self, x, z_cat, with_scales=False, edit_mlp=None):  # (B,T,d_model), (B,T,D)
        """As GPT-2's -> AfterHeads."""
        attn_raw = self.self_attn.out(z_cat)
        attn_out = attn_raw
        if self.post_attention_layernorm:
            attn_out = self.post_attention_layernorm(attn_raw)
        resid_mid = x + attn_out
        mlp_in = self.pre_feedforward_layernorm(resid_mid)
        mlp_raw = self.mlp(mlp_in)
        mlp_out = mlp_raw
        if self.post_feedforward_layernorm:
            mlp_out = self.post_feedforward_layernorm(mlp_raw)
        if edit_mlp:
            mlp_out = edit_mlp(mlp_in, mlp_out)
        scales = self.scales(x, attn_raw, resid_mid, mlp_raw) if with_scales else None
        return AfterHeads(attn_out, mlp_in, mlp_out, scales)

    def scales(self, x, attn_raw, resid_mid, mlp_raw):
        """What each norm divided by, for LayerCache."""
        scales = {"attn_in": self.input_layernorm.scale(x),
                  "mlp_in": self.pre_feedforward_layernorm.scale(resid_mid)}
        if self.post_attention_layernorm:
            scales["attn_out"] = self.post_attention_layernorm.scale(attn_raw)
            scales["mlp_out"] = self.post_feedforward_layernorm.scale(mlp_raw)
        if self.self_attn.config.qk_norm:
            q, k, _ = self.self_attn.qkv(self.input_layernorm(x))
            scales["q"] = self.self_attn.q_norm.scale(q)
            scales["k"] = self.self_attn.k_norm.scale(k)
        return scales


class Gemma(Transformer):
    """Gemma 1, 2 and the text models of Gemma 3: tokens -> logits. The unembedding is the token
    embedding."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.d_vocab, config.d_model)
        self.layers = nn.ModuleList(GemmaBlock(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.eps)

    @property
    def blocks(self):
        return self.layers

    def embed_parts(self, tokens):                          # (B,T) -> {name: (B,T,d_model)}
        """Token embedding times sqrt(d_model), a factor that Gemma rounds to the weights' type."""
        self.check_length(tokens.shape[1])
        x = self.embed_tokens(tokens)
        factor = torch.tensor(self.config.d_model**0.5, dtype=x.dtype, device=x.device)
        return {"embedding": x * factor}

    def unembed(self, x, tokens=None):                      # (...,d_model) -> (...,d_vocab)
        """Final norm, the dot product with every token's embedding, or with those of `tokens`
        (...,m) alone -> (...,m), and the soft cap if any."""
        logits = dot_with_embeddings(self.norm(x), self.embed_tokens.weight, tokens)
        softcap = self.config.logit_softcap
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def final_scale(self, x):                               # (...,d_model) -> (...,1)
        """What the final norm divides by."""
        return self.norm.scale(x)

    @torch.no_grad()
    def logit_directions(self, tokens):                     # (...) -> (...,d_model)
        """Direction whose dot product with x / final_scale(x) is a token's logit, before the soft
        cap, less the mean over all tokens. The norm's gain is folded in."""
        embedding = precise(self.embed_tokens.weight)
        mean = embedding[:self.n_tokens].mean(0)
        return (1 + precise(self.norm.weight)) * (embedding[tokens] - mean)

    def logit_constants(self, tokens):                      # (...) -> (...)
        """0: the final norm has no bias."""
        return precise(self.norm.weight).new_zeros(tokens.shape)

    @torch.no_grad()
    def mlp_directions(self, layer, W):                     # (d_model,m) -> (d_model,m), (m,)
        """As GPT-2's; without centring and bias."""
        gain = 1 + precise(self.layers[layer].pre_feedforward_layernorm.weight)
        return gain[:, None] * W, W.new_zeros(W.shape[1])

    @torch.no_grad()
    def head_matrices(self, layer):                         # -> HeadMatrices
        """RMSNorm has a gain of 1 + weight, no centring and no bias; a shared key or value is
        repeated."""
        self.check_layers([layer])
        config = self.config
        block = self.layers[layer]
        attn = block.self_attn
        gain = 1 + precise(block.input_layernorm.weight)

        def per_head(projection, norm=None):                # -> (H,d_model,d_head)
            W = gain[:, None] * precise(projection.weight)
            W = W.unflatten(1, (-1, config.d_head)).transpose(0, 1)
            W = W.repeat_interleave(config.n_heads // len(W), 0)
            return W * (1 + precise(norm.weight)) if norm else W

        W_O = precise(attn.o_proj.weight)
        if block.post_attention_layernorm:
            W_O = W_O * (1 + precise(block.post_attention_layernorm.weight))
        no_bias = gain.new_zeros(config.n_heads, config.d_head)
        return HeadMatrices(
            W_Q=per_head(attn.q_proj, attn.q_norm if config.qk_norm else None),
            W_K=per_head(attn.k_proj, attn.k_norm if config.qk_norm else None),
            W_V=per_head(attn.v_proj),
            b_Q=no_bias, b_K=no_bias, b_V=no_bias,
            W_O=W_O.unflatten(0, (config.n_heads, -1)), b_O=gain.new_zeros(config.d_model))

    def rotate(self, x, layer, positions=None):             # (B,T,H,d_head) -> the same
        """The rotation by which queries and keys of this layer know their position."""
        return rotary(x, self.config.thetas[layer], positions)
