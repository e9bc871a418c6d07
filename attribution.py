"""Which head, which source token, which earlier feature: attribution of SAE features (the paper, section 2).

    head weights   share[i,h] = |W_dec[i] at head h| / sum over heads of the same
    DFA            pre_i(q) = sum_{h,k} pattern[h,q,k] * (v[h,k] . w_i^h)  +  b_enc[i] - b_dec . w_i,
                   with w_i = W_enc[:,i] and w_i^h its slice at head h. What all values of a head have in
                   common (`model.value_bias`) is moved whatever a query looks at, as pattern rows sum to 1;
                   the programs take it from v (`varying`) and count it with the bias (`constants`)
    recursive DFA  v[h,k] is linear in the residual stream once norm scales are frozen, and the stream is a
                   sum of what was written to it: embeddings, earlier SAE features, their errors, biases, MLP
                   outputs. So pre_i(q) is a sum over (head, source, what was written there), and a feature
                   that was written has a pre-activation of its own, to which the same formula applies.
    QK             the score of query q and key k before soft cap, mask and softmax is a sum over pairs of
                   (what was written at q, what was written at k), with norm scales frozen.

    python attribution.py "When Mary and John went to the store, John gave a drink to"
    python attribution.py --measure         over held-out text: do the attributions agree with each other, and
                                            with what happens when a feature is removed?

The first prints the strongest feature of the last token, taken apart, and writes a page to look at all
features of all tokens, <out>/<model>/attribution/explorer.html.

Every sum is exact. That does not show that the SAE is right, since its error is one of the terms: the tests,
and --measure, remove features from the model and look.

Shapes: B batch, T positions (q query, k key/source), H heads, d_head, D = H*d_head, d_sae; N parts, that is
whatever was written to the residual stream, one row for each position and writer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import data
from data import common, pages
from data.common import UserError, bootstrap, field, parse_flags, with_interval, write_json
from data.study import StudyConfig, begin, parse_feature
from sae import ablate, check_feature

# ---- one layer: heads and sources ----


def head_weights(W_dec, n_heads):                                       # (...,D) -> (...,H)
    """Weight-based head attribution: the norm of a decoder row's slice at each head, over the sum of these
    norms; a row of zeros stays 0."""
    norms = W_dec.unflatten(-1, (n_heads, -1)).norm(dim=-1)
    return norms / norms.sum(-1, keepdim=True).clamp_min(1e-30)


def dfa(pattern, v, w_enc):                         # (B,H,q,k), (B,k,H,d_head), (D,) -> (B,H,q,k)
    """Direct feature attribution: the part of z_cat[q] . w_enc that head h moved from position k."""
    w = w_enc.unflatten(0, (v.shape[2], -1))                            # (H,d_head)
    return pattern * torch.einsum("bkhd,hd->bhk", v, w)[:, :, None]     # d_head first: no (B,q,k,D) tensor


def dfa_at(pattern, v, w_enc, q):           # (H,q,k), (k,H,d_head), (m,D), (m,) -> (m,H,k)
    """DFA of m features (rows of W_enc^T), each at its own query, in one prompt."""
    reads = torch.einsum("khd,mhd->mhk", v, w_enc.unflatten(1, (v.shape[1], -1)))
    return pattern[:, q].transpose(0, 1) * reads


def feature_bias(sae):                                                  # -> (d_sae,)
    """b_enc[i] - b_dec . W_enc[:,i]: with DFA summed over heads and sources, the pre-activation."""
    return sae.b_enc - sae.b_dec @ sae.W_enc


@torch.no_grad()
def varying(model, layer, v):                                           # (B,k,H,d_head) -> the same
    """Values less what they all have in common: their DFA says something about sources."""
    return v - model.value_bias(layer).unflatten(0, v.shape[2:])


@torch.no_grad()
def constants(model, layer, sae):                                       # -> (d_sae,)
    """With DFA of `varying` values summed over heads and sources, the pre-activation."""
    return feature_bias(sae) + model.value_bias(layer) @ sae.W_enc


def head_logits(z_cat, matrices, direction, scale=1.0):                 # (...,D), (...,d_model) -> (...,H)
    """Direct logit attribution: what each head of a layer, having gathered z_cat, writes along `direction`.

    With model.logit_directions(token) / model.final_scale(final residual stream) for the direction: what the
    head adds to that token's logit less the mean over all tokens, with the final norm's scale frozen. scale:
    the layer's scales["attn_out"], where there is one.
    """
    z = z_cat.unflatten(-1, matrices.b_V.shape)                                               # (...,H,d_head)
    return torch.einsum("...hd,hdm,...m->...h", z, matrices.W_O, direction / scale)


@torch.no_grad()
def token_effects(model, layer, sae, features):                         # int or (m,) -> (...,d_vocab)
    """W_dec[i] @ W_O @ W_U: what a feature adds to every token's logit per unit of activation, less the mean
    over all tokens, the final norm's scale being 1."""
    directions = model.logit_directions(torch.arange(model.config.d_vocab, device=sae.W_dec.device))
    return sae.W_dec[features] @ model.head_matrices(layer).W_O.flatten(0, 1) @ directions.T


def spearman(a, b):                                                     # (...,n), (...,n) -> (...)
    """Rank correlation along the last dimension; equal values share the mean of their ranks. NaN where all
    are equal."""
    def ranks(x):
        below = (x[..., None, :] < x[..., :, None]).sum(-1)
        equal = (x[..., None, :] == x[..., :, None]).sum(-1)
        centred = below + (equal - 1) / 2 - (x.shape[-1] - 1) / 2
        return centred.cpu().double()
    a, b = ranks(a), ranks(b)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


# ---- many layers: everything that was written ----

KINDS = ("embedding", "position", "feature", "bias", "error", "attention", "MLP", "constant")
EMBEDDING, POSITION, FEATURE, BIAS, ERROR, ATTENTION, MLP, CONSTANT = range(len(KINDS))


class Parts(NamedTuple):
    """The residual stream of one prompt, cut up: the parts at a position add up to the stream there.

    *feature* is f_j W_dec[j] @ W_O; *bias* is b_dec @ W_O + b_O; *error* is (z_cat - z_hat) @ W_O, each
    divided by the layer's scales["attn_out"] where it has one (Gemma 2 and 3);
    *attention* is an attention output that no SAE takes apart (BOS, which SAEs do not see, and layers without
    an SAE).
    """
    kind: Tensor            # (N,) a number of KINDS
    layer: Tensor           # (N,) where it was written; -1 for embeddings
    position: Tensor        # (N,)
    feature: Tensor         # (N,) or -1
    vector: Tensor          # (N,d_model)


class Run(NamedTuple):
    """A model's run on one prompt, with its SAEs' reading of it."""
    model: nn.Module
    saes: dict              # {layer: SAE}
    tokens: Tensor          # (T,)
    cache: dict             # {layer: LayerCache}, B = 1
    f: dict                 # {layer: (T,d_sae)}, 0 at BOS
    parts: Parts            # in the order in which they are written
    before: list            # before[layer]: how many of the parts are in the stream that the layer reads
    matrices: list          # each layer's head_matrices


@torch.no_grad()
def trace_run(model, saes, tokens):                                     # (T,) or (1,T) -> Run
    """Run the model on one prompt and cut everything that is written to the residual stream into parts."""
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    assert len(tokens) == 1, "one prompt at a time"
    kinds = {p.dtype for module in (model, *saes.values()) for p in module.parameters()}
    if len(kinds) > 1:
        raise UserError(f"the model and its SAEs are in {' and '.join(sorted(map(str, kinds)))}; attribution "
                        f"takes both in one type, such as load(..., dtype=torch.float32).")
    T, columns, f, before = tokens.shape[1], [], {}, []
    every = torch.arange(T, device=tokens.device)
    _, cache = model(tokens, keep=range(model.config.n_layers))
    all_matrices = [model.head_matrices(layer) for layer in cache]

    def add(kind, layer, positions, vectors, features=None):
        full = lambda number: torch.full_like(positions, number)
        features = full(-1) if features is None else features
        columns.append((full(kind), full(layer), positions, features, vectors))

    for name, vectors in model.embed_parts(tokens).items():
        add(KINDS.index(name), -1, every, vectors[0])
    for layer, kept in cache.items():
        before.append(sum(len(column[0]) for column in columns))
        attn_out = kept.attn_out[0]
        if layer not in saes:
            add(ATTENTION, layer, every, attn_out)
        else:
            sae, matrices = saes[layer], all_matrices[layer]
            W_O = matrices.W_O.flatten(0, 1)                            # (D,d_model)
            scale = kept.scales.get("attn_out", torch.ones_like(kept.attn_out[..., :1]))[0]         # (T,1)
            f[layer] = sae.encode(kept.z_cat[0])
            f[layer][0] = 0
            at, which = f[layer].nonzero(as_tuple=True)
            vectors = f[layer][at, which, None] * (sae.W_dec[which] @ W_O) / scale[at]
            error = kept.z_cat[0] - sae.decode(f[layer])
            add(ATTENTION, layer, every[:1], attn_out[:1])
            add(FEATURE, layer, at, vectors, which)
            add(BIAS, layer, every[1:], (sae.b_dec @ W_O + matrices.b_O) / scale[1:])
            add(ERROR, layer, every[1:], error[1:] @ W_O / scale[1:])
        add(MLP, layer, every, kept.mlp_out[0])
    return Run(model, saes, tokens[0], cache, f, Parts(*map(torch.cat, zip(*columns))), before, all_matrices)


class Children(NamedTuple):
    """What a feature's pre-activation is the sum of: one entry for each (head, part), and the constants."""
    head: Tensor            # (n,) the head that reads the part; -1 for the feature's own bias
    part: Tensor            # (n,) row of Parts, or -1 for a constant
    value: Tensor           # (n,) contribution; they sum to pre
    pre: float              # the pre-activation


@torch.no_grad()
def children(run, layer, position, feature):
    """The recursive step: feature i of a layer at query q, as a sum over heads and what was written before.

    pre_i(q) = sum_{h,n} pattern[h,q,k_n] / scale[k_n] * (part_n @ W_V[h] . w_i^h)
               + sum_h b_V[h] . w_i^h + b_enc[i] - b_dec . w_i,
    with part n a row of run.parts at position k_n, scale the layer's scales["attn_in"] in run.cache, W_V with
    the norm's gain and centring in it, and w_i^h the slice of W_enc[:,i] at head h.
    """
    kept, sae, m = run.cache[layer], run.saes[layer], run.matrices[layer]
    w = sae.W_enc[:, feature].unflatten(0, (run.model.config.n_heads, -1))                  # (H,d_head)
    reads = torch.einsum("hmd,hd->hm", m.W_V, w)                                            # (H,d_model)
    seen = (run.parts.position[:run.before[layer]] <= position).nonzero()[:, 0]             # (N,)
    k = run.parts.position[seen]
    moved = kept.pattern[0, :, position, k] / kept.scales["attn_in"][0, k, 0]               # (H,N)
    value = moved * (reads @ run.parts.vector[seen].T)                                      # (H,N)
    heads = torch.arange(len(w), device=k.device)
    constants = torch.cat([torch.einsum("hd,hd->h", m.b_V, w), feature_bias(sae)[feature, None]])   # (H+1,)
    found = Children(torch.cat([heads[:, None].expand_as(value).flatten(), heads, heads.new_tensor([-1])]),
                     torch.cat([seen.expand_as(value).flatten(), torch.full_like(constants, -1).long()]),
                     torch.cat([value.flatten(), constants]), 0.0)
    return found._replace(pre=float(found.value.sum()))


class Node(NamedTuple):
    """One node of the recursive DFA tree. Numbers are contributions to the root's pre-activation, but for the
    last two, which are shares of the node."""
    kind: str               # one of KINDS
    layer: int              # where it was written; -1 for embeddings and constants
    position: int           # where it was written; -1 for constants
    feature: int            # -1 if it is none
    head: int               # the head (of the parent's layer) that reads it; -1 for the root and for a bias
    value: float            # what it contributes to the root; the root's is its pre-activation
    children: tuple = ()    # strongest first; none for a leaf and where the depth ends
    pruned: float = 0.0     # sum of the children left out, added up one by one
    n_pruned: int = 0       # how many were left out that contribute something
    error: float = 0.0      # share of what this node read directly from SAE errors, left out or not
    mlp: float = 0.0        # the same of MLP outputs


def trace(model, saes, tokens, layer, position, feature, share=0.02, depth=3, breadth=8):
    """The recursive DFA tree of a feature at a position of one prompt (B = 1) -> Node.

    A child is kept if it contributes at least `share` of the root and is among the `breadth` strongest of its
    parent; features are taken apart down to `depth` levels. share=0 and breadth=None prune nothing: then the
    values of a node's children sum to its own. Raises UserError for a layer without SAE and for numbers out
    of range.
    """
    return tree(trace_run(model, saes, tokens), layer, position, feature, share, depth, breadth)


def tree(run, layer, position, feature, share=0.02, depth=3, breadth=8):
    """`trace` on a run that is there already."""
    check_node(run, layer, position, feature)
    found = children(run, layer, position, feature)
    root = Node("feature", layer, position, feature, -1, found.pre)
    return _expand(run, root, found, share * abs(root.value), depth, breadth)


def _expand(run, node, found, least, depth, breadth):
    parts = run.parts
    # children sum to the pre-activation: scaled to what the node contributes, but the root's, which is that
    values = found.value * (node.value / found.pre if node.head >= 0 else 1.0)
    kind = torch.where(found.part < 0, CONSTANT, parts.kind[found.part])
    order = values.abs().argsort(descending=True, stable=True)
    kept = ((values.abs()[order] >= least) & (values[order] != 0)).nonzero()[:, 0]
    kept = order[kept[:breadth]]
    left_out = torch.ones_like(kind, dtype=torch.bool)
    left_out[kept] = False
    nodes = []
    for i in kept.tolist():
        part = int(found.part[i])
        where = (int(column[part]) if part >= 0 else -1
                 for column in (parts.layer, parts.position, parts.feature))
        child = Node(KINDS[int(kind[i])], *where, int(found.head[i]), float(values[i]))
        if child.feature >= 0 and depth > 1:
            below = children(run, child.layer, child.position, child.feature)
            child = _expand(run, child, below, least, depth - 1, breadth)
        nodes.append(child)
    part_of = lambda wanted: float(values[kind == wanted].sum()) / node.value if node.value else 0.0
    n_pruned = int((left_out & (values != 0)).sum())
    return node._replace(children=tuple(nodes), pruned=float(values[left_out].sum()), n_pruned=n_pruned,
                         error=part_of(ERROR), mlp=part_of(MLP))


def check_node(run, layer, position, feature):
    """Raise UserError where there is no such layer, SAE, position or feature."""
    run.model.check_layers([layer])
    check_feature(run.saes, layer, feature)
    if not 1 <= position < len(run.tokens):
        raise UserError(f"position {position} is out of range: this prompt has positions 1 to "
                        f"{len(run.tokens) - 1} after BOS.")


# ---- why there: the score, taken apart ----


class QK(NamedTuple):
    """A score, or a difference of scores, as a sum over pairs."""
    query: list             # (a,) names of what was written at the query: (kind, layer, feature)
    key: list               # (b,) names of what was written at the keys
    pairs: Tensor           # (a,b) contributions; they sum to score
    score: float            # before soft cap, mask and softmax


@torch.no_grad()
def qk(run, layer, head, query, key, against=None):
    """Why head `head` at `query` looks at `key`: the score as a sum over (query part, key part) -> QK.

    against: None for the score itself; "others" for the score less the mean over the other keys that the
    query sees; a position for the score less that key's. Parts that are equal at all keys cancel in a
    contrast. The scales of the attention layer's norm, and of queries and keys where Gemma 3 has them, are
    frozen.
    """
    run.model.check_layers([layer])
    kept, config, m = run.cache[layer], run.model.config, run.matrices[layer]
    if not 0 <= head < config.n_heads:
        raise UserError(f"head {layer}.{head} is out of range: this model has heads 0 to "
                        f"{config.n_heads - 1}.")
    window = (getattr(config, "windows", None) or {layer: None})[layer]
    keys = [k for k in range(query + 1) if window is None or query - k < window]
    if key not in keys or against not in (None, "others", *keys) or against == key:
        raise UserError(f"position {query} of this prompt has no score of key {key} against {against}: it "
                        f"sees {keys[0]} to {keys[-1]}.")
    weight = kept.resid_pre.new_zeros(len(run.tokens))
    weight[key] = 1
    if against == "others":
        weight[[k for k in keys if k != key]] = -1 / max(len(keys) - 1, 1)
    elif against is not None:
        weight[against] -= 1

    def side(W, b, name, where):                    # -> names, vectors (n,d_head), positions (n,)
        parts = Parts(*(column[:run.before[layer]] for column in run.parts))
        parts = Parts(*(column[where[parts.position]] for column in parts))
        at = where.nonzero()[:, 0]
        vectors = torch.cat([parts.vector / kept.scales["attn_in"][0, parts.position] @ W[head],
                             b[head].expand(len(at), -1)])
        positions = torch.cat([parts.position, at])
        if name in kept.scales:
            vectors = vectors / kept.scales[name][0, positions, head]
        names = [*zip(parts.kind.tolist(), parts.layer.tolist(), parts.feature.tolist()),
                 *[(CONSTANT, -1, -1)] * len(at)]
        return names, run.model.rotate(vectors[None, :, None], layer, positions)[0, :, 0], positions

    everywhere = torch.arange(len(run.tokens), device=weight.device)
    q_names, q_vectors, _ = side(m.W_Q, m.b_Q, "q", everywhere == query)
    k_names, k_vectors, k_at = side(m.W_K, m.b_K, "k", weight != 0)
    columns = config.score_scale * q_vectors @ (weight[k_at, None] * k_vectors).T                   # (a,n)
    names = {name: i for i, name in enumerate(dict.fromkeys(k_names))}  # a writer at several keys: one column
    index = torch.tensor([names[name] for name in k_names], dtype=torch.int64, device=columns.device)
    pairs = columns.new_zeros(len(q_names), len(names)).index_add_(1, index, columns)
    label = lambda name: (KINDS[name[0]], *name[1:])
    return QK([*map(label, q_names)], [*map(label, names)], pairs, float(pairs.sum()))


# ---- do the attributions agree, with each other and with the model? ----


@torch.no_grad()
def head_agreement(model, saes, rows):                                  # (R,T) -> {layer: dict}
    """Weight-based head attribution against DFA by head, over the features that fire in `rows`.

    DFA by head of a feature is summed over the positions where it fires: z_h . w^h less the constant, which
    is DFA of `varying` values summed over sources. rank: mean over features of Spearman's correlation over
    heads; top1: how often both name the same head; with 95% bootstrap intervals over features; None where
    there is nothing to compare.
    """
    tables = {}
    for layer, sae in saes.items():
        weights, H = head_weights(sae.W_dec, model.config.n_heads), model.config.n_heads
        by_head, count = torch.zeros_like(weights), torch.zeros(sae.d_sae, device=weights.device)
        for tokens in rows.split(16):
            z = model.z_cat_at(tokens, [layer])[layer][:, 1:].flatten(0, 1)                         # (n,D)
            active, z = (sae.encode(z) != 0).to(z.dtype), z - model.value_bias(layer)
            count += active.sum(0)
            for h, (z_h, w_h) in enumerate(zip(z.unflatten(-1, (H, -1)).unbind(1),
                                               sae.W_enc.unflatten(0, (H, -1)))):
                by_head[:, h] += (active * (z_h @ w_h)).sum(0)
        live = count > 0
        rank = spearman(weights[live], by_head[live]).numpy()
        top1 = (weights[live].argmax(-1) == by_head[live].argmax(-1)).cpu().double().numpy()
        tables[layer] = {"n_fired": int(live.sum()), "n_silent": int((~live).sum())}
        for name, each in (("rank", rank[np.isfinite(rank)]), ("top1", top1)):
            mean = lambda i, each=each: float(each[i].mean())
            tables[layer] |= ({name: mean(slice(None)), name + "_ci": bootstrap(mean, len(each))} if len(each)
                              else {name: None, name + "_ci": None})
    return tables


@torch.no_grad()
def ablation_agreement(model, saes, rows, n_roots=100, n_strong=10, n_random=10, seed=0):
    """One step of recursive DFA against removal, nothing frozen: for features of the last layer that has an
    SAE at positions drawn at random, the n_strong earlier features of largest direct attribution and n_random
    others are removed one at a time, each where it fired, and the model run anew.

    Returns {"rank": mean over roots of Spearman's correlation of attribution (summed over heads) with the
    fall of the pre-activation, "sign": how often their signs agree among the strong ones, "slope": fall per
    unit attributed (least squares through 0, over all), with 95% bootstrap intervals over roots}.
    """
    rng, top = np.random.default_rng(seed), max(saes)
    ranks, signs, products, squares = [], [], [], []
    while len(ranks) < n_roots:
        if not len(rows):
            raise UserError(f"these rows have only {len(ranks)} features with {n_strong + n_random} earlier "
                            f"ones to remove, and {n_roots} are needed; raise --n-rows.")
        tokens, rows = rows[0], rows[1:]
        traced = trace_run(model, saes, tokens)
        position = int(rng.integers(min(8, len(tokens) - 1), len(tokens)))
        active = traced.f[top][position].nonzero()[:, 0]
        if not len(active):
            continue
        root = int(active[rng.integers(len(active))])
        written, value = feature_children(traced, top, position, root)
        if len(written) < n_strong + n_random:
            continue
        random = n_strong + rng.choice(len(written) - n_strong, n_random, replace=False)
        chosen = torch.from_numpy(np.concatenate([np.arange(n_strong), random])).to(tokens.device)
        attributed, fell = value[chosen], remove(traced, written[chosen], top, position, root)
        ranks.append(float(spearman(attributed, fell)))
        signs.append(float((attributed.sign() == fell.sign())[:n_strong].double().mean()))
        products.append(float((attributed * fell).sum()))
        squares.append(float(attributed.square().sum()))
    ranks, signs, products, squares = map(np.array, (ranks, signs, products, squares))
    statistics = {"rank": lambda i: ranks[i].mean(), "sign": lambda i: signs[i].mean(),
                  "slope": lambda i: products[i].sum() / squares[i].sum()}
    result = {"layer": top, "n_roots": n_roots, "n_removed": n_roots * (n_strong + n_random)}
    for name, statistic in statistics.items():
        result |= {name: float(statistic(np.arange(n_roots))), name + "_ci": bootstrap(statistic, n_roots)}
    return result


def feature_children(run, layer, position, feature):                    # -> (n,) rows of Parts, (n,) values
    """The earlier features that a feature's pre-activation was made of, summed over heads, strongest first.
    """
    found = children(run, layer, position, feature)
    mine = (found.part >= 0) & (run.parts.kind[found.part] == FEATURE)
    written, index = found.part[mine].unique(return_inverse=True)
    value = found.value.new_zeros(len(written)).index_add_(0, index, found.value[mine])
    order = value.abs().argsort(descending=True, stable=True)
    return written[order], value[order]


@torch.no_grad()
def remove(run, chosen, layer, position, feature):                      # (n,) rows of Parts -> (n,)
    """By how much a feature's pre-activation falls when each of the chosen earlier features is removed where
    it was written, the SAE's error kept and everything after it computed anew."""
    parts, n = run.parts, len(chosen)
    tokens = run.tokens.expand(n, -1)
    at = torch.arange(len(run.tokens), device=chosen.device) == parts.position[chosen, None]        # (n,T)
    edits = {}
    for source in parts.layer[chosen].unique().tolist():
        mine = parts.layer[chosen] == source
        features = torch.where(mine, parts.feature[chosen], 0)
        edits[source] = ablate(run.saes[source], features, at & mine[:, None])
    sae, after = run.saes[layer], run.model.z_cat_at(tokens, [layer], edits)[layer]
    z = torch.cat([run.cache[layer].z_cat[:, position], after[:, position]])
    pre = (z - sae.b_dec) @ sae.W_enc[:, feature] + sae.b_enc[feature]
    return pre[0] - pre[1:]


# ---- the program ----


@dataclass(frozen=True)
class AttributionConfig(StudyConfig):
    prompt: str = field("When Mary and John went to the store, John gave a drink to",
                        "the prompt; BOS is put before it", positional=True)
    feature: str = field("", "the feature to take apart, as layer.feature; empty: the strongest there")
    layer: int = field(-1, "layer of that strongest one; -1: the last that has an SAE")
    position: int = field(-1, "where; 0 is BOS, -1 the last token")
    share: float = field(0.03, "a contribution is shown if it is at least this part of the root")
    depth: int = field(3, "levels of the tree on the terminal")
    breadth: int = field(12, "children of each node on the terminal")
    page: bool = field(True, "write the explorer page; a long prompt through a large model takes minutes")
    measure: bool = field(False, "measure agreement over held-out text instead of reading a prompt")
    n_rows: int = field(256, "held-out rows for --measure")


def main():
    config = parse_flags(AttributionConfig, __doc__)
    model, tokenizer, saes, folder = begin(config, "attribution")
    if config.measure:
        measure(config, model, tokenizer, saes, folder)
        return
    tokens = torch.tensor([tokenizer.bos, *tokenizer.encode(config.prompt)],
                          device=next(model.parameters()).device)
    if len(tokens) < 2:
        raise UserError("the prompt is empty; give some text.")
    run = trace_run(model, saes, tokens)
    texts = [tokenizer.decode([i]) for i in tokens.tolist()]
    position = config.position if config.position != -1 else len(tokens) - 1
    layer, feature = parse_feature(config.feature)
    if feature is None:
        layer = config.layer if config.layer != -1 else max(saes)
        check_node(run, layer, position, 0)
        feature = int(run.f[layer][position].argmax())
        if run.f[layer][position, feature] == 0:
            raise UserError(f"no feature of layer {layer} is active at position {position}; name one with "
                            f"--feature, or another --position.")
    check_node(run, layer, position, feature)
    print(describe(run, texts, layer, position, feature, config), flush=True)
    if not config.page:
        return
    print("\nwriting a page to look at every feature of every token ...", flush=True)
    dashboards = [l for l in saes if any((folder.parent / "features" / f"L{l}").glob("*.js"))]
    content = explorer_data(run, texts, (layer, position, feature)) | {"dashboards": dashboards}
    pages.fill("explorer.html", content, folder / "explorer.html")
    print(f"{folder}/explorer.html")


def name_part(kind, layer, feature, position=-1, texts=()):
    """What wrote a part, in words, and at which token if a position is given."""
    writer = {"feature": f"feature {layer}.{feature}", "embedding": "token", "position": "position",
              "error": f"SAE error {layer}", "bias": f"bias of layer {layer}", "constant": "constant",
              "attention": f"attention {layer}", "MLP": f"MLP {layer}"}[kind]
    return f"{writer} at {position} {texts[position]!r}" if position >= 0 else writer


def describe(run, texts, layer, position, feature, config):
    """A feature in tables: what else is active there, its heads, its sources, its tree, and why there."""
    lines = [" ".join(f"{i}:{text!r}" for i, text in enumerate(texts)), ""]
    for l in run.saes:
        f = run.f[l][position]
        top = [i for i in f.argsort(descending=True)[:6].tolist() if f[i] > 0]
        lines.append(f"active at {position} in layer {l}:  "
                     + "  ".join(f"{l}.{i} {float(f[i]):.3f}" for i in top))
    found, kept, sae = children(run, layer, position, feature), run.cache[layer], run.saes[layer]
    lines += ["", f"feature {layer}.{feature} at {position} {texts[position]!r}: pre-activation "
              f"{found.pre:.4f}, activation {float(run.f[layer][position, feature]):.4f}"]
    v = varying(run.model, layer, kept.v)
    per_source = dfa(kept.pattern, v, sae.W_enc[:, feature])[0, :, position]                        # (H,k)
    weights = head_weights(sae.W_dec[feature], run.model.config.n_heads)
    lines += ["", "head         DFA   share of decoder"]
    lines += [f"{f'{layer}.{h}':8} {float(per_source[h].sum()):8.4f}  {float(weights[h]):8.1%}"
              for h in range(len(weights))]
    lines += [f"constant {float(constants(run.model, layer, sae)[feature]):8.4f}", "", "sources by DFA:"]
    for k in per_source.sum(0).abs().argsort(descending=True)[:5].tolist():
        h = int(per_source[:, k].abs().argmax())
        lines.append(f"{k:4d} {texts[k]!r:16} {float(per_source[:, k].sum()):8.4f}   most of it through head "
                     f"{layer}.{h}")
    root = tree(run, layer, position, feature, config.share, config.depth, config.breadth)
    lines += ["", f"recursive DFA, in units of the root's {root.value:.4f}:"]
    lines += outline(run, texts, root, root.value)
    written, value = (column[:3] for column in feature_children(run, layer, position, feature))
    if len(written):
        lines += ["", "the strongest features below it, removed from the model in turn, nothing frozen:"]
        for part, one, fell in zip(written.tolist(), value, remove(run, written, layer, position, feature)):
            l, k, j = (int(column[part]) for column in run.parts[1:4])
            lines.append(f"{l}.{j} at {k} {texts[k]!r}: attributed {float(one):+.4f} over all heads, and "
                         f"the root falls by {float(fell):+.4f}")
    first = next((child for child in root.children if child.position >= 0), None)
    if first and position > 1:
        why = qk(run, layer, first.head, position, first.position, "others")
        lines += ["", f"why head {layer}.{first.head} looks from {position} at {first.position} "
                  f"{texts[first.position]!r}: its score is {why.score:+.2f} above the mean over other keys; "
                  f"the strongest pairs:"]
        for i in why.pairs.abs().flatten().argsort(descending=True)[:6].tolist():
            a, b = divmod(i, len(why.key))
            pair = f"{name_part(*why.query[a])}  x  {name_part(*why.key[b])}"
            lines.append(f"{float(why.pairs[a, b]):+8.3f}   {pair}")
    return "\n".join(lines)


def outline(run, texts, node, whole, indent="  "):
    """The tree as indented lines; each number is a share of the root."""
    lines = []
    for child in node.children:
        head, via = f"head {node.layer}.{child.head}", ": the feature's bias"
        if child.head >= 0:
            via = f" through {head}" if child.position >= 0 else f": the values of {head}"
        name = name_part(child.kind, child.layer, child.feature, child.position, texts)
        lines.append(f"{indent}{child.value / whole:+7.1%}  {name}{via}")
        lines += outline(run, texts, child, whole, indent + "    ")
    if node.n_pruned and node.children:
        lines.append(f"{indent}{node.pruned / whole:+7.1%}  {node.n_pruned} smaller ones; of this node, SAE "
                     f"errors are {node.error:.1%}, MLP outputs {node.mlp:.1%}")
    return lines


def explorer_data(run, texts, start, n_features=15, breadth=12, n_pairs=6):
    """What the explorer page shows, as plain lists: for each (layer, position) the strongest features, for
    each of these and of the features below them its strongest children, and for each edge the QK contrast."""
    nodes, contrasts, listed, waiting = {}, {}, {}, [start]
    for layer, f in run.f.items():
        for position in range(1, len(texts)):
            top = f[position].argsort(descending=True)[:n_features].tolist()
            top = [i for i in top if f[position, i] > 0]
            listed[f"{layer}.{position}"] = top
            waiting += [(layer, position, i) for i in top]
    while waiting:
        layer, position, feature = waiting.pop()
        key = f"{layer}.{position}.{feature}"
        if key in nodes:
            continue
        found, H = children(run, layer, position, feature), run.model.config.n_heads
        root = _expand(run, Node("feature", layer, position, feature, -1, found.pre), found, 0.0, 1, breadth)
        nodes[key] = {"pre": root.value, "f": float(run.f[layer][position, feature]),
                      "pruned": root.pruned, "n_pruned": root.n_pruned, "error": root.error, "mlp": root.mlp,
                      "heads": [float(found.value[(found.head == h) & (found.part >= 0)].sum())
                                for h in range(H)],
                      "constant": float(found.value[found.part < 0].sum()),
                      "weights": head_weights(run.saes[layer].W_dec[feature], H).tolist(),
                      "children": [[name_part(c.kind, c.layer, c.feature, c.position, texts), c.layer,
                                    c.position, c.feature, c.head, c.value] for c in root.children]}
        waiting += [(c.layer, c.position, c.feature) for c in root.children if c.feature >= 0]
        for c in root.children:
            edge = (layer, c.head, position, c.position)
            if c.position >= 0 and (name := ".".join(map(str, edge))) not in contrasts:
                why = qk(run, *edge, "others")
                strongest = why.pairs.flatten().abs().topk(min(n_pairs, why.pairs.numel())).indices.tolist()
                pairs = [(*divmod(i, len(why.key)), float(why.pairs.flatten()[i])) for i in strongest]
                contrasts[name] = {
                    "score": why.score,
                    "weight": float(run.cache[layer].pattern[0, c.head, position, c.position]),
                    "pairs": [[name_part(*why.query[a]), name_part(*why.key[b]), value]
                              for a, b, value in pairs]}
    return _rounded({"tokens": texts, "listed": listed, "nodes": nodes, "qk": contrasts,
                     "start": ".".join(map(str, start))})


def _rounded(value):
    """Floats with five significant digits, so that the page stays small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def measure(config, model, tokenizer, saes, folder):
    """--measure: two tables, also written to agreement.json."""
    rows = next(data.rows(config.corpus, tokenizer, "held-out", min(128, model.config.n_ctx), config.n_rows,
                          repeat_share=0.0))
    rows = rows.to(next(model.parameters()).device)
    heads = head_agreement(model, saes, rows)

    shown = lambda r, name, form: with_interval(r[name], r[name + "_ci"], form)
    print(f"weight-based head attribution against DFA by head, over features that fire in {len(rows)} rows; "
          f"[95% interval]\nlayer  fired  silent    Spearman over heads       same top head")
    for layer, r in heads.items():
        print(f"{layer:5d} {r['n_fired']:6d} {r['n_silent']:7d}   {shown(r, 'rank', '.3f'):>21}  "
              f"{shown(r, 'top1', '.1%'):>22}")
    found = {"heads": {f"L{layer}": r for layer, r in heads.items()}}
    write_json(folder / "agreement.json", found)
    if len(saes) < 2:
        print("\nattribution against removal takes SAEs on two layers or more")
        return
    removal = ablation_agreement(model, saes, rows, seed=config.seed)
    print(f"\none step of recursive DFA against removal, nothing frozen: {removal['n_removed']} removals "
          f"below {removal['n_roots']} features of layer {removal['layer']}")
    print(f"Spearman {shown(removal, 'rank', '.3f')}; same sign, strongest ten "
          f"{shown(removal, 'sign', '.1%')}; fall per unit attributed {shown(removal, 'slope', '.2f')}")
    write_json(folder / "agreement.json", found | {"removal": removal})


if __name__ == "__main__":
    common.run(main)
