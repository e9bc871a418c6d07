"""Which head, which source token, which earlier feature: attribution of SAE features (the paper,
section 2).

    python attribution.py "When Mary and John went to the store, John gave a drink to"

takes the strongest feature of the last token apart, and writes a page in which the strongest
features of every token can be opened: <out>/<model>/attribution/explorer.html.

In reading order: one layer (head weights and DFA); what heads and features do to the logits; the
residual stream as a sum of what was written to it; recursive DFA over it; QK, why a head looks
where it looks; the program and its report. Most start with their formula. Every sum is exact. Exact
does not mean that the SAE is right: its error is one of the terms. Nor does removing a feature have
the effect that is attributed to it: `ablation_effects` removes features, nothing frozen, and looks.

Shapes: B batch, T positions (q query, k key/source), H heads, d_head, D = H*d_head, d_sae.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data import pages
from data.errors import UserError, run
from data.flags import field, parse_flags
from sae import ablate, check_feature
from study import StudyConfig, begin, parse_feature

# ---- one layer: heads and sources ----
#
# With w = W_enc[:,i], and w^h its slice at head h, the pre-activation of feature i at query q is
#
#     pre_i(q) = sum_{h,k} pattern[h,q,k] * (v[h,k] . w^h)  +  b_enc[i] - b_dec . w
#
# The terms of the sum are direct feature attribution (DFA). All values of a head share a constant,
# `model.value_bias`. A head's pattern sums to 1, so it moves this constant wherever it looks, and
# the constant says nothing about sources. To compare sources, callers first subtract it
# (`values_minus_bias`), and count it with the feature's bias (`constant_part`).


def head_weights(W_dec, n_heads):                           # (...,D) -> (...,H)
    """Weight-based head attribution: the norm of a decoder row's slice at each head, over the sum
    of these norms. A row of zeros stays 0."""
    norms = W_dec.unflatten(-1, (n_heads, -1)).norm(dim=-1)
    return norms / norms.sum(-1, keepdim=True).clamp_min(1e-30)


def dfa(pattern, v, w_enc):                     # (B,H,q,k), (B,k,H,d_head), (D,) -> (B,H,q,k)
    """Direct feature attribution: the part of z_cat[q] . w_enc that head h moved from position
    k."""
    w = w_enc.unflatten(0, (v.shape[2], -1))                            # (H,d_head)
    return pattern * torch.einsum("bkhd,hd->bhk", v, w)[:, :, None]     # d_head is summed first


def dfa_at_positions(pattern, v, w_enc, q):     # (H,q,k), (k,H,d_head), (m,D), (m,) -> (m,H,k)
    """DFA of m features (rows of W_enc^T), each at its own query, in one prompt."""
    w = w_enc.unflatten(1, (v.shape[1], -1))                            # (m,H,d_head)
    return pattern[:, q].transpose(0, 1) * torch.einsum("khd,mhd->mhk", v, w)


def feature_bias(sae):                                      # -> (d_sae,)
    """Add this to the sum of DFA over heads and sources, of the raw values, and you get the
    pre-activation."""
    return sae.b_enc - sae.b_dec @ sae.W_enc


@torch.no_grad()
def values_minus_bias(model, layer, v):                     # (B,k,H,d_head) -> the same
    """Values minus value_bias, the part that all sources share."""
    return v - model.value_bias(layer).unflatten(0, v.shape[2:])


@torch.no_grad()
def constant_part(model, layer, sae):                       # -> (d_sae,)
    """Add this to the sum of DFA of `values_minus_bias`, and you get the pre-activation."""
    return feature_bias(sae) + model.value_bias(layer) @ sae.W_enc


# ---- what heads and features do to the logits ----
#
# `direct_logits` and `token_effects` are for induction.py, ioi.py and features.py; what follows
# below does not use them. With
#
#     scaled_direction = model.logit_directions(token) / model.final_scale(final residual stream)
#
# the dot product of scaled_direction and what is written to the stream is what this adds to the
# token's logit (before a soft cap), less the mean over all tokens, the final norm's scale frozen:
# direct logit attribution.


def head_logits(z_cat, matrices, scaled_direction, scale=1.0):  # (...,D), _, (...,d_model)
    """What each head of a layer, having gathered z_cat, writes along a direction -> (...,H).

    scaled_direction: with the final norm's scale in it, as above. scale: the layer's
    scales["attn_out"], where there is one.
    """
    z = z_cat.unflatten(-1, matrices.b_V.shape)                         # (...,H,d_head)
    return torch.einsum("...hd,hdm,...m->...h", z, matrices.W_O, scaled_direction / scale)


@torch.no_grad()
def direct_logits(model, matrices, caches, position, direction, look=lambda kept: None):
    """Direct logit attribution of every head at one position of each row -> (B,layers,H).

    matrices: every layer's HeadMatrices. caches: every layer's (layer, LayerCache), of
    model.layer_caches or model.rerun_caches. position (B,): in them. direction (B,d_model): of
    model.logit_directions, or a difference of two; the final norm's scale is put in here. look:
    called with each layer's LayerCache, for what else a caller wants of this pass, such as
    attention.
    """
    row = torch.arange(len(position), device=position.device)
    gathered = []
    for _, kept in caches:
        look(kept)
        scale = kept.scales["attn_out"][row, position] if "attn_out" in kept.scales else 1.0
        gathered.append((kept.z_cat[row, position], scale))
    final = kept.resid_post[row, position]                  # kept: of the last layer
    scaled_direction = direction / model.final_scale(final)
    by_layer = [head_logits(z, matrices[layer], scaled_direction, scale)
                for layer, (z, scale) in enumerate(gathered)]
    return torch.stack(by_layer, 1)


@torch.no_grad()
def token_effects(model, layer, sae, features, directions=None):    # int or (m,) -> (...,n_tokens)
    """W_dec[i] @ W_O @ unembedding: what a feature adds to every token's logit per unit of
    activation, less the mean over all tokens, with the scales of the final norm and of Gemma's
    post-norm taken as 1.

    directions: `token_directions` of the model, if it is at hand.
    """
    if directions is None:
        directions = token_directions(model)
    W_O = model.head_matrices(layer).W_O.flatten(0, 1)                  # (D,d_model)
    return sae.W_dec[features] @ W_O @ directions.T


def token_directions(model):                                # -> (n_tokens,d_model)
    """model.logit_directions of all tokens. With a large vocabulary that is as large as the
    model."""
    device = next(model.parameters()).device
    return model.logit_directions(torch.arange(model.n_tokens, device=device))


# ---- the residual stream as a sum of components ----
#
# Before a layer, the stream at a position is the sum of everything written there: embeddings, and
# for each earlier layer its features f_j * W_dec[j] @ W_O, biases b_dec @ W_O + b_O, the SAE's
# error (z_cat - z_hat) @ W_O, and the MLP's output. (Gemma 2 and 3 divide what attention writes by
# scales["attn_out"].) At BOS, and in layers without an SAE, attention's output is one component.

# "constant" is never a component: it labels terms that nobody wrote to the stream, such as biases
# of values and of a feature.
KINDS = ("embedding", "position", "feature", "bias", "error", "attention", "MLP", "constant")
EMBEDDING, POSITION, FEATURE, BIAS, ERROR, ATTENTION, MLP, CONSTANT = range(len(KINDS))


class Components(NamedTuple):
    """What was written to the residual stream of one prompt, one row for each writer and position.

    *attention* is an attention output that no SAE takes apart: BOS, which SAEs do not see, and
    layers without an SAE.
    """
    kind: Tensor            # (N,) index into KINDS
    layer: Tensor           # (N,) where it was written; -1 for embeddings
    position: Tensor        # (N,)
    feature: Tensor         # (N,) or -1
    vector: Tensor          # (N,d_model)

    def pick(self, which):
        return Components(*(column[which] for column in self))


class TracedPrompt(NamedTuple):
    """A model's run on one prompt, and what its SAEs make of it."""
    model: nn.Module
    saes: dict              # {layer: SAE}
    tokens: Tensor          # (T,)
    cache: dict             # {layer: LayerCache}, B = 1
    f: dict                 # {layer: (T,d_sae)}, 0 at BOS
    components: Components  # in the order in which they are written
    n_before: list          # n_before[layer]: how many of them are in the stream that it reads
    matrices: list          # each layer's head_matrices


@torch.no_grad()
def trace_prompt(model, saes, tokens):                      # (T,) or (1,T) -> TracedPrompt
    """Run the model on one prompt and cut everything written to its residual stream into
    components."""
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    assert len(tokens) == 1, "one prompt at a time"
    check_one_dtype(model, saes)
    everywhere = torch.arange(tokens.shape[1], device=tokens.device)
    matrices = [model.head_matrices(layer) for layer in range(model.config.n_layers)]
    cache = dict(model.layer_caches(tokens))

    f = {}
    n_before = []
    written = []            # Components
    for name, vectors in model.embed_parts(tokens).items():
        written.append(component(KINDS.index(name), -1, everywhere, vectors[0]))
    for layer, kept in cache.items():
        n_before.append(sum(len(part.kind) for part in written))
        if layer in saes:
            f[layer] = saes[layer].encode(kept.z_cat[0])
            f[layer][0] = 0
            written += attention_components(layer, kept, saes[layer], f[layer], matrices[layer])
        else:
            written.append(component(ATTENTION, layer, everywhere, kept.attn_out[0]))
        written.append(component(MLP, layer, everywhere, kept.mlp_out[0]))
    components = Components(*(torch.cat(column) for column in zip(*written)))
    return TracedPrompt(model, saes, tokens[0], cache, f, components, n_before, matrices)


def check_one_dtype(model, saes):
    """Raise UserError where a model and its SAEs are in different types, or in narrow ones."""
    dtypes = {p.dtype for module in (model, *saes.values()) for p in module.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise UserError(f"the model and its SAEs are in {' and '.join(sorted(map(str, dtypes)))}; "
                        f"attribution takes float32 or float64, the same for both, such as "
                        f"load_model(..., dtype=torch.float32).")


def component(kind, layer, positions, vectors, features=None):      # -> Components
    """What one writer wrote at some positions (n,): vectors (n,d_model)."""
    if features is None:
        features = torch.full_like(positions, -1)
    return Components(torch.full_like(positions, kind), torch.full_like(positions, layer),
                      positions, features, vectors)


def attention_components(layer, kept, sae, f, matrices):    # -> list of Components
    """An attention layer's output in terms of its SAE; f: (T,d_sae)."""
    position = torch.arange(len(f), device=f.device)
    attn_out = kept.attn_out[0]                                         # (T,d_model)
    W_O = matrices.W_O.flatten(0, 1)                                    # (D,d_model)
    scale = torch.ones_like(attn_out[:, :1])                            # (T,1)
    if "attn_out" in kept.scales:
        scale = kept.scales["attn_out"][0]
    active_at, active = f.nonzero(as_tuple=True)
    by_feature = f[active_at, active, None] * (sae.W_dec[active] @ W_O) / scale[active_at]
    bias = (sae.b_dec @ W_O + matrices.b_O) / scale
    error = (kept.z_cat[0] - sae.decode(f)) @ W_O / scale
    return [component(ATTENTION, layer, position[:1], attn_out[:1]),
            component(FEATURE, layer, active_at, by_feature, active),
            component(BIAS, layer, position[1:], bias[1:]),
            component(ERROR, layer, position[1:], error[1:])]


# ---- recursive DFA ----
#
# With patterns and norm scales frozen, what a head moves is linear in the stream at the source. So
# a feature's pre-activation is a sum over (head, component), and biases:
#
#     pre_i(q) = sum_{h,n} pattern[h,q,k_n] / scale[k_n] * (component_n @ W_V[h] . w^h)
#                + sum_h b_V[h] . w^h  +  b_enc[i] - b_dec . w
#
# where component n was written at position k_n, and scale[k] is scales["attn_in"] there. W_V and
# b_V are those of model.head_matrices: the norm's gain, centring and bias are in them. An active
# feature j among the components has f_j = pre_j (ReLU passes it unchanged), so what it contributes
# through a head is a fixed multiple of pre_j; and pre_j is a sum by the same formula, whose terms
# times that multiple are its children. (In `expand` values are contributions to the root, and
# node.value / pre is the product of the fixed multiples along the path.)


class Contributions(NamedTuple):
    """The n terms of a feature's pre-activation: one for each head and each component written at or
    before the query, head by head; then a constant for each head, from its value bias; then the
    feature's own bias."""
    head: Tensor            # (n,) the head that reads the component; -1 for the feature's own bias
    component: Tensor       # (n,) row of traced.components, or -1 for a constant
    value: Tensor           # (n,) they sum to pre
    pre: float              # the pre-activation


@torch.no_grad()
def decompose(traced, layer, position, feature):            # -> Contributions
    """The pre-activation of a feature at a position, as the sum above."""
    kept = traced.cache[layer]
    sae = traced.saes[layer]
    m = traced.matrices[layer]
    n_heads = traced.model.config.n_heads
    components = traced.components.pick(slice(traced.n_before[layer]))
    w = sae.W_enc[:, feature].unflatten(0, (n_heads, -1))               # (H,d_head)
    direction = torch.einsum("hmd,hd->hm", m.W_V, w)                    # (H,d_model) read per head

    # Rows of the S components written at or before the query; the same rows of traced.components,
    # since `components` is its beginning.
    seen = (components.position <= position).nonzero()[:, 0]            # (S,)
    k = components.position[seen]                                       # (S,) positions
    pattern = kept.pattern[0, :, position]                              # (H,T)
    moved = pattern[:, k] / kept.scales["attn_in"][0, k, 0]             # (H,S)
    value = moved * (direction @ components.vector[seen].T)             # (H,S)

    head = torch.arange(n_heads, device=k.device)
    value_constants = torch.einsum("hd,hd->h", m.b_V, w)                # (H,)
    own_bias = feature_bias(sae)[feature, None]                         # (1,)
    heads = torch.cat([head[:, None].expand_as(value).flatten(), head, head.new_tensor([-1])])
    rows = torch.cat([seen.expand_as(value).flatten(), seen.new_full((n_heads + 1,), -1)])
    values = torch.cat([value.flatten(), value_constants, own_bias])
    return Contributions(heads, rows, values, float(values.sum()))


def upstream_features(traced, layer, position, feature):    # -> (n,), (n,)
    """The earlier features among a feature's contributions, summed over heads, strongest first ->
    rows of Components, values."""
    terms = decompose(traced, layer, position, feature)
    is_feature = kind_of(terms, traced.components) == FEATURE
    upstream, index = terms.component[is_feature].unique(return_inverse=True)
    value = terms.value.new_zeros(len(upstream)).index_add_(0, index, terms.value[is_feature])
    order = value.abs().argsort(descending=True, stable=True)
    return upstream[order], value[order]


def kind_of(terms, components):                             # -> (n,) index into KINDS
    """What each term was written by."""
    is_constant = terms.component < 0
    return torch.where(is_constant, CONSTANT, components.kind[terms.component.clamp_min(0)])


@torch.no_grad()
def ablation_effects(traced, upstream, layer, position, feature):   # (n,) -> (n,)
    """Drop in a feature's pre-activation when each upstream feature (a row of Components) is
    ablated where it was written.

    The SAE's error is kept, and everything after the ablation is computed anew: nothing is frozen.
    """
    chosen = traced.components.pick(upstream)
    T = len(traced.tokens)
    at = torch.arange(T, device=upstream.device) == chosen.position[:, None]        # (n,T)
    edits = {}
    # Each row of the batch loses one upstream feature, by the edit of that feature's layer. In the
    # edits of other layers that row's mask is empty, so the 0 put in for its feature is never used.
    for source in chosen.layer.unique().tolist():
        of_source = chosen.layer == source
        features = torch.where(of_source, chosen.feature, 0)
        edits[source] = ablate(traced.saes[source], features, at & of_source[:, None])
    tokens = traced.tokens.expand(len(upstream), T)
    z = traced.model.z_cat_at(tokens, [layer], edits)[layer][:, position]           # (n,D)
    z_clean = traced.cache[layer].z_cat[:, position]                                # (1,D)
    pre = traced.saes[layer].pre_activations(torch.cat([z_clean, z]))[:, feature]
    return pre[0] - pre[1:]


class Node(NamedTuple):
    """One node of the recursive DFA tree."""
    kind: str               # one of KINDS
    layer: int              # where it was written; -1 for embeddings and constants
    position: int           # where it was written; -1 for constants
    feature: int            # -1 if it is none
    head: int               # in the parent's layer, which reads it; -1: this is the root, or the
                            # parent feature's own bias, of kind "constant"
    value: float            # what it contributes to the root; the root's is its pre-activation
    # About its children. A node that is not taken apart (no feature, or at the last level) keeps
    # these defaults.
    children: tuple = ()    # strongest first, those that are not pruned
    pruned: float = 0.0     # sum of the values, with their signs, of the children left out
    n_pruned: int = 0       # how many were left out that contribute something
    error: float = 0.0      # share of its value that its own children of kind error contribute,
                            # pruned ones included
    mlp: float = 0.0        # the same of MLP outputs


def trace(model, saes, tokens, layer, position, feature, share=0.02, depth=3, breadth=8):  # -> Node
    """The recursive DFA tree of a feature at a position of one prompt, (T,) or (1,T).

    A child is shown if it contributes at least `share` of the root (and not 0) and is among the
    `breadth` strongest of its parent; features are taken apart down to `depth` levels. share=0 and
    breadth=None prune nothing: then the values of a node's children, if it has any, sum to its own.

    Raises UserError for a layer without SAE and for numbers out of range.
    """
    traced = trace_prompt(model, saes, tokens)
    return attribution_tree(traced, layer, position, feature, share, depth, breadth)


def attribution_tree(traced, layer, position, feature, share=0.02, depth=3, breadth=8):    # -> Node
    """`trace` on a prompt that is traced already."""
    check_node(traced, layer, position, feature)
    terms = decompose(traced, layer, position, feature)
    root = Node("feature", layer, position, feature, head=-1, value=terms.pre)
    return expand(traced, root, terms, share * abs(root.value), depth, breadth)


def expand(traced, node, terms, least, depth, breadth):     # -> the node with its children
    """The children of a node, from the terms of its pre-activation.

    The terms sum to the node's own pre-activation; times node.value / pre they sum to what it
    contributes to the root. For the root that factor is 1. It is set apart because ratio(0, 0) is
    0, and would wipe out the children of a root whose terms cancel.
    """
    # (the parent's own bias, a "constant", has no head either, but is never taken apart)
    is_root = node.head < 0
    values = terms.value * (1.0 if is_root else ratio(node.value, terms.pre))
    size = values.abs()
    by_size = size.argsort(descending=True, stable=True)
    is_large = (size >= least) & (values != 0)
    shown = by_size[is_large[by_size]][:breadth]            # the large ones, strongest first
    pruned = torch.ones_like(values, dtype=torch.bool)
    pruned[shown] = False

    components = traced.components
    children = []
    for i in shown.tolist():
        n = int(terms.component[i])
        head = int(terms.head[i])
        value = float(values[i])
        if n < 0:
            children.append(Node("constant", -1, -1, -1, head, value))
            continue
        child = Node(KINDS[int(components.kind[n])], int(components.layer[n]),
                     int(components.position[n]), int(components.feature[n]), head, value)
        if child.feature >= 0 and depth > 1:
            below = decompose(traced, child.layer, child.position, child.feature)
            child = expand(traced, child, below, least, depth - 1, breadth)
        children.append(child)

    kind = kind_of(terms, components)
    return node._replace(children=tuple(children), pruned=float(values[pruned].sum()),
                         n_pruned=int((pruned & (values != 0)).sum()),
                         error=ratio(float(values[kind == ERROR].sum()), node.value),
                         mlp=ratio(float(values[kind == MLP].sum()), node.value))


def ratio(part, total):
    """A part of a total; 0 of a total that cancels to nothing."""
    return part / total if total else 0.0


def check_node(traced, layer, position, feature):
    """Raise UserError where there is no such layer, SAE, position or feature."""
    traced.model.check_layers([layer])
    check_feature(traced.saes, layer, feature)
    last = len(traced.tokens) - 1
    if not 1 <= position <= last:
        raise UserError(f"position {position} is out of range: this prompt has positions 1 to "
                        f"{last} after BOS.")


# ---- QK: why a head looks there ----
#
# The score of a query and a key is score_scale * q . k, and q and k are linear in the stream once
# scales are frozen:
#
#     score[h,q,k] = sum_{a,b} score_scale * q_a . k_b
#
# where a runs over the components at position q and the query's bias, b over the components at
# position k and the key's bias; before soft cap, mask and softmax. What is the same at all keys
# cancels when two are compared.


class QK(NamedTuple):
    """A score, or a difference of scores, as a sum over pairs of writers (kind, layer, feature)."""
    query: list             # (a,) writers at the query
    key: list               # (b,) writers at the keys
    pairs: Tensor           # (a,b) contributions; they sum to score
    score: float            # before soft cap, mask and softmax


@torch.no_grad()
def qk(traced, layer, head, query, key, against=None):      # -> QK
    """Why head `head` at `query` looks at `key`: the score as a sum over pairs of writers.

    against: None for the score itself; "others" for the score less the mean over the other keys
    that the query sees, if there are any; a position for the score less that key's. Raises
    UserError for a layer, a head or a key that is not there to be seen.
    """
    check_score(traced, layer, head, query, key, against)
    # Scores are linear in the keys: a score less others is q . (k_key - their mean), so that each
    # key has a coefficient.
    coefficient = key_coefficients(traced, layer, query, key, against)  # (T,)
    position = torch.arange(len(traced.tokens), device=coefficient.device)
    q_writers, q_vectors, _ = qk_vectors(traced, layer, head, "q", position == query)
    k_writers, k_vectors, k_position = qk_vectors(traced, layer, head, "k", coefficient != 0)
    k_vectors = coefficient[k_position, None] * k_vectors
    scores = traced.model.config.score_scale * q_vectors @ k_vectors.T  # (a,n)

    # Each writer at any of these keys is one column: what it adds at the key (0 if it is not
    # there), less its mean over the keys that the key is compared with.
    column_of = {}
    for writer in k_writers:
        column_of.setdefault(writer, len(column_of))
    index = torch.tensor([column_of[writer] for writer in k_writers], device=scores.device)
    pairs = scores.new_zeros(len(q_writers), len(column_of)).index_add_(1, index, scores)
    return QK(q_writers, list(column_of), pairs, float(pairs.sum()))


def seen_keys(traced, layer, query):                        # -> range
    """The keys that a query of this layer sees: none after it, none before its window."""
    windows = getattr(traced.model.config, "windows", None)
    window = windows[layer] if windows else None
    first = 0 if window is None else max(0, query - window + 1)
    return range(first, query + 1)


def check_score(traced, layer, head, query, key, against):
    """Raise UserError where a prompt has no such score."""
    traced.model.check_layers([layer])
    last_head = traced.model.config.n_heads - 1
    if not 0 <= head <= last_head:
        raise UserError(f"head {layer}.{head} is out of range: this model has heads 0 to "
                        f"{last_head}.")
    last = len(traced.tokens) - 1
    if not 0 <= query <= last:
        raise UserError(f"query {query} is out of range: this prompt has positions 0 to {last}.")
    seen = seen_keys(traced, layer, query)
    for position in (key, against):
        if position not in (None, "others") and position not in seen:
            raise UserError(f"query {query} cannot attend to key {position}; it sees keys "
                            f"{seen[0]} to {seen[-1]}.")
    if against == key:
        raise UserError(f"key {key} against itself leaves nothing; name another key.")


def key_coefficients(traced, layer, query, key, against):   # -> (T,)
    """1 at the key, and -1/n at each of the n keys that it is compared with."""
    coefficient = traced.cache[layer].resid_pre.new_zeros(len(traced.tokens))
    if against == "others":
        others = [k for k in seen_keys(traced, layer, query) if k != key]
        coefficient[others] = -1 / max(len(others), 1)
    elif against is not None:
        coefficient[against] = -1
    coefficient[key] = 1
    return coefficient


def qk_vectors(traced, layer, head, side, where):           # -> writers, (n,d_head), (n,)
    """What is added to a head's queries (side "q") or keys ("k") at the positions `where`, (T,)
    bool.

    One entry for each component written there, and one for the bias at each of these positions:
    who wrote it, (kind, layer, feature); what it adds; where.
    """
    kept = traced.cache[layer]
    m = traced.matrices[layer]
    W, b = (m.W_Q, m.b_Q) if side == "q" else (m.W_K, m.b_K)
    components = traced.components.pick(slice(traced.n_before[layer]))
    components = components.pick(where[components.position])
    bias_at = where.nonzero()[:, 0]
    positions = torch.cat([components.position, bias_at])
    normalised = components.vector / kept.scales["attn_in"][0, components.position]
    vectors = torch.cat([normalised @ W[head], b[head].expand(len(bias_at), -1)])
    if side in kept.scales:                                 # Gemma 3 normalises queries and keys
        vectors = vectors / kept.scales[side][0, positions, head]
    # entries stand where tokens would, each with its own position
    vectors = traced.model.rotate(vectors[None, :, None], layer, positions)[0, :, 0]
    columns = (components.kind.tolist(), components.layer.tolist(), components.feature.tolist())
    writers = [(KINDS[kind], written_in, feature) for kind, written_in, feature in zip(*columns)]
    writers += [("constant", -1, -1)] * len(bias_at)
    return writers, vectors, positions


# ---- the program ----


@dataclass(frozen=True)
class AttributionConfig(StudyConfig):
    prompt: str = field("When Mary and John went to the store, John gave a drink to",
                        "the prompt; BOS is put before it", positional=True)
    feature: str = field("", "the feature to take apart, as layer.feature; empty: the strongest")
    layer: int = field(-1, "layer in which to look for the strongest; -1: the last that has an "
                       "SAE. With --feature it is not used")
    position: int = field(-1, "where; 1 is the first token after BOS, -1 the last")
    share: float = field(0.03, "a contribution is shown if it is at least this part of the root")
    depth: int = field(3, "levels of the tree on the terminal")
    breadth: int = field(12, "children of each node on the terminal")
    page: bool = field(True, "write the explorer page; a long prompt through a large model takes "
                       "minutes")


def main():
    config = parse_flags(AttributionConfig, __doc__)
    study = begin(config, "attribution")
    tokens = torch.tensor([study.tokenizer.bos, *study.tokenizer.encode(config.prompt)])
    if len(tokens) < 2:
        raise UserError("the prompt is empty; give some text.")
    traced = trace_prompt(study.model, study.saes, tokens.to(study.device))
    texts = [study.tokenizer.decode([token]) for token in tokens.tolist()]
    layer, position, feature = choose_feature(traced, config)
    print("\n".join(describe(traced, texts, layer, position, feature, config)), flush=True)
    if config.page:
        print("\nwriting a page to look at every feature of every token ...", flush=True)
        content = explorer_data(traced, texts, (layer, position, feature))
        content["dashboards"] = layers_with_dashboards(study)
        pages.fill("explorer.html", pages.rounded(content), study.folder / "explorer.html")
        print(f"{study.folder}/explorer.html")


def choose_feature(traced, config):                         # -> layer, position, feature
    """The feature that the flags name, or the strongest one there."""
    position = config.position
    if position == -1:
        position = len(traced.tokens) - 1
    layer, feature = parse_feature(config.feature)
    if feature is None:
        layer = max(traced.saes) if config.layer == -1 else config.layer
        check_node(traced, layer, position, 0)
        f = traced.f[layer][position]
        feature = int(f.argmax())
        if f[feature] == 0:
            raise UserError(f"no feature of layer {layer} is active at position {position}; name "
                            f"one with --feature, or another --position.")
    check_node(traced, layer, position, feature)
    return layer, position, feature


def layers_with_dashboards(study):
    """The layers whose dashboards features.py has written, so that the page can link to them."""
    folder = study.folder.parent / "features"
    return [layer for layer in study.saes if any((folder / f"L{layer}").glob("*.js"))]


def explorer_data(traced, texts, start, n_features=15, breadth=12):
    """What the explorer page shows, as plain lists and numbers: for each (layer, position) its
    strongest features, for each of these and of the features below them the strongest children,
    and for each edge why the head looks there."""
    listed = {}
    to_expand = [start]                                     # (layer, position, feature)
    for layer, f in traced.f.items():
        for position in range(1, len(texts)):
            strongest = f[position].argsort(descending=True)[:n_features].tolist()
            active = [i for i in strongest if f[position, i] > 0]
            listed[f"{layer}.{position}"] = active
            to_expand += [(layer, position, i) for i in active]

    nodes = {}
    edges = {}
    while to_expand:
        layer, position, feature = to_expand.pop()
        name = f"{layer}.{position}.{feature}"
        if name in nodes:
            continue
        # Each feature is the root of a tree of one level; the page multiplies shares along a path.
        terms = decompose(traced, layer, position, feature)
        root = Node("feature", layer, position, feature, head=-1, value=terms.pre)
        root = expand(traced, root, terms, least=0.0, depth=1, breadth=breadth)
        nodes[name] = node_data(traced, texts, root, terms)
        for child in root.children:
            if child.feature >= 0:
                to_expand.append((child.layer, child.position, child.feature))
            edge = f"{layer}.{child.head}.{position}.{child.position}"
            if child.position >= 0 and edge not in edges:
                edges[edge] = edge_data(traced, layer, child.head, position, child.position)
    return {"tokens": texts, "listed": listed, "nodes": nodes, "qk": edges,
            "start": ".".join(map(str, start))}


def node_data(traced, texts, root, terms):
    """One feature at one position, for the page."""
    n_heads = traced.model.config.n_heads
    is_constant = terms.component < 0
    by_head = [float(terms.value[(terms.head == h) & ~is_constant].sum()) for h in range(n_heads)]
    weights = head_weights(traced.saes[root.layer].W_dec[root.feature], n_heads)
    children = [{"label": writer_at(child, texts), "layer": child.layer,
                 "position": child.position, "feature": child.feature, "head": child.head,
                 "value": child.value} for child in root.children]
    return {"pre": root.value, "f": float(traced.f[root.layer][root.position, root.feature]),
            "pruned": root.pruned, "n_pruned": root.n_pruned, "error": root.error,
            "mlp": root.mlp, "heads": by_head, "constant": float(terms.value[is_constant].sum()),
            "weights": weights.tolist(), "children": children}


def edge_data(traced, layer, head, query, key, n_pairs=6):
    """Why a head looks from one position at another, for the page."""
    why = qk(traced, layer, head, query, key, against="others")
    pairs = [{"query": writer_name(*a), "key": writer_name(*b), "value": value}
             for a, b, value in strongest_pairs(why, n_pairs)]
    return {"score": why.score, "weight": float(traced.cache[layer].pattern[0, head, query, key]),
            "pairs": pairs}


def strongest_pairs(why, n):                                # QK -> [(writer, writer, value)]
    """The n pairs with the largest contributions to a score, of either sign."""
    flat = why.pairs.flatten()
    pairs = []
    for i in flat.abs().argsort(descending=True)[:n].tolist():
        a, b = divmod(i, len(why.key))
        pairs.append((why.query[a], why.key[b], float(flat[i])))
    return pairs


# ---- the report ----


def writer_name(kind, layer, feature):
    """What wrote a component, in words."""
    return {"feature": f"feature {layer}.{feature}", "embedding": "token", "position": "position",
            "error": f"SAE error {layer}", "bias": f"bias of layer {layer}",
            "constant": "constant", "attention": f"attention {layer}", "MLP": f"MLP {layer}"}[kind]


def writer_at(node, texts):
    """What a node is, in words, and at which token it was written."""
    name = writer_name(node.kind, node.layer, node.feature)
    if node.position < 0:
        return name
    return f"{name} at {node.position} {texts[node.position]!r}"


def describe(traced, texts, layer, position, feature, config):      # -> lines
    """A feature in tables: what else is active there; its heads, sources and tree; what removing
    the features below it does; and why a head looks where the strongest child of the root was
    written."""
    lines = [" ".join(f"{i}:{text!r}" for i, text in enumerate(texts)), ""]
    for other_layer, f in traced.f.items():
        strongest = f[position].argsort(descending=True)[:6].tolist()
        shown = [f"{other_layer}.{i} {float(f[position, i]):.3f}"
                 for i in strongest if f[position, i] > 0]
        lines.append(f"active at {position} in layer {other_layer}:  " + "  ".join(shown))
    pre = decompose(traced, layer, position, feature).pre
    activation = float(traced.f[layer][position, feature])
    lines += ["", f"feature {layer}.{feature} at {position} {texts[position]!r}: pre-activation "
              f"{pre:.4f}, activation {activation:.4f}", ""]
    lines += describe_dfa(traced, texts, layer, position, feature)
    root = attribution_tree(traced, layer, position, feature, config.share, config.depth,
                            config.breadth)
    lines += ["", f"recursive DFA, in units of the root's {root.value:.4f}:"]
    lines += describe_children(texts, root, root.value)
    lines += describe_ablations(traced, texts, layer, position, feature)
    written = [child for child in root.children if child.position >= 0]
    if written:
        lines += describe_qk(traced, texts, layer, written[0].head, position, written[0].position)
    return lines


def describe_dfa(traced, texts, layer, position, feature):
    """Heads, by DFA and by weights, and the strongest sources."""
    kept = traced.cache[layer]
    sae = traced.saes[layer]
    v = values_minus_bias(traced.model, layer, kept.v)
    by_source = dfa(kept.pattern, v, sae.W_enc[:, feature])[0, :, position]         # (H,k)
    by_source = by_source[:, :position + 1]                 # there is none from later keys
    weights = head_weights(sae.W_dec[feature], len(by_source))
    constant = float(constant_part(traced.model, layer, sae)[feature])
    lines = ["head         DFA   share of decoder"]
    for h, total in enumerate(by_source.sum(1).tolist()):
        lines.append(f"{f'{layer}.{h}':8} {total:8.4f}  {float(weights[h]):8.1%}")
    lines += [f"constant {constant:8.4f}", "", "sources by DFA:"]
    all_heads = by_source.sum(0)
    for k in all_heads.abs().argsort(descending=True)[:5].tolist():
        h = int(by_source[:, k].abs().argmax())
        lines.append(f"{k:4d} {texts[k]!r:16} {float(all_heads[k]):8.4f}   of which head "
                     f"{layer}.{h} {float(by_source[h, k]):.4f}")
    return lines


def describe_children(texts, node, total, indent="  "):
    """The tree below a node as indented lines. Numbers are shares of the root, `total`; only "SAE
    errors" and "MLP outputs", in a line of smaller ones, are shares of that line's node, and count
    the children shown too."""
    lines = []
    for child in node.children:
        head = f"head {node.layer}.{child.head}"
        if child.head < 0:
            via = ": the feature's bias"
        elif child.position < 0:
            via = f": the values of {head}"
        else:
            via = f" through {head}"
        lines.append(f"{indent}{ratio(child.value, total):+7.1%}  {writer_at(child, texts)}{via}")
        lines += describe_children(texts, child, total, indent + "    ")
    if node.n_pruned and node.children:
        lines.append(f"{indent}{ratio(node.pruned, total):+7.1%}  {node.n_pruned} smaller ones; of "
                     f"this node, SAE errors are {node.error:.1%}, MLP outputs {node.mlp:.1%}")
    return lines


def describe_ablations(traced, texts, layer, position, feature, n=3):
    """The features below with the largest attribution, and what ablating each does. Attribution has
    the direct step alone, through the heads of the feature's layer; ablation has every path."""
    upstream, attributed = upstream_features(traced, layer, position, feature)
    upstream, attributed = upstream[:n], attributed[:n]
    if not len(upstream):
        return []
    lines = ["", "the strongest features below it, removed from the model one at a time, nothing "
             "frozen:"]
    drops = ablation_effects(traced, upstream, layer, position, feature)
    chosen = traced.components.pick(upstream)
    for l, k, j, value, drop in zip(chosen.layer.tolist(), chosen.position.tolist(),
                                    chosen.feature.tolist(), attributed.tolist(), drops.tolist()):
        lines.append(f"{l}.{j} at {k} {texts[k]!r}: attributed {value:+.4f} directly, over all "
                     f"heads, and the root falls by {drop:+.4f}")
    return lines


def describe_qk(traced, texts, layer, head, query, key):
    """Why a head looks where it looks."""
    why = qk(traced, layer, head, query, key, against="others")
    lines = ["", f"why head {layer}.{head} looks from {query} at {key} {texts[key]!r}: its score "
             f"is {why.score:+.2f} above the mean over other keys; the strongest pairs:"]
    for a, b, value in strongest_pairs(why, 6):
        lines.append(f"{value:+8.3f}   {writer_name(*a)}  x  {writer_name(*b)}")
    return lines


if __name__ == "__main__":
    run(main)
