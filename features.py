"""What every SAE feature and every attention head does: dashboards, feature families and a census of heads,
which the paper judges by eye, here by definition.

    collect     one pass over text keeps, for every feature: how often and how strongly it is active, its
                strongest places, places from each tenth of its range, and 200 places drawn in proportion to
                activation. The rows are then gone through again for what was read there.
    families    induction      half of the activation or more has as strongest source a token that stands
                               after an earlier copy of the current token, three times as much as by chance
                current token  else by the context needed: BOS and the last n tokens keep half of the
                short-range    activation from n = 1 on, from n = 2 to 8 on, from more on
                long-range
    census      for every head, the features that lie in it most, and some that it gathers most for, grouped
                into roles by what they read
    dashboards  one page for all features and heads: index.html

    python features.py                      all of it on the shipped model, in <out>/<model>/features/
    python features.py --layers 2 --n-tokens 1e6
    python features.py --sample 30          30 live features of each layer, drawn at random, to judge by eye

A source is where a feature's activation was read from, by DFA; what all values of a head have in common (the
model's value_bias) says nothing about sources and is left out. BOS is never a source. Two tokens are copies
if they are equal but for one leading space and case (data.text.fuzzy).

Shapes: R rows, T positions (q query, k key/source), H heads, D = H*d_head, d_sae; n places, m features.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from attribution import dfa_at, head_weights, token_effects, varying
from data import common, pages
from data.common import Progress, UserError, field, parse_flags, write_json
from data.figures import plot_census, plot_families
from data.keep import Collector, rank_in_group
from data.study import StudyConfig, begin, finish, reported
from data.text import fuzzy, in_text
from sae import active, active_entries

BEFORE, AFTER, N_SOURCES = 10, 5, 8     # tokens shown around a place; sources kept of each

# ---- one pass over the text, and another for what was read ----


def collect(model, saes, stream, n_rows, n_places=200, seed=0, say=lambda done: None):
    """-> tokens (R,T) int32, {layer: Collected}. Reads at most n_rows rows of a stream of (b,T) tensors; what
    is in memory grows with the number of features, and by 4 bytes a token."""
    random, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    collectors = {layer: Collector(sae.d_sae, n_places) for layer, sae in saes.items()}
    kept, first = [], 0
    for block in stream:
        block = block[:n_rows - first]
        u = 1 - torch.rand(block.shape, generator=random)
        for layer, entries in active_entries(model, saes, block.to(device)):
            entries = type(entries)(*(column.cpu() for column in entries))
            collectors[layer].add(entries._replace(row=entries.row + first), u[entries.row, entries.q])
        kept.append(block.int())
        first += len(block)
        say(first)
        if first >= n_rows:
            break
    return torch.cat(kept), {layer: one.result() for layer, one in collectors.items()}


class Reads(NamedTuple):
    """Where the activation at n places was read from; -1: nowhere."""
    source: Tensor          # (n,) strongest source 0 < k < q, heads together
    head_source: Tensor     # (n,H) strongest source 0 < k <= q of each head
    head_value: Tensor      # (n,H) its DFA


class Shown(NamedTuple):
    """What a dashboard shows of n places."""
    window: Tensor          # (n,BEFORE+1+AFTER) the feature's activation around q; NaN outside the row
    sources: Tensor         # (n,N_SOURCES) strongest sources k <= q by |DFA|, heads together; -1: none
    by_head: Tensor         # (n,N_SOURCES,H) their DFA
    total: Tensor           # (n,H) DFA over all sources


@torch.no_grad()
def look_again(model, saes, tokens, collected, say=lambda done: None):
    """-> {layer: (Reads of the sample, Shown of the top, Shown of the spread)}."""
    device = next(model.parameters()).device
    kinds = {layer: (kept.sample, kept.top, kept.spread) for layer, kept in collected.items()}
    orders = {layer: [one.row.argsort(stable=True) for one in three] for layer, three in kinds.items()}
    found = {layer: ([], [], []) for layer in saes}
    for first in range(0, len(tokens), 32):
        part = tokens[first:first + 32].long().to(device)
        rows = torch.arange(first, first + len(part) + 1)
        for layer, cache in model.layer_by_layer(part, max(saes) + 1):
            if layer not in saes:
                continue
            sae, v = saes[layer], varying(model, layer, cache.v)
            for kind, (entries, order) in enumerate(zip(kinds[layer], orders[layer])):
                starts = torch.searchsorted(entries.row[order], rows).tolist()
                for i, (start, end) in enumerate(zip(starts, starts[1:])):
                    if start == end:
                        continue
                    mine = order[start:end]
                    feature, q = entries.feature[mine].to(device), entries.q[mine].to(device)
                    moved = dfa_at(cache.pattern[i], v[i], sae.W_enc.T[feature], q)                 # (m,H,k)
                    new = (shown_of(moved, sae.activation(cache.z_cat[i], feature).T, q) if kind else
                           reads_of(moved, q))
                    found[layer][kind].append([column.cpu() for column in new])
        say(min(first + 32, len(tokens)))
    back = lambda parts, order: [torch.cat(column)[order.argsort()] for column in zip(*parts)]
    return {layer: [kind(*back(parts, order)) for kind, parts, order in
                    zip((Reads, Shown, Shown), found[layer], orders[layer])] for layer in saes}


def reads_of(moved, q):                                 # (m,H,k), (m,) -> Reads
    """The strongest sources."""
    k = torch.arange(moved.shape[2], device=q.device)
    before, up_to = ((k > 0) & (k < q[:, None] + more) for more in (0, 1))
    source = moved.sum(1).masked_fill(~before, -torch.inf).argmax(-1)
    value, head_source = moved.masked_fill(~up_to[:, None], -torch.inf).max(-1)
    return Reads(torch.where(before.any(-1), source, -1).short(), head_source.short(), value)


def shown_of(moved, f, q):                              # (m,H,k), (m,T), (m,) -> Shown
    """The window around q and the strongest sources, BOS among them: what it adds belongs to the sum."""
    around = q[:, None] + torch.arange(-BEFORE, AFTER + 1, device=q.device)
    window = f.gather(1, around.clamp(0, f.shape[1] - 1))
    window = window.masked_fill((around < 1) | (around >= f.shape[1]), torch.nan)
    sources = moved.sum(1).abs().topk(min(N_SOURCES, moved.shape[2])).indices                       # (m,8)
    by_head = moved.gather(2, sources[:, None].expand(-1, moved.shape[1], -1)).transpose(1, 2)
    return Shown(window.half(), torch.where(sources <= q[:, None], sources, -1).short(), by_head,
                 moved.sum(-1))


# ---- families ----

FAMILIES = ("induction", "current token", "short-range", "long-range", "unstable", "too rare")
CONTEXTS = (1, 2, 4, 8, 16, 32)     # numbers of tokens, q's own included, that are left
SHARE, TIMES, KEPT = 0.5, 3.0, 0.5  # thresholds: induction's share, its ratio to chance, activation kept
MIN_PLACES = 20                     # a feature measured at fewer places is too rare to be classed


class Context(NamedTuple):
    """Share of each feature's activation that BOS and the last n tokens keep; NaN if it was never active."""
    cut: Tensor             # (d_sae,len(CONTEXTS)) what stood before was cut off
    replaced: Tensor        # (d_sae,len(CONTEXTS)) it was replaced by another row's, so that positions stay
    n: Tensor               # (d_sae,len(CONTEXTS)) active places behind `cut`


class Families(NamedTuple):
    """One layer's features, by what decides their family; NaN where there is nothing to tell it from."""
    induction: Tensor       # (d_sae,) share of activation read after an earlier copy of the current token
    chance: Tensor          # (d_sae,) the same of sources at the same distances in its other examples
    X: Tensor               # (d_sae,) the commonest token read there; -1: none
    X_share: Tensor         # (d_sae,) its share of what is read there
    context: Context


def is_copy(classes, row, q, k):                        # (R,T), (n,), (n,), (n,) -> (n,) bool
    """Whether the tokens at q and k are copies; never for BOS."""
    own = classes[row, q]
    return (own >= 0) & (k > 0) & (own == classes[row, k.clamp_min(0)])


def share_of(feature, weight, d_sae):                   # (n,), (n,) -> function
    """A function from numbers in [0,1] at the places, and how much each counts, to each feature's share of
    activation: weighted means; NaN for features without any."""
    def share(hit, counts=1.0):                         # (n,) -> (d_sae,)
        w = weight.double() * counts
        total, hits = (torch.bincount(feature, x, minlength=d_sae) for x in (w, w * hit))
        return hits / total
    return share


def by_chance(entries, source, test, seed, times=8):    # -> (n,) share of hits, (n,) whether there was a try
    """How often `test(row, q, k)` holds for a source at the same distance in other places of the feature,
    drawn at random, `times` for each place."""
    generator, feature = torch.Generator().manual_seed(seed), entries.feature
    place, start = torch.arange(len(feature)), torch.searchsorted(feature, feature)
    count = torch.bincount(feature)[feature]
    hits, tries = torch.zeros(len(feature)), torch.zeros(len(feature))
    for _ in range(times):
        step = 1 + (torch.rand(len(feature), generator=generator) * (count - 1)).long()
        other = start + (place - start + step) % count
        row, q = entries.row[other], entries.q[other]
        k = q - (entries.q - source)
        there = (count > 1) & (source > 0) & (k > 0)
        hits += test(row, q, k) & there
        tries += there
    return hits / tries.clamp_min(1), tries > 0


def induction_shares(kept, reads, tokens, classes, seed=0):     # -> induction, chance, X, X_share
    """The first four of Families, each (d_sae,)."""
    entries, d_sae, source = kept.sample, len(kept.n), reads.source.long()
    share = share_of(entries.feature, kept.weight, d_sae)
    follows = lambda row, q, k: is_copy(classes, row, q, k - 1)
    hit = follows(entries.row, entries.q, source)
    pair, mass = token_mass(entries.pick(hit), source[hit], kept.weight[hit], tokens)
    X, X_share = torch.full((d_sae,), -1), torch.full((d_sae,), torch.nan, dtype=torch.float64)
    first = rank_in_group(pair[:, 0]) == 0
    feature, total = pair[first, 0], torch.bincount(pair[:, 0], mass, minlength=d_sae)
    X[feature], X_share[feature] = pair[first, 1], mass[first] / total[feature]
    return share(hit), share(*by_chance(entries, source, follows, seed)), X, X_share


def token_mass(entries, at, weight, tokens):            # -> (m,2) feature and token, (m,) float64
    """How much of each feature's activation has each token at the position `at` (n,); feature by feature,
    largest first."""
    V = int(tokens.max()) + 1
    pair, index = (entries.feature * V + tokens[entries.row, at]).unique(return_inverse=True)
    mass = torch.zeros(len(pair), dtype=torch.float64).index_add_(0, index, weight.double())
    order = torch.from_numpy(np.lexsort((-mass.numpy(), (pair // V).numpy())))
    return torch.stack([pair // V, pair % V], 1)[order], mass[order]


@torch.no_grad()
def context_shares(model, saes, tokens, per_row=12, replaced_per_row=4, seed=0, say=lambda done: None):
    """What is left of the features when earlier tokens are gone -> {layer: Context}.

    A row is cut before a position c; BOS and the tokens from c on are left, so that position c + n - 1 sees
    BOS and the last n tokens, for every n at once. The cuts are drawn at random, each with a quarter of a row
    or more before it. Counted are the places where a feature is active in the whole row, each by its
    activation there, and of none more is kept than it had. Products are in bfloat16 where that is faster, in
    the whole rows too.
    """
    random, T, device = torch.Generator().manual_seed(seed), tokens.shape[1], next(model.parameters()).device
    zeros = lambda sae: torch.zeros(5, sae.d_sae, len(CONTEXTS), dtype=torch.float64)
    sums = {layer: zeros(sae) for layer, sae in saes.items()}
    n = torch.tensor([n for n in CONTEXTS if n <= T // 2])
    longest, t = int(n[-1]), torch.arange(T)
    for first in range(0, len(tokens), 32):
        part = tokens[first:first + 32].long()
        row = torch.arange(len(part)).repeat_interleave(per_row)
        c = torch.randint(T // 4, T - longest + 1, (len(row), 1), generator=random)
        cut = torch.cat([part[row, :1], part[row[:, None], c + t[:longest]]], 1)            # (m,1+longest)
        few = torch.arange(len(row)) % per_row < replaced_per_row
        other = tokens[torch.randint(len(tokens), (int(few.sum()),), generator=random)].long()
        replaced = torch.where((t > 0) & (t < c[few]), other, part[row[few]])               # (m,T)
        whole, cut, replaced = (model.z_cat_fast(rows.to(device), saes) for rows in (part, cut, replaced))
        for layer, sae in saes.items():
            before = whole[layer].cpu()[row[:, None], c + n - 1]                            # (m,n,D)
            after = replaced[layer].cpu()[torch.arange(len(replaced[layer]))[:, None], c[few] + n - 1]
            sums[layer][:3] += kept_of(sae, before, cut[layer].cpu()[:, n])
            sums[layer][3:] += kept_of(sae, before[few], after)[:2]
        say(min(first + 32, len(tokens)))
    return {layer: Context(one[0] / one[1], one[3] / one[4], one[2]) for layer, one in sums.items()}


def kept_of(sae, before, after):                        # (m,n,D) each -> (3,d_sae,len(CONTEXTS))
    """Sums over places where a feature is active before: of what it keeps after, of what it had, of 1."""
    device = sae.b_dec.device
    entries = active(sae, before.to(device))            # its `row` counts cuts, its `q` contexts
    z, place = after.to(device).flatten(0, 1), entries.row * after.shape[1] + entries.q
    pre = torch.cat([torch.einsum("nd,nd->n", z[i] - sae.b_dec, sae.W_enc.T[j])
                     for i, j in zip(place.split(2**15), entries.feature.split(2**15))])
    pre += sae.b_enc[entries.feature]
    f = torch.minimum(pre * (pre > sae.threshold[entries.feature]), entries.f)
    where, size = (entries.feature * len(CONTEXTS) + entries.q).cpu(), sae.d_sae * len(CONTEXTS)
    sums = [torch.bincount(where, x.cpu().double(), minlength=size)
            for x in (f, entries.f, torch.ones_like(f))]
    return torch.stack(sums).unflatten(1, (-1, len(CONTEXTS)))


def context_needed(cut, least=KEPT):                    # (d_sae,len(CONTEXTS)) -> (d_sae,), (d_sae,) bool
    """The place in CONTEXTS of the smallest n from which on the activation is kept, len(CONTEXTS) if there is
    none; and whether some shorter context kept it as well, so that it comes and goes. NaN counts as kept."""
    short, index = cut < least, torch.arange(len(CONTEXTS))
    needed = (short * (index + 1)).amax(1)
    return needed, (~short & (index < needed[:, None])).any(1)


def family_of(families, n, share=SHARE, times=TIMES, least=KEPT):       # Families, (d_sae,) -> (d_sae,)
    """The place in FAMILIES of each feature, n being the number of places where it was active; -1 for those
    that never were."""
    needed, unstable = context_needed(families.context.cut, least)
    found = torch.where(needed == 0, 1, torch.where(needed <= CONTEXTS.index(8), 2, 3))
    found[unstable] = 4
    found[families.context.n.amax(1) < MIN_PLACES] = 5
    chance = families.chance.nan_to_num(0.0)
    found[(families.induction >= share) & (families.induction >= times * chance)] = 0
    found[n < MIN_PLACES] = 5
    found[n == 0] = -1
    return found


def count_families(families, n):                        # -> {variant: {family: number of features}}
    """As defined; where earlier tokens are replaced and not cut off; and with each threshold lower and
    higher. Each with the number of induction features that read one token X half of the time or more."""
    replaced = families._replace(context=families.context._replace(cut=families.context.replaced))
    variants = {"as defined": (families, {}), "replaced": (replaced, {})}
    for name, values in (("share", (SHARE / 2, 1.5 * SHARE)), ("times", (TIMES / 2, 2 * TIMES)),
                         ("least", (KEPT / 2, 1.5 * KEPT))):
        variants |= {f"{name} {value:g}": (families, {name: value}) for value in values}
    counted = {}
    for label, (measured, thresholds) in variants.items():
        family = family_of(measured, n, **thresholds)
        times = torch.bincount(family[family >= 0], minlength=len(FAMILIES))
        counted[label] = dict(zip(FAMILIES, times.tolist()))
        counted[label]["one X"] = int(((family == 0) & (families.X_share >= 0.5)).sum())
    return counted


# ---- the head census ----

RELATIONS = ("itself", "the token before", "a token after a copy", "a copy")
TOPS, N_DRAWN = (10, 25, 50), 50    # how many of a head's features are looked at, of each choice
TOP, DRAWN = f"top {TOPS[1]}", f"{N_DRAWN} drawn"           # the two that are told in words
CHOICES = {f"top {n}": n for n in TOPS} | {DRAWN: N_DRAWN}
ALIKE = (0.4, 0.5, 0.6)             # similarities from which on a role is shared: see tests/calibrate.py
MANY = 1.5                          # a head whose features have more roles than this is polysemantic


class Profiles(NamedTuple):
    """How m features read from and write to one head."""
    relations: Tensor       # (m,len(RELATIONS)) share of what the head gathers that it reads there
    fire: Tensor            # (m,d_model) mean embedding of the tokens at which they are active
    read: Tensor            # (m,d_model) mean embedding of the tokens read
    write: Tensor           # (m,d_model) W_dec[i] at the head @ W_O


def head_profiles(kept, reads, head, tokens, classes, features, embedding, W_dec, matrices, seed=0):
    """Profiles of some features (m,), as far as one head gathers their activation.

    A place counts by the part of the activation that comes from the head's strongest source. Relations
    exclude one another, in the order of RELATIONS; those to a copy are less what the same distances give in
    other places, (share - chance) / (1 - chance), since frequent tokens have copies everywhere.
    """
    entries, d_sae, (row, q, feature, _) = kept.sample, len(kept.n), kept.sample
    k, weight = reads.head_source[:, head].long(), gathered(kept, reads, head)
    share, shares = share_of(feature, weight, d_sae), []
    after = lambda row, q, k: (k < q - 1) & is_copy(classes, row, q, k - 1)
    copy = lambda row, q, k: (k < q - 1) & is_copy(classes, row, q, k) & ~after(row, q, k)
    for test in (after, copy):
        seen, chance = share(test(row, q, k)), share(*by_chance(entries, k, test, seed)).nan_to_num(0.0)
        shares.append(((seen - chance) / (1 - chance)).clamp_min(0))
    relations = torch.stack([share(k == q), share(k == q - 1), *shares], 1)[features].nan_to_num(0.0).float()
    number = torch.full((d_sae,), -1)
    number[features] = torch.arange(len(features))
    mine = number[feature] >= 0
    i, w, row = number[feature[mine]], weight[mine, None], row[mine]
    mean = lambda at: torch.zeros(len(features), embedding.shape[1]).index_add_(
        0, i, w * embedding[tokens[row, at[mine]].long()])
    W_head = W_dec[features].unflatten(1, matrices.b_V.shape)[:, head]
    return Profiles(relations, mean(q), mean(k), W_head @ matrices.W_O[head])


def similarity(p):                                      # Profiles -> (m,m)
    """sum over relations of min(share_i, share_j), plus min(rest_i, rest_j) * content.

    A relation is the same whatever the tokens are: all "X is next by induction" features have one role. What
    is read in no such relation, the rest, is alike as far as the features fire on, read and write alike:
    content is the mean of three cosines, negative ones being 0.
    """
    both = torch.minimum(p.relations[:, None], p.relations).sum(-1)
    rest = (1 - p.relations.sum(1)).clamp_min(0)
    unit = (F.normalize(vectors, dim=1) for vectors in (p.fire, p.read, p.write))
    content = sum((one @ one.T).clamp_min(0) for one in unit) / 3
    return both + torch.minimum(rest[:, None], rest) * content


def roles(alike, least):                                # (m,m) -> list of lists of 0 .. m-1
    """Features in groups: the one that most others are like, with these others; then the same again."""
    near, left, groups = alike >= least, torch.ones(len(alike), dtype=torch.bool), []
    near.fill_diagonal_(True)
    while left.any():
        leader = int(((near & left).sum(1) * left).argmax())
        groups.append((near[leader] & left).nonzero()[:, 0].tolist())
        left[groups[-1]] = False
    return groups


def number_of_roles(groups):
    """1 / (probability that two different features share a role); infinite if no two do. It does not grow
    with the number of features by itself."""
    n, pairs = sum(map(len, groups)), sum(len(g) * (len(g) - 1) for g in groups)
    return n * (n - 1) / pairs if pairs else float("inf")


def gathered(kept, reads, head):                        # -> (n,)
    """How much of its feature's activation each place of the sample stands for that comes from the strongest
    source of one head."""
    return kept.weight / kept.sample.f * reads.head_value[:, head].clamp_min(0)


def head_census(model, sae, layer, kept, reads, tokens, classes, family, similarities=ALIKE, seed=0):
    """What each head of a layer does -> list of dicts, one a head.

    Looked at are features active at MIN_PLACES places or more, of two choices: those with the largest weight
    in the head (attribution.head_weights), as the paper does; and, since these need not be what the head does
    most, features drawn in proportion to the activation that it gathers. "roles": {one of CHOICES:
    {similarity: number of roles}}, None where there are fewer features. "features": the top TOPS[-1]. "top"
    (the first TOPS[1] of them) and "drawn" say more: "features"; their "weights" in the head; "relations",
    what is read for them through it; "families", how many are in each; "groups", their roles at the middle
    similarity, largest first, with what they read.
    """
    weights = head_weights(sae.W_dec, model.config.n_heads).cpu()
    W_dec, usual, census = sae.W_dec.cpu(), kept.n >= MIN_PLACES, []
    embedding, matrices = token_embeddings(model, tokens), model.head_matrices(layer)
    matrices = type(matrices)(*(one.cpu() for one in matrices))

    def described(h, features, p, alike):
        groups, source = roles(alike, similarities[len(similarities) // 2]), reads.head_source[:, h]
        return {"features": features.tolist(), "weights": weights[features, h].tolist(),
                "relations": p.relations.sum(0).div(max(len(features), 1)).tolist(),
                "families": {name: int((family[features] == i).sum()) for i, name in enumerate(FAMILIES)},
                "groups": [{"features": features[g].tolist(), "relations": p.relations[g].mean(0).tolist(),
                            **typical(kept.sample, source, tokens, features[g])} for g in groups]}

    for h in range(model.config.n_heads):
        top = torch.where(usual, weights[:, h], -1).argsort(descending=True)[:int(usual.sum())][:TOPS[-1]]
        mass = torch.bincount(kept.sample.feature, gathered(kept, reads, h), minlength=len(usual)) * usual
        random = torch.Generator().manual_seed(seed * 1000 + h)
        n_drawn = min(N_DRAWN, int((mass > 0).sum()))
        drawn = (torch.multinomial(mass, n_drawn, generator=random) if n_drawn else
                 torch.empty(0, dtype=torch.int64))
        looked = {}
        for features, names in ((top, [f"top {n}" for n in TOPS]), (drawn, [DRAWN])):
            p = head_profiles(kept, reads, h, tokens, classes, features, embedding, W_dec, matrices, seed)
            alike = similarity(p)
            for name in names:          # each choice is the first n of these features
                n = CHOICES[name]
                looked[name] = features[:n], Profiles(*(column[:n] for column in p)), alike[:n, :n]
        found = {name: {least: number_of_roles(roles(alike, least)) if len(alike) == CHOICES[name] else None
                        for least in similarities} for name, (_, _, alike) in looked.items()}
        census.append({"layer": layer, "head": h, "name": f"{layer}.{h}", "features": top.tolist(),
                       "roles": found, "top": described(h, *looked[TOP]),
                       "drawn": described(h, *looked[DRAWN])})
    return census


def token_embeddings(model, tokens):                    # -> (V,d_model) unit vectors, on the CPU
    """Each token's embedding, less the mean over the text."""
    every = torch.arange(int(tokens.max()) + 1, device=next(model.parameters()).device)
    rows = torch.cat([model.embed_parts(part[:, None])["embedding"][:, 0] for part in every.split(4096)])
    times = torch.bincount(tokens.flatten().long(), minlength=len(rows)).to(rows)
    return F.normalize(rows - times @ rows / times.sum(), dim=1).cpu()


def typical(entries, source, tokens, features, n=3):    # -> {"at": token ids, "reads": token ids}
    """The tokens at which some features are active, and those read there, that stand out from the text: with
    the largest p log(p / share of the text)."""
    mine = torch.isin(entries.feature, features)
    base = torch.bincount(tokens.flatten().long()).double() / tokens.numel()

    def standing_out(at):
        times = torch.bincount(tokens[entries.row[mine], at[mine].long()].long(), minlength=len(base))
        p = times.double() / times.sum()
        score = torch.where(p > base, p * (p / base).log(), 0.0).nan_to_num(0.0)
        return [i for i in score.argsort(descending=True)[:n].tolist() if score[i] > 0]

    return {"at": standing_out(entries.q), "reads": standing_out(source)}


# ---- in numbers and words ----


def logit_effects(model, sae, layer, features, n=20):   # (m,) -> [[id, effect], ...] raised, and lowered
    """The tokens that each feature raises and lowers most; see attribution.token_effects."""
    found = [], []
    for some in features.to(sae.W_dec.device).split(256):
        effects = token_effects(model, layer, sae, some)                                            # (m,V)
        for sign, lists in zip((1, -1), found):
            values, ids = (sign * effects).topk(min(n, effects.shape[1]))
            lists += [[[i, round(sign * x, 3)] for i, x in zip(*pair)]
                      for pair in zip(ids.tolist(), values.tolist())]
    return found


def describe_features(model, sae, layer, kept, families, family, tokens, tokenizer):
    """Every live feature in plain numbers -> list of dicts."""
    live = (kept.n > 0).nonzero()[:, 0]
    raised, lowered = logit_effects(model, sae, layer, live)
    weights, needed = head_weights(sae.W_dec, model.config.n_heads), context_needed(families.context.cut)[0]
    pair, _ = token_mass(kept.sample, kept.sample.q, kept.weight, tokens)
    pair = pair[rank_in_group(pair[:, 0]) < 3]
    fires = {}
    for i, token in pair.tolist():
        fires.setdefault(i, []).append(token)
    plain = lambda x: [None if one != one else round(one, 4) for one in x.tolist()]
    shares = torch.stack([families.induction, families.chance, families.X_share], 1)
    return [{"feature": i, "n": int(kept.n[i]), "frequency": float(kept.n[i]) / tokens[:, 1:].numel(),
             "mean": float(kept.mass[i] / kept.n[i]), "largest": float(f"{kept.largest[i]:.4g}"),
             "family": FAMILIES[int(family[i])], "evidence": evidence(families, family, i, tokenizer.decode),
             **dict(zip(("induction", "chance", "X_share"), plain(shares[i]))), "X": int(families.X[i]),
             "context": int(needed[i]), "cut": plain(families.context.cut[i]),
             "replaced": plain(families.context.replaced[i]), "head_weights": plain(weights[i]),
             "fires_on": fires[i], "raises": up, "lowers": down}
            for i, up, down in zip(live.tolist(), raised, lowered)]


def evidence(families, family, i, decode):
    """In words, why a feature is in its family."""
    percent = lambda x: "n/a" if x != x else f"{float(x):.0%}"
    cut, needed = families.context.cut[i].tolist(), int(context_needed(families.context.cut)[0][i])
    induction = (f"{percent(families.induction[i])} of the activation has as strongest source a token after "
                 f"an earlier copy of the current one ({percent(families.chance[i])} at the same distances "
                 f"in its other examples)")
    name = FAMILIES[int(family[i])]
    if name == "induction":
        return (f"{induction}; the commonest token read there is {decode([int(families.X[i])])!r}, "
                f"{percent(families.X_share[i])} of it.")
    if name in ("too rare", "unstable"):
        why = {"too rare": "Active at too few places to tell",
               "unstable": "Comes and goes as the context grows"}
        return f"{why[name]}; {induction}."
    last = min(needed, len(CONTEXTS) - 1)
    left = lambda i: "the current token" if i == 0 else f"the last {CONTEXTS[i]} tokens"
    kept = f"BOS and {left(last)} keep {percent(cut[last])} of the activation"
    fewer = f", {left(last - 1)} {percent(cut[last - 1])}" if 0 < needed <= last else ""
    return f"{kept}{fewer}; {induction}."


def in_words(one, decode):
    """A line about some features of a head ("top" or "drawn" of the census), built from what was measured."""
    quoted = lambda ids: " ".join(repr(decode([i])) for i in ids) or "nothing that stands out"
    read = [f"{share:.0%} {name}" for name, share in zip(RELATIONS, one["relations"]) if share >= 0.05]
    groups = []
    for g in one["groups"][:3]:
        share, name = max(zip(g["relations"], RELATIONS))
        what = name if share >= 0.5 else f"{quoted(g['reads'])} at {quoted(g['at'])}"
        groups.append(f"{len(g['features'])} read {what}")
    families = ", ".join(f"{n} {name}" for name, n in one["families"].items() if n)
    rest, weights = f"{1 - sum(one['relations']):.0%} elsewhere", one["weights"] or [0]
    return (f"reads {', '.join([*read, rest])}. Roles: {'; '.join(groups)}. Features: {families}; they lie "
            f"in it by {min(weights):.0%} to {max(weights):.0%}")


def in_number(x, n):
    """A number of roles among n features."""
    return "n/a" if x is None else f"> {n}" if x == float("inf") else f"{x:.1f}"


# ---- the program ----


@dataclass(frozen=True)
class FeaturesConfig(StudyConfig):
    layers: tuple[int, ...] = field((), "layers, such as 0,2; all that have an SAE if not given")
    n_tokens: int = field(500_000, "tokens of text (paper: 1e6)")
    n_places: int = field(200, "places of each feature, drawn in proportion to activation")
    sample: int = field(0, "live features of each layer to list, drawn at random, to judge by eye")
    pages: bool = field(True, "write the dashboards: 10 to 15 kB a feature")


def main():
    config = parse_flags(FeaturesConfig, __doc__)
    model, tokenizer, saes, folder = begin(config, "features", config.layers)
    T = min(128, model.config.n_ctx)
    n_rows = config.n_tokens // (T - 1)
    if n_rows < 16:
        raise UserError(f"--n-tokens must be {16 * (T - 1)} or more, not {config.n_tokens}.")
    if config.n_places < 10 or config.sample < 0:
        raise UserError("--n-places must be 10 or more, and --sample at least 0.")
    stream = data.rows(config.corpus, tokenizer, "held-out", T, 128, config.seed, repeat_share=0.0)

    def progress(what, n):
        print(what, flush=True)
        return Progress(n, "rows")

    tokens, collected = collect(model, saes, stream, n_rows, config.n_places, config.seed,
                                progress("reading text", n_rows))
    if len(tokens) < 16:
        raise UserError(f"--corpus {config.corpus} gave {len(tokens)} held-out rows, and 16 are needed; give "
                        f"more text.")
    looked = look_again(model, saes, tokens, collected, progress("what was read there", len(tokens)))
    contexts = context_shares(model, saes, tokens, seed=config.seed,
                              say=progress("how much context is needed", len(tokens)))
    classes = fuzzy(tokenizer)[tokens.long()]
    families, family, records, census = {}, {}, {}, []
    for layer, sae in saes.items():
        kept, reads = collected[layer], looked[layer][0]
        families[layer] = Families(*induction_shares(kept, reads, tokens, classes, config.seed),
                                   contexts[layer])
        family[layer] = family_of(families[layer], kept.n)
        records[layer] = describe_features(model, sae, layer, kept, families[layer], family[layer], tokens,
                                           tokenizer)
        census += head_census(model, sae, layer, kept, reads, tokens, classes, family[layer],
                              seed=config.seed)
    report_families(families, family, collected, folder)
    report_heads(model, census, tokenizer, folder)
    reported(config, "14 of 144 heads plausibly monosemantic, so at least 90% polysemantic, judged by eye on "
             "the top 10 features of each")
    for layer, found in records.items():
        write_json(folder / f"L{layer}" / "features.json",
                   {"n_tokens": tokens[:, 1:].numel(), "features": found})
    if config.pages:
        print("\nwriting the dashboards ...", flush=True)
        for layer, kept in collected.items():
            pages.write_features(folder, layer, tokens, kept, *looked[layer][1:], records[layer], BEFORE)
        content = index_page(config, model.config.n_heads, tokens, records, census, tokenizer)
        pages.fill("dashboard.html", content, folder / "index.html")
        print(f"{folder}/index.html")
    if config.sample:
        list_sample(config, collected, records, tokens, tokenizer, folder)
    finish(config, folder)


def report_families(families, family, collected, folder):
    """Counts by layer, as defined and in its variants; the figure of the two axes."""
    counts = {layer: count_families(families[layer], collected[layer].n) for layer in families}
    print("\nfeatures by family; replaced: what stood before is replaced by other text, not cut off; "
          "share and times:\ninduction's thresholds; least: the activation kept; one X: induction features "
          "that read one token half of the time\nlayer  variant      "
          + "".join(f"{name:>15}" for name in FAMILIES) + "  one X")
    for layer, by_label in counts.items():
        for label, found in by_label.items():
            print(f"{layer:5d}  {label:12} " + "".join(f"{found[name]:15d}" for name in FAMILIES)
                  + f"{found['one X']:7d}")
    write_json(folder / "families.json", {"share": SHARE, "times": TIMES, "least": KEPT, "contexts": CONTEXTS,
                                          "layers": {f"L{layer}": c for layer, c in counts.items()}})
    axes = {layer: (context_needed(one.context.cut)[0].numpy(), one.induction.numpy(), family[layer].numpy())
            for layer, one in families.items()}
    plot_families(axes, FAMILIES, CONTEXTS, folder / "families.png")


def report_heads(model, census, tokenizer, folder):
    """Roles of every head and two lines about it, added to the census as "text"; how many heads are
    polysemantic, and how many are so whatever is looked at."""
    print(f"\nroles of the features that lie in each head most, and of {N_DRAWN} drawn by what it gathers; "
          f"in brackets at similarity {ALIKE[0]} and {ALIKE[2]}\nhead "
          + "".join(f"{name:>22}" for name in CHOICES))
    for one in census:
        one["text"] = {key: in_words(one[key], tokenizer.decode) for key in ("top", "drawn")}
        shown = ([in_number(one["roles"][name][least], n) for least in ALIKE] for name, n in CHOICES.items())
        print(f"{one['name']:5}" + "".join(f"{b:>8} [{a:>5}, {c:>5}]" for a, b, c in shown))
    print(f"\nwhat they read: the top {TOPS[1]}, and below them the {N_DRAWN} drawn")
    for one in census:
        print(f"{one['name']:5} {one['text']['top']}\n      {one['text']['drawn']}")
    verdicts, found = [[] for _ in census], {}
    print(f"\npolysemantic heads (more than {MANY} roles)\n{'similarity':12}"
          + "".join(f"{least:>10}" for least in ALIKE))
    for name in CHOICES:
        shown = []
        for least in ALIKE:
            known = [(at, one["roles"][name][least] > MANY) for at, one in enumerate(census)
                     if one["roles"][name][least] is not None]
            for at, many in known:
                verdicts[at].append(many)
            found[f"{name}, similarity {least}"] = {"polysemantic": sum(many for _, many in known),
                                                    "heads": len(known)}
            shown.append(f"{sum(many for _, many in known)} of {len(known)}")
        print(f"{name:12}" + "".join(f"{text:>10}" for text in shown))
    verdicts = [each for each in verdicts if each]          # heads with enough features to tell
    always, never = sum(map(all, verdicts)), sum(not any(each) for each in verdicts)
    print(f"by every choice and similarity {always}, by none {never}, by some "
          f"{len(verdicts) - always - never}")
    finite = lambda x: None if x is None or x == float("inf") else x
    write_json(folder / "census.json", {
        "similarities": ALIKE, "many": MANY, "polysemantic": found,
        "heads": [one | {"roles": {name: {least: finite(x) for least, x in by.items()}
                                   for name, by in one["roles"].items()}} for one in census]})
    plot_census(census, CHOICES, ALIKE, MANY, folder / "census.png")


def index_page(config, n_heads, tokens, records, census, tokenizer):
    """What index.html shows: a row for each live feature, column by column, and one for each head."""
    columns = {}
    for layer, found in records.items():
        of = lambda name: [r[name] for r in found]
        best = [int(np.argmax(weights)) for weights in of("head_weights")]
        columns[layer] = {
            "feature": of("feature"), "family": [FAMILIES.index(name) for name in of("family")],
            "frequency": [float(f"{x:.3g}") for x in of("frequency")], "largest": of("largest"), "head": best,
            "weight": [weights[h] for weights, h in zip(of("head_weights"), best)],
            "induction": of("induction"), "context": of("context"), "fires": of("fires_on"),
            "logits": [[i for i, _ in pairs[:3]] for pairs in of("raises")]}

    def shown(one, name):
        low, middle, high = (in_number(one["roles"][name][least], CHOICES[name]) for least in ALIKE)
        return f"{middle} [{low}, {high}]"

    return {"text": f"Features of the SAEs of {config.model}, over {tokens[:, 1:].numel():,} tokens of "
                    f"held-out text (--corpus {config.corpus}). After a copy: share of the activation read "
                    f"from a token after an earlier copy of the current one. Context: how many of the last "
                    f"tokens keep half of the activation.",
            "census_note": f"Number of roles among the features that lie most in each head, and among "
                           f"{N_DRAWN} drawn by what it gathers: 1 / (probability that two of them share a "
                           f"role), from similarity {ALIKE[1]} on; in brackets {ALIKE[0]} and {ALIKE[2]}.",
            "families": FAMILIES, "contexts": CONTEXTS, "n_heads": n_heads,
            "chunk": pages.CHUNK, "choices": list(CHOICES), "features": columns,
            "vocab": [tokenizer.decode([i]) for i in range(tokenizer.n_vocab)],
            "heads": [{"name": one["name"], "roles": [shown(one, name) for name in CHOICES],
                       "text": {TOP: one["text"]["top"], DRAWN: one["text"]["drawn"]}}
                      for one in census]}


def list_sample(config, collected, records, tokens, tokenizer, folder):
    """Live features drawn at random, each with its strongest example; the judgement is the reader's."""
    lines = ["feature,page,clear (yes or no),what it means"]
    for layer, kept in collected.items():
        found, random = records[layer], np.random.default_rng([config.seed, layer])
        chosen = sorted(random.choice(len(found), min(config.sample, len(found)), replace=False))
        print(f"\n{len(chosen)} of {len(found)} live features of layer {layer}, drawn with seed "
              f"{config.seed}")
        for r in (found[i] for i in chosen):
            at = int(torch.searchsorted(kept.top.feature, r["feature"]))
            name = f"{layer}.{r['feature']}"
            text = in_text(tokens[kept.top.row[at]], int(kept.top.q[at]), tokenizer)
            print(f"{name:8} {r['family']:14} {text}")
            lines.append(f"{name},index.html#{name},,")
    with common.atomic(folder / "sample.csv") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf8")
    print(f"to fill in by eye: {folder}/sample.csv")


if __name__ == "__main__":
    common.run(main)
