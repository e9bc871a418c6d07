"""What every SAE feature and every attention head does: dashboards, feature families, the head census (the
paper, sections 3.2, 3.3 and 4).

    collect     one pass over text keeps, for every feature: how often and how strongly it is active, its
                strongest places, places from ten equal parts of its range, and 200 places drawn in
                proportion to activation. The rows are then gone through once more for what was read there.
    families    induction      half of the activation or more has as strongest source a token that stands
                               after an earlier copy of the current token, three times as much as chance
                current token  else by the context needed: BOS and the last n tokens keep half of the
                short-range    activation for n = 1, for n = 2 to 8, for more; at every n from there on
                long-range
    census      for every head, the features that lie in it most, grouped into roles by what they read
    dashboards  one page for all features: index.html

    python features.py                      all of it on the shipped model, in <out>/<model>/features/
    python features.py --layers 2 --n-tokens 1e6
    python features.py --sample 30          30 live features of each layer, drawn at random, to judge by eye

*Drawn in proportion to activation*: every place of the text has a random number u; a feature keeps the places
with the largest f / u, and each stands for max(f, t) of the feature's activation, t being the largest f / u
that was left out (priority sampling: Duffield, Lund and Thorup 2007; shares of the whole are then unbiased).
u is shared by all features, so that they keep the same places where they can.

A source is where a feature's activation was read from, by DFA; what the heads' values have in common (the
model's value_bias) says nothing about sources and is left out. BOS is never a source. Two tokens are copies
if they are equal but for one leading space and case (data.text.fuzzy).

Shapes: R rows, T positions (q query, k key/source), H heads, D = H*d_head, d_sae; n places.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import model as models
from attribution import dfa_at, feature_bias, head_weights
from data import common, pages
from data.bpe import check_fits
from data.common import (Progress, UserError, check_writable, fast_bfloat16, field, parse_flags, pick_device,
                         run_folder, wilson, write_json)
from data.figures import plot_census, plot_families
from data.keep import Keeper
from data.sae_files import find_saes
from data.text import fuzzy
from sae import Entries, active, active_entries, load_all

N_TOP, N_PART, N_BINS = 20, 5, 40           # strongest places; places of each bin; bins of a histogram
BEFORE, AFTER, N_SOURCES = 10, 5, 8         # tokens shown around a place; sources kept of each

# ---- one pass over the text ----


class Collected(NamedTuple):
    """What is kept of one layer. Places are sorted by feature."""
    n: Tensor               # (d_sae,) places where each feature was active
    mass: Tensor            # (d_sae,) sum of its activations, float64
    counts: Tensor          # (d_sae,N_BINS) histogram of its activations, from 0
    width: Tensor           # (d_sae,) of a bin
    top: Entries            # the N_TOP strongest places
    spread: Entries         # up to N_PART places from each tenth of the range
    sample: Entries         # places drawn in proportion to activation
    weight: Tensor          # (n,) how much activation each place of the sample stands for


class Collector:
    """Collected, while the text streams by. A histogram's bins double in width, joining in pairs, until the
    largest activation fits; half of them or more are in use then."""

    def __init__(self, d_sae, n_places):
        self.n, self.mass = torch.zeros(d_sae, dtype=torch.int64), torch.zeros(d_sae, dtype=torch.float64)
        self.counts = torch.zeros(d_sae, N_BINS, dtype=torch.int64)
        self.exponent = torch.full((d_sae,), -100)              # a bin's width is 2^exponent
        self.top, self.sample = Keeper(N_TOP, d_sae), Keeper(n_places + 1, d_sae)
        self.parts = Keeper(N_PART, d_sae * N_BINS)

    def add(self, entries, u):                                  # n entries, u (n,) in (0,1]
        entries = Entries(*(column.cpu() for column in entries))
        feature, f = entries.feature, entries.f
        self._widen(feature, f)
        self.n += torch.bincount(feature, minlength=len(self.n))
        self.mass += torch.bincount(feature, f.double(), minlength=len(self.n))
        self.counts += torch.bincount(self._bin(entries), minlength=self.counts.numel()).view_as(self.counts)
        self.top.add(entries, feature, f)
        self.sample.add(entries, feature, f / u)
        self.parts.add(entries, self._bin(entries), u)

    def _widen(self, feature, f):
        largest = torch.zeros(len(self.n)).scatter_reduce_(0, feature, f, "amax")
        needed = torch.where(largest > 0, (largest / N_BINS).log2().floor().long() + 1, -100)
        new = self.n == 0
        self.exponent[new] = needed[new]
        widened = False
        while (narrow := self.exponent < needed).any():
            pairs = self.counts[narrow].unflatten(1, (-1, 2)).sum(-1)
            self.counts[narrow] = torch.cat([pairs, torch.zeros_like(pairs)], 1)
            self.exponent[narrow] += 1
            widened = True
        if widened:
            self.parts.regroup(self._bin)

    def _bin(self, entries):                                    # -> (n,) feature * N_BINS + bin
        bins = (entries.f / 2.0 ** self.exponent[entries.feature]).long().clamp_max(N_BINS - 1)
        return entries.feature * N_BINS + bins

    def result(self):
        """-> Collected."""
        empty = Entries(*(torch.zeros(0, dtype=torch.int64),) * 3, torch.zeros(0))
        (top, _, _), (sample, _, key), (parts, _, _) = (
            keeper.best() if keeper.best()[0] else (empty, None, torch.zeros(0))
            for keeper in (self.top, self.sample, self.parts))
        weight, sample = priority_weights(sample, key, self.sample.n)
        return Collected(self.n, self.mass, self.counts, 2.0 ** self.exponent, top,
                         tenths(parts, top), sample, weight)


def priority_weights(sample, key, n):                   # Entries, (m,), n -> weight (m,), Entries
    """Of n places kept of a feature the last only says what was left out; the others stand for max(f, its
    key) each. Features with fewer have them all, and each place stands for its own activation."""
    rank = torch.arange(len(key)) - torch.searchsorted(sample.feature, sample.feature)
    last = rank == n - 1
    left_out = torch.zeros(int(sample.feature.max()) + 1 if len(key) else 0)
    left_out[sample.feature[last]] = key[last]
    weight = torch.maximum(sample.f, left_out[sample.feature])
    return weight[~last], Entries(*(column[~last] for column in sample))


def tenths(parts, top):                                 # Entries by feature -> Entries
    """Up to N_PART places from each tenth of a feature's range, strongest tenth first."""
    if not len(top.f):
        return parts
    largest = torch.zeros(int(top.feature.max()) + 1).scatter_reduce_(0, top.feature, top.f, "amax")
    tenth = (parts.f / largest[parts.feature] * 10).long().clamp_max(9)
    group = parts.feature * 10 + 9 - tenth
    keeper = Keeper(N_PART, int(group.max()) + 1)
    mixed = torch.Generator().manual_seed(0)            # the bins that a tenth consists of, mixed
    keeper.add(parts, group, torch.rand(len(group), generator=mixed))
    return keeper.best()[0]


def collect(model, saes, stream, n_rows, n_places=200, seed=0, say=lambda done: None):
    """-> tokens (R,T) int32, {layer: Collected}. Reads at most n_rows rows of the stream of (b,T) tensors;
    what is in memory grows with the number of features, and by 4 bytes a token."""
    random, collectors = torch.Generator().manual_seed(seed), {}
    collectors = {layer: Collector(sae.d_sae, n_places) for layer, sae in saes.items()}
    kept, first, device = [], 0, next(model.parameters()).device
    for block in stream:
        block = block[:n_rows - first]
        u = 1 - torch.rand(block.shape, generator=random)
        for layer, entries in active_entries(model, saes, block.to(device)):
            entries = Entries(*(column.cpu() for column in entries))
            collectors[layer].add(entries._replace(row=entries.row + first), u[entries.row, entries.q])
        kept.append(block.int())
        first += len(block)
        say(first)
        if first >= n_rows:
            break
    return torch.cat(kept), {layer: one.result() for layer, one in collectors.items()}


# ---- the same rows again: what was read at the places kept ----


class Reads(NamedTuple):
    """Where the activation at n places was read from, constants of the values left out; -1: nowhere."""
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
    """-> {layer: [Reads of the sample, Shown of the top, Shown of the spread]}."""
    H, device = model.config.n_heads, next(model.parameters()).device
    kinds = {layer: (kept.sample, kept.top, kept.spread) for layer, kept in collected.items()}
    orders = {layer: [entries.row.argsort(stable=True) for entries in three] for layer, three in kinds.items()}
    found = {layer: [[], [], []] for layer in saes}
    for first in range(0, len(tokens), 32):
        part = tokens[first:first + 32].long().to(device)
        rows = torch.arange(first, first + len(part) + 1)
        for layer, cache in model.layer_by_layer(part, max(saes) + 1):
            if layer not in saes:
                continue
            v = cache.v - model.value_bias(layer).unflatten(0, (H, -1))
            for kind, (entries, order) in enumerate(zip(kinds[layer], orders[layer])):
                starts = torch.searchsorted(entries.row[order], rows).tolist()
                for i, (start, end) in enumerate(zip(starts, starts[1:])):
                    if end > start:
                        feature, q = (column[order[start:end]].to(device) for column in
                                      (entries.feature, entries.q))
                        moved = dfa_at(cache.pattern[i], v[i], saes[layer].W_enc.T[feature], q)     # (m,H,k)
                        new = shown_of(moved, activations(saes[layer], cache.z_cat[i], feature), q) \
                            if kind else reads_of(moved, q)
                        found[layer][kind].append([column.cpu() for column in new])
        say(min(first + 32, len(tokens)))
    return {layer: [_in_order(parts, order, (Reads, Shown, Shown)[kind], H)
                    for kind, (parts, order) in enumerate(zip(found[layer], orders[layer]))] for layer in saes}


def _in_order(parts, order, kind, H):
    """Columns collected row by row, put back in the order of the entries."""
    back = order.argsort()
    return kind(*(torch.cat(column)[back] for column in zip(*parts))) if parts else None


def activations(sae, z, features):                      # (T,D), (m,) -> (m,T)
    """f of some features at every position of a row."""
    pre = (z - sae.b_dec) @ sae.W_enc[:, features] + sae.b_enc[features]
    return (pre * (pre > sae.threshold[features])).T


def reads_of(moved, q):                                 # (m,H,k), (m,) -> Reads
    """BOS is never a source."""
    k = torch.arange(moved.shape[2], device=q.device)
    before, up_to = ((k > 0) & (k < q[:, None] + more) for more in (0, 1))
    source = moved.sum(1).masked_fill(~before, -torch.inf).argmax(-1)
    value, head_source = moved.masked_fill(~up_to[:, None], -torch.inf).max(-1)
    return Reads(torch.where(before.any(-1), source, -1).short(), head_source.short(), value)


def shown_of(moved, f, q):                              # (m,H,k), (m,T), (m,) -> Shown
    """The window around q and the strongest sources, BOS among them if it is one."""
    around = q[:, None] + torch.arange(-BEFORE, AFTER + 1, device=q.device)
    window = f.gather(1, around.clamp(0, f.shape[1] - 1))
    window = window.masked_fill((around < 1) | (around >= f.shape[1]), torch.nan)
    sources = moved.sum(1).abs().topk(min(N_SOURCES, moved.shape[2])).indices                   # (m,8)
    by_head = moved.gather(2, sources[:, None].expand(-1, moved.shape[1], -1)).transpose(1, 2)
    sources = torch.where(sources <= q[:, None], sources, -1)
    return Shown(window.half(), sources.short(), by_head, moved.sum(-1))


# ---- families ----

FAMILIES = ("induction", "current token", "short-range", "long-range", "unstable", "too rare")
CONTEXTS = (1, 2, 4, 8, 16, 32)     # numbers of tokens before and including q that are left
SHARE, TIMES, KEPT = 0.5, 3.0, 0.5  # the thresholds: induction's share, its ratio to chance, activation kept
MIN_PLACES = 20                     # a feature active at fewer places is too rare to be classed


class Families(NamedTuple):
    """One layer's features by what decides their family; NaN where there is nothing to tell it from."""
    induction: Tensor       # (d_sae,) share of activation read after an earlier copy of the current token
    chance: Tensor          # (d_sae,) the same of sources drawn at the same distances in other examples
    X: Tensor               # (d_sae,) the commonest token read there; -1: none
    X_share: Tensor         # (d_sae,) its share of what is read there
    context: "Context"


def share_of(entries, weight, d_sae):                   # hit (n,) -> (d_sae,)
    """A function from a number in [0,1] at each place to each feature's share of activation with it, as far
    as places count at all; NaN for features without any."""
    def share(hit, counts=None):
        w = weight.double() if counts is None else weight.double() * counts
        total = torch.bincount(entries.feature, w, minlength=d_sae)
        return torch.bincount(entries.feature, w * hit, minlength=d_sae) / total
    return share


def others(entries, generator, times=8):                # -> places (n,), places counted (n,) bool
    """For every place another of the same feature, drawn at random, so many times over. False where the
    feature has no other."""
    feature = entries.feature
    start = torch.searchsorted(feature, feature)
    count = torch.bincount(feature)[feature]
    place = torch.arange(len(feature))
    for _ in range(times):
        step = 1 + (torch.rand(len(feature), generator=generator) * (count - 1)).long()
        yield start + (place - start + step) % count, count > 1


def is_copy(classes, row, q, k):                        # (R,T), (n,) x 3 -> (n,) bool
    """Whether the tokens at q and k are copies; never for a k below 1."""
    own = classes[row, q]
    return (own >= 0) & (k > 0) & (own == classes[row, k.clamp_min(0)])


def by_chance(entries, source, test, generator):        # -> (n,), (n,): hits, times counted
    """How often `test(row, q, k)` holds for sources at the same distances in other places of the feature."""
    hits, times = torch.zeros(len(source)), torch.zeros(len(source))
    for other, there in others(entries, generator):
        row, q = entries.row[other], entries.q[other]
        k = q - (entries.q - source)
        there = there & (source > 0) & (k > 0)
        hits += test(row, q, k) & there
        times += there
    return hits / times.clamp_min(1), times > 0


def induction_shares(kept, reads, tokens, classes, seed=0):
    """-> induction, chance, X, X_share of Families."""
    entries, d_sae = kept.sample, len(kept.n)
    share, source = share_of(entries, kept.weight, d_sae), reads.source.long()
    follows = lambda row, q, k: is_copy(classes, row, q, k - 1)
    hit = follows(entries.row, entries.q, source) & (source > 0)
    chance = by_chance(entries, source, follows, torch.Generator().manual_seed(seed))
    V = int(tokens.max()) + 1
    pair, index = (entries.feature * V + tokens[entries.row, source.clamp_min(0)])[hit].unique(
        return_inverse=True)
    mass = torch.zeros(len(pair), dtype=torch.float64).index_add_(0, index, kept.weight[hit].double())
    order = torch.from_numpy(np.lexsort((mass.numpy(), (pair // V).numpy())))       # each one's heaviest last
    X, X_mass = torch.full((d_sae,), -1), torch.full((d_sae,), torch.nan, dtype=torch.float64)
    X[pair[order] // V], X_mass[pair[order] // V] = pair[order] % V, mass[order]
    hit_mass = torch.bincount(entries.feature, kept.weight.double() * hit, minlength=d_sae)
    return share(hit), share(*chance), X, X_mass / hit_mass


class Context(NamedTuple):
    """One layer: share of each feature's activation kept by BOS and the last n tokens; NaN if never active."""
    cut: Tensor             # (d_sae,len(CONTEXTS)) what stood before was cut off
    replaced: Tensor        # (d_sae,len(CONTEXTS)) it was replaced by another row's, so that positions stay
    n: Tensor               # (d_sae,len(CONTEXTS)) active places behind `cut`


@torch.no_grad()
def context_needed_by(model, saes, tokens, per_row=12, replaced_per_row=4, seed=0, say=lambda done: None):
    """What the features still do when earlier tokens are gone -> {layer: Context}.

    A row is cut before a position c: what is left is BOS and the tokens from c on, so that position c + n - 1
    sees BOS and the last n tokens, for every n at once. Cuts are drawn at random, a quarter of a row or more
    before them; counted are the places where a feature is active in the whole row, each by its activation,
    and of none more is kept than it had. Products are in bfloat16 where that is faster, as in training, in
    the whole rows too.
    """
    random, T, device = torch.Generator().manual_seed(seed), tokens.shape[1], next(model.parameters()).device
    ends = torch.tensor([n for n in CONTEXTS if n <= T // 2])
    shape = lambda sae: torch.zeros(sae.d_sae, len(CONTEXTS), dtype=torch.float64)
    sums = {layer: [shape(sae) for _ in range(5)] for layer, sae in saes.items()}
    for first in range(0, len(tokens), 32):
        part = tokens[first:first + 32].long()
        whole = z_cat_fast(model, part, saes)
        row = torch.arange(len(part)).repeat_interleave(per_row)
        c = torch.randint(T // 4, T - int(ends[-1]) + 1, (len(row),), generator=random)
        at = c[:, None] + ends - 1                                                          # (m,n)
        left = torch.cat([part[row, :1], part[row[:, None], c[:, None] + torch.arange(int(ends[-1]))]], 1)
        few = (torch.arange(len(row)) % per_row < replaced_per_row).nonzero()[:, 0]
        other = tokens[torch.randint(len(tokens), (len(few),), generator=random)].long()
        positions = torch.arange(T)
        swapped = torch.where((positions > 0) & (positions < c[few, None]), other, part[row[few]])
        cut, replaced = z_cat_fast(model, left, saes), z_cat_fast(model, swapped, saes)
        for layer, sae in saes.items():
            every = (whole[layer][row[:, None], at], cut[layer][torch.arange(len(row))[:, None], ends.expand_as(at)])
            some = (whole[layer][row[few, None], at[few]],
                    replaced[layer][torch.arange(len(few))[:, None], at[few]])
            for i, (before, after) in enumerate((every, some)):
                entries = active(sae, before)           # `row` counts cuts, `q` contexts
                f = at_pairs(sae, after.flatten(0, 1), entries.row * len(ends) + entries.q, entries.feature)
                where = (entries.feature * len(CONTEXTS) + entries.q).cpu()
                for total, values in zip(sums[layer][2 * i:2 * i + 2], (torch.minimum(f, entries.f), entries.f)):
                    total.view(-1).index_add_(0, where, values.cpu().double())
                if i == 0:
                    sums[layer][4] += torch.bincount(where, minlength=sums[layer][4].numel()).view_as(sums[layer][4])
        say(min(first + 32, len(tokens)))
    return {layer: Context(kept / of, kept_2 / of_2, n) for layer, (kept, of, kept_2, of_2, n) in sums.items()}


def z_cat_fast(model, rows, layers):                    # (m,t) -> {layer: (m,t,D)}
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device)):
        return {layer: z.float() for layer, z in model.z_cat_at(rows.to(device), list(layers)).items()}


def at_pairs(sae, z, row, feature):                     # (m,D), (n,), (n,) -> (n,)
    """Activation of one feature in one row of z, n times."""
    found = [z.new_zeros(0)]
    for i, j in zip(row.split(2**15), feature.split(2**15)):
        pre = torch.einsum("nd,nd->n", z[i] - sae.b_dec, sae.W_enc.T[j]) + sae.b_enc[j]
        found.append(pre * (pre > sae.threshold[j]))
    return torch.cat(found)


def context_needed(kept, least=KEPT):                   # (d_sae,len(CONTEXTS)) -> (d_sae,), (d_sae,) bool
    """The number of CONTEXTS that are too short, which is the place in CONTEXTS of the smallest n from which
    on the activation is kept; and whether a shorter one kept it as well, so that it comes and goes. A context
    for which there is no place counts as long enough."""
    short = kept < least
    index = torch.arange(1, len(CONTEXTS) + 1)
    needed = (short * index).amax(1)
    return needed, (~short & (index - 1 < needed[:, None])).any(1)


def family_of(families, n, share=SHARE, times=TIMES, least=KEPT):       # Families, (d_sae,) -> (d_sae,)
    """The place in FAMILIES of each feature, n being the number of places where it was active; -1 for those
    that never were."""
    needed, unstable = context_needed(families.context.cut, least)
    found = torch.where(needed == 0, 1, torch.where(needed <= CONTEXTS.index(8), 2, 3))
    found[unstable] = 4
    found[families.context.n.amin(1) < MIN_PLACES] = 5
    chance = families.chance.nan_to_num(0.0)
    found[(families.induction >= share) & (families.induction >= times * chance)] = 0
    found[n < MIN_PLACES] = 5
    found[n == 0] = -1
    return found


def count_families(families, n):
    """How many features are in each family, as defined and with each threshold halved and doubled."""
    variants = {"as defined": {}}
    for name, value in (("share", SHARE), ("times", TIMES), ("least", KEPT)):
        variants |= {f"{name} {value * factor:g}": {name: value * factor} for factor in (0.5, 2)}
    counted = {}
    for label, thresholds in variants.items():
        family = family_of(families, n, **thresholds)
        times = torch.bincount(family[family >= 0], minlength=len(FAMILIES))
        counted[label] = dict(zip(FAMILIES, times.tolist()))
    return counted


def evidence(families, family, i, decode):
    """In words, why a feature is in its family."""
    cut, needed = families.context.cut[i].tolist(), int(context_needed(families.context.cut)[0][i])
    induction = (f"{_percent(families.induction[i])} of its activation has as strongest source a token after an "
                 f"earlier copy of the current one ({_percent(families.chance[i])} at the same distances in its "
                 f"other examples)")
    name = FAMILIES[int(family[i])]
    if name == "induction":
        return (f"{induction}; the commonest token read there is {decode([int(families.X[i])])!r}, "
                f"{_percent(families.X_share[i])} of it.")
    if name == "too rare":
        return f"Active at too few places to tell. {induction}."
    if name == "unstable":
        return f"Its activation comes and goes as the context grows. {induction}."
    kept = (f"BOS and the last {CONTEXTS[needed]} tokens keep {_percent(cut[needed])} of its activation"
            if needed < len(CONTEXTS) else f"BOS and the last {CONTEXTS[-1]} tokens keep {_percent(cut[-1])} of its activation")
    before = f", {CONTEXTS[needed - 1]} keep {_percent(cut[needed - 1])}" if 0 < needed < len(CONTEXTS) else ""
    return f"{kept}{before}; {induction}."


def _percent(x):
    return "n/a" if x != x else f"{float(x):.0%}"


# ---- the head census ----

RELATIONS = ("itself", "the token before", "a token after a copy", "a copy")
TOPS = (10, 25, 50)                 # so many of a head's features are looked at
ALIKE = (0.35, 0.5, 0.65)           # similarities from which on two features share a role
MANY = 1.5                          # a head with more roles than this is polysemantic


class Profiles(NamedTuple):
    """How the features of one head read and write; m features."""
    relations: Tensor       # (m,len(RELATIONS)) share of what the head gathers that is read from there
    fire: Tensor            # (m,d_model) mean embedding of the tokens at which they are active
    read: Tensor            # (m,d_model) mean embedding of the tokens read
    write: Tensor           # (m,d_model) W_dec[i] at the head @ W_O


def head_profiles(kept, reads, head, tokens, classes, chosen, embedding, W_dec, matrices, seed=0):
    """Profiles of some features, as far as one head gathers their activation -> Profiles.

    A place counts by the part of the activation that comes from the head's strongest source. Relations
    exclude one another, in the order of RELATIONS; those to a copy are less what the same distances give in
    other places: (share - chance) / (1 - chance).
    """
    entries, d_sae = kept.sample, len(kept.n)
    k, q, row = reads.head_source[:, head].long(), entries.q, entries.row
    weight = kept.weight / entries.f * reads.head_value[:, head].clamp_min(0)
    share = share_of(entries, weight, d_sae)
    after = lambda row, q, k: is_copy(classes, row, q, k - 1) & (k < q - 1)
    copy = lambda row, q, k: is_copy(classes, row, q, k) & (k < q - 1) & ~after(row, q, k)
    shares = [share(k == q), share(k == q - 1)]
    for test in (after, copy):
        generator = torch.Generator().manual_seed(seed)
        seen, chance = share(test(row, q, k)), share(*by_chance(entries, k, test, generator)).nan_to_num(0.0)
        shares.append(((seen - chance) / (1 - chance)).clamp_min(0))
    numbers = torch.full((d_sae,), -1)
    numbers[chosen] = torch.arange(len(chosen))
    mine = numbers[entries.feature] >= 0
    i, w = numbers[entries.feature[mine]], weight[mine, None]
    mean = lambda at: torch.zeros(len(chosen), embedding.shape[1]).index_add_(
        0, i, w * embedding[tokens[row[mine], at[mine]].long()])
    w_head = W_dec[chosen].unflatten(1, (matrices.b_V.shape))[:, head]
    return Profiles(torch.stack(shares, 1)[chosen].nan_to_num(0.0).float(), mean(q), mean(k),
                    w_head @ matrices.W_O[head])


def similarity(p):                                      # Profiles -> (m,m)
    """sum over relations of min(share_i, share_j), plus min(rest_i, rest_j) * content.

    A relation is the same whatever the tokens are. What is read in none of them is alike as far as the
    features fire on, read and write alike: content is the mean of the three cosines, negative ones being 0.
    """
    both = torch.minimum(p.relations[:, None], p.relations[None]).sum(-1)
    rest = (1 - p.relations.sum(1)).clamp_min(0)
    unit = (torch.nn.functional.normalize(vectors, dim=1) for vectors in (p.fire, p.read, p.write))
    content = sum((one @ one.T).clamp_min(0) for one in unit) / 3
    return both + torch.minimum(rest[:, None], rest) * content


def roles(alike, least):                                # (m,m) -> list of lists of 0 .. m-1
    """Features in groups: the one with the most others like it and those others, then the same again."""
    left, groups = torch.ones(len(alike), dtype=torch.bool), []
    near = alike >= least
    near.fill_diagonal_(True)
    while left.any():
        leader = int(((near & left).sum(1) * left).argmax())
        members = near[leader] & left
        groups.append(members.nonzero()[:, 0].tolist())
        left &= ~members
    return groups


def number_of_roles(groups):
    """1 / (probability that two different features share a role); infinite if no two do."""
    n, pairs = sum(map(len, groups)), sum(len(g) * (len(g) - 1) for g in groups)
    return n * (n - 1) / pairs if pairs else float("inf")


def head_census(model, sae, layer, kept, reads, tokens, classes, family, thresholds=ALIKE):
    """What each head of a layer does -> list of dicts, one a head.

    Looked at are, of the features active at MIN_PLACES places or more, those with the largest weight in the
    head (attribution.head_weights). "roles": {n: {threshold: number of roles among the top n}}, None where
    there are fewer than n. "groups": the roles of the top TOPS[1] at the middle threshold, largest first,
    each with its features and what they read; "relations": the same of all of them. "families": how many of
    them are in each.
    """
    weights = head_weights(sae.W_dec, model.config.n_heads).cpu()
    usual, census = kept.n >= MIN_PLACES, []
    embedding, matrices = token_embeddings(model, tokens), model.head_matrices(layer)
    matrices = type(matrices)(*(one.cpu() for one in matrices))
    for h in range(model.config.n_heads):
        order = torch.where(usual, weights[:, h], -1).argsort(descending=True)[:int(usual.sum())]
        top, few = order[:TOPS[-1]], order[:TOPS[1]]
        p = head_profiles(kept, reads, h, tokens, classes, top, embedding, sae.W_dec.cpu(), matrices)
        alike = similarity(p)
        found = {n: {least: number_of_roles(roles(alike[:n, :n], least)) if len(top) >= n else None
                     for least in thresholds} for n in TOPS}
        groups = roles(alike[:len(few), :len(few)], thresholds[len(thresholds) // 2])
        census.append({
            "layer": layer, "head": h, "roles": found, "weights": [float(weights[i, h]) for i in few[[0, -1]]],
            "relations": p.relations[:len(few)].mean(0).tolist(),
            "families": {name: int((family[few] == i).sum()) for i, name in enumerate(FAMILIES)},
            "groups": [{"features": few[g].tolist(), "relations": p.relations[g].mean(0).tolist(),
                        **commonest(kept.sample, reads.head_source[:, h], tokens, few[g])} for g in groups]})
    return census


def commonest(entries, source, tokens, features, n=3):                  # -> {"at": ids, "reads": ids}
    """The tokens at which some features are active most often, and those read there."""
    mine = torch.isin(entries.feature, features)
    of = lambda at: torch.bincount(tokens[entries.row[mine], at[mine].long()].long()).topk(n)
    return {name: [int(i) for i, times in zip(found.indices, found.values) if times]
            for name, found in (("at", of(entries.q)), ("reads", of(source)))}


def is_polysemantic(one, n=TOPS[1], least=ALIKE[1]):
    """None where the head has too few features to tell."""
    return None if one["roles"][n][least] is None else one["roles"][n][least] > MANY


def in_words(one, decode):
    """One line about a head, built from what was measured."""
    read = [f"{share:.0%} {name}" for name, share in zip(RELATIONS, one["relations"]) if share >= 0.05]
    rest = 1 - sum(one["relations"])
    families = ", ".join(f"{n} {name}" for name, n in one["families"].items() if n)
    quoted = lambda ids: " ".join(repr(decode([i])) for i in ids)
    groups = []
    for g in one["groups"][:3]:
        share, name = max(zip(g["relations"], RELATIONS))
        what = f"read {name}" if share >= 0.5 else f"read {quoted(g['reads'])} at {quoted(g['at'])}"
        groups.append(f"{len(g['features'])} {what}")
    low, high = sorted(one["weights"])
    return (f"reads {', '.join(read + [f'{rest:.0%} elsewhere'])}; roles: {'; '.join(groups)}; {families}; "
            f"the {sum(one['families'].values())} features lie in it by {low:.0%} to {high:.0%}")


def token_embeddings(model, tokens):                    # -> (V,d_model) unit vectors, on the CPU
    """Each token's embedding, less the mean over the text."""
    every = torch.arange(int(tokens.max()) + 1, device=next(model.parameters()).device)
    rows = torch.cat([model.embed_parts(part[:, None])["embedding"][:, 0] for part in every.split(4096)]).cpu()
    times = torch.bincount(tokens.flatten().long(), minlength=len(rows)).to(rows.dtype)
    return torch.nn.functional.normalize(rows - times @ rows / times.sum(), dim=1)


# ---- the program ----


@dataclass(frozen=True)
class FeaturesConfig:
    model: str = field("tiny", "tiny, gpt2, gemma-2-2b ..., or a directory in Hugging Face layout")
    saes: str = field("", "folder with SAEs, kissane, gemma-scope; else the run in --out, else the shipped")
    layers: tuple[int, ...] = field((), "layers, such as 0,2; all that have an SAE if not given")
    corpus: str = field("python", "real text, of which held-out rows are read: see train.py")
    n_tokens: int = field(500_000, "tokens of text (paper: 1e6)")
    n_places: int = field(200, "places of each feature, drawn in proportion to activation")
    sample: int = field(0, "list so many live features of each layer, drawn at random, to judge by eye")
    pages: bool = field(True, "write the dashboards; about 10 kB a feature")
    seed: int = field(0, "draws places and replacements")
    device: str = field("auto", "cpu, cuda, mps or auto")
    out: str = field("out", "folder for results")


def main():
    config = parse_flags(FeaturesConfig, __doc__)
    device = pick_device(config.device)
    model, tokenizer = models.load(config.model, device), data.tokenizer(config.model)
    check_fits(tokenizer, model, config.model)
    T = min(128, model.config.n_ctx)
    n_rows = config.n_tokens // (T - 1)
    if n_rows < 16 or config.n_places < 10:
        raise UserError(f"--n-tokens must be {16 * (T - 1)} or more and --n-places 10 or more.")
    saes = load_all(find_saes(config.saes, config.out, config.model), model, config.layers, device)
    folder = run_folder(config.out, config.model) / "features"
    check_writable(folder)
    stream = data.rows(config.corpus, tokenizer, "held-out", T, 128, seed=config.seed, repeat_share=0.0)
    steps = iter(("reading text", "what was read there", "what context is needed"))

    def progress(n):
        print(next(steps), flush=True)
        line = Progress(n, "rows")
        return lambda done: line(done, last=done == n)

    tokens, collected = collect(model, saes, stream, n_rows, config.n_places, config.seed, progress(n_rows))
    if len(tokens) < n_rows:
        print(f"the text ended after {len(tokens)} rows of {n_rows}")
    looked = look_again(model, saes, tokens, collected, progress(len(tokens)))
    contexts = context_needed_by(model, saes, tokens, seed=config.seed, say=progress(len(tokens)))
    classes = fuzzy(tokenizer)[tokens.long()]
    families = {layer: Families(*induction_shares(collected[layer], looked[layer][0], tokens, classes,
                                                  config.seed), contexts[layer]) for layer in saes}
    family = {layer: family_of(families[layer], collected[layer].n) for layer in saes}
    study_families(families, family, collected, folder)
    census = study_heads(model, saes, collected, looked, tokens, classes, family, tokenizer, folder)
    records = {layer: describe_features(model, saes[layer], layer, collected[layer], families[layer],
                                        family[layer], tokens, tokenizer) for layer in saes}
    for layer, found in records.items():
        write_json(folder / f"L{layer}" / "features.json", {"n_tokens": tokens[:, 1:].numel(), "features": found})
    if config.pages:
        write_pages(config, model, saes, collected, looked, families, family, tokens, records, census, tokenizer,
                    folder)
    if config.sample:
        list_sample(config, collected, records, tokens, tokenizer, folder)
    print(f"\nwritten to {folder}/")


def study_families(families, family, collected, folder):
    """Counts by layer, at the thresholds, half of them and double; the figure of the two axes."""
    counts = {layer: count_families(families[layer], collected[layer].n) for layer in families}
    print("\nfeatures by family; share, times: induction's thresholds, least: activation kept\nlayer  thresholds   "
          + "".join(f"{name:>15}" for name in FAMILIES))
    for layer, by_label in counts.items():
        for label, found in by_label.items():
            print(f"{layer:5d}  {label:12} " + "".join(f"{found[name]:15d}" for name in FAMILIES))
    write_json(folder / "families.json", {"share": SHARE, "times": TIMES, "least": KEPT, "contexts": CONTEXTS,
                                          "layers": {f"L{layer}": c for layer, c in counts.items()}})
    axes = {layer: (context_needed(one.context.cut)[0].numpy(), one.induction.numpy(), family[layer].numpy())
            for layer, one in families.items()}
    plot_families(axes, FAMILIES, CONTEXTS, folder / "families.png")


def study_heads(model, saes, collected, looked, tokens, classes, family, tokenizer, folder):    # -> census
    """Roles of every head, a line about it, and the share that is polysemantic."""
    census = []
    for layer, sae in saes.items():
        census += head_census(model, sae, layer, collected[layer], looked[layer][0], tokens, classes,
                              family[layer])
    show = lambda one, n, least: _number(one["roles"][n][least], n)
    print(f"\nroles of each head's features, by those that lie in it most; in brackets at similarity {ALIKE[0]} and "
          f"{ALIKE[2]}\nhead " + "".join(f"{f'top {n}':>22}" for n in TOPS))
    for one in census:
        one["name"], one["text"] = f"{one['layer']}.{one['head']}", in_words(one, tokenizer.decode)
        print(f"{one['name']:5}" + "".join(
            f"{show(one, n, ALIKE[1]):>8} [{show(one, n, ALIKE[0]):>5}, {show(one, n, ALIKE[2]):>5}]" for n in TOPS)
            + f"   {one['text']}")
    found = {}
    for n in TOPS:
        for least in ALIKE:
            called = [is_polysemantic(one, n, least) for one in census]
            called = [one for one in called if one is not None]
            found[f"top {n}, similarity {least}"] = {"polysemantic": sum(called), "heads": len(called),
                                                     "interval": wilson(sum(called), len(called))}
    print(f"\npolysemantic heads (more than {MANY} roles); [95% interval]")
    for label, r in found.items():
        if r["heads"]:
            low, high = r["interval"]
            print(f"{label:24} {r['polysemantic']:3d} of {r['heads']:3d}  {r['polysemantic'] / r['heads']:6.1%} "
                  f"[{low:.1%}, {high:.1%}]")
    if (model.config.n_layers, model.config.n_heads, model.config.d_model) == (12, 12, 768):
        print("reported (GPT-2 Small): 14 of 144 heads plausibly monosemantic, so at least 90% polysemantic, judged "
              "by eye on the top 10 features of each")
    finite = lambda x: None if x is None or x == float("inf") else x
    write_json(folder / "census.json", {"similarities": ALIKE, "many": MANY, "polysemantic": found, "heads": [
        one | {"roles": {n: {a: finite(x) for a, x in by.items()} for n, by in one["roles"].items()}}
        for one in census]})
    plot_census(census, TOPS, ALIKE, MANY, folder / "census.png")
    return census


def _number(x, n):
    return "n/a" if x is None else f"> {n}" if x == float("inf") else f"{x:.1f}"


@torch.no_grad()
def logit_effects(model, sae, layer, features, n=20):   # (m,) -> values (m,n), ids (m,n), lowest the same
    """The tokens whose logits W_dec[i] @ W_O @ W_U raises and lowers most, less the mean over all tokens,
    before the final norm's scale."""
    W_O = model.head_matrices(layer).W_O.flatten(0, 1)
    directions = model.logit_directions(torch.arange(model.config.d_vocab, device=W_O.device))
    parts = []
    for some in features.to(W_O.device).split(256):
        effects = sae.W_dec[some] @ W_O @ directions.T
        parts.append([*effects.topk(n), *(-effects).topk(n)])
    return [torch.cat(column).cpu() for column in zip(*parts)]


def describe_features(model, sae, layer, kept, families, family, tokens, tokenizer):
    """Every live feature as plain numbers -> list of dicts."""
    live = (kept.n > 0).nonzero()[:, 0]
    raises, raised, lowers, lowered = logit_effects(model, sae, layer, live)
    weights = head_weights(sae.W_dec, model.config.n_heads).cpu()
    largest = torch.zeros(len(kept.n)).scatter_reduce_(0, kept.top.feature, kept.top.f, "amax")
    needed = context_needed(families.context.cut)[0]
    fires = fires_on(kept, tokens)
    plain = lambda row: [None if x != x else round(x, 4) for x in row.tolist()]
    pairs = lambda ids, values: [[i, round(x, 3)] for i, x in zip(ids.tolist(), values.tolist())]
    return [{"feature": i, "n": int(kept.n[i]), "frequency": float(kept.n[i]) / tokens[:, 1:].numel(),
             "mean": float(kept.mass[i] / kept.n[i]), "largest": float(f"{largest[i]:.4g}"),
             "family": FAMILIES[int(family[i])], "evidence": evidence(families, family, i, tokenizer.decode),
             "induction": plain(families.induction[i, None])[0], "chance": plain(families.chance[i, None])[0],
             "X": int(families.X[i]), "X_share": plain(families.X_share[i, None])[0], "context": int(needed[i]),
             "cut": plain(families.context.cut[i]), "replaced": plain(families.context.replaced[i]),
             "head_weights": plain(weights[i]), "fires_on": fires.get(i, []),
             "raises": pairs(raised[j], raises[j]), "lowers": pairs(lowered[j], -lowers[j])}
            for j, i in enumerate(live.tolist())]


def fires_on(kept, tokens, n=3):                        # -> {feature: ids}
    """The tokens at which each feature has most of its activation."""
    V = int(tokens.max()) + 1
    pair, index = (kept.sample.feature * V + tokens[kept.sample.row, kept.sample.q]).unique(return_inverse=True)
    mass = torch.zeros(len(pair)).index_add_(0, index, kept.weight)
    found = {}
    for i in np.lexsort((-mass.numpy(), (pair // V).numpy())):
        ids = found.setdefault(int(pair[i]) // V, [])
        if len(ids) < n:
            ids.append(int(pair[i]) % V)
    return found


def write_pages(config, model, saes, collected, looked, families, family, tokens, records, census, tokenizer,
                folder):
    """The dashboards."""
    print("writing the dashboards ...", flush=True)
    columns = {}
    for layer, kept in collected.items():
        largest = torch.zeros(len(kept.n)).scatter_reduce_(0, kept.top.feature, kept.top.f, "amax")
        examples = [pages.example_lists(tokens, entries, shown, largest, BEFORE, AFTER, sources) for
                    entries, shown, sources in ((kept.top, looked[layer][1], True),
                                                (kept.spread, looked[layer][2], False))]
        shown = looked[layer][1]
        part = (shown.total / kept.top.f[:, None]).double()
        dfa = torch.zeros(len(kept.n), model.config.n_heads, dtype=torch.float64)
        dfa.index_add_(0, kept.top.feature, part)
        dfa /= torch.bincount(kept.top.feature, minlength=len(kept.n)).clamp_min(1)[:, None]
        content = {}
        for r in records[layer]:
            i = r["feature"]
            used = int(kept.counts[i].nonzero().max()) + 1
            tenths = {}
            for e in examples[1].get(i, []):
                tenths.setdefault(min(int(10 * e[2] / r["largest"]), 9), []).append(e)
            content[i] = {
                **{name: r[name] for name in ("family", "evidence", "cut", "replaced", "raises", "lowers")},
                "facts": f"Active at {r['n']:,} places of {tokens[:, 1:].numel():,} ({r['frequency']:.2%}); "
                         f"activation {r['mean']:.3g} on average where active, {r['largest']:.3g} at most.",
                "explorer": f"to take it apart in a prompt: python attribution.py \"...\" --layer {layer} --feature {i}",
                "weights": r["head_weights"], "dfa": [round(x, 3) for x in dfa[i].tolist()],
                "counts": kept.counts[i, :used].tolist(), "width": float(kept.width[i]),
                "top": examples[0].get(i, []),
                "tenths": [[f"{10 * t} to {10 * t + 10}% of the largest", tenths[t]] for t in sorted(tenths, reverse=True)]}
        pages.write_chunks(folder, layer, content)
        of = records[layer]
        best = [max(range(model.config.n_heads), key=lambda h: r["head_weights"][h]) for r in of]
        columns[layer] = {
            "feature": [r["feature"] for r in of], "family": [FAMILIES.index(r["family"]) for r in of],
            "frequency": [float(f"{r['frequency']:.3g}") for r in of], "largest": [r["largest"] for r in of],
            "head": best, "weight": [r["head_weights"][h] for r, h in zip(of, best)],
            "induction": [r["induction"] for r in of], "context": [r["context"] for r in of],
            "fires": [r["fires_on"] for r in of], "logits": [[i for i, _ in r["raises"][:3]] for r in of]}
    shown = lambda one, n, least: _number(one["roles"][n][least], n)
    pages.fill("dashboard.html", {
        "text": f"Features of the SAEs of {config.model}, over {tokens[:, 1:].numel():,} tokens of held-out text "
                f"(--corpus {config.corpus}). After a copy: share of the activation read from a token after an earlier copy "
                f"of the current one. Context: how many of the last tokens keep half of the activation.",
        "census_note": f"Number of roles among the features that lie most in each head: 1 / (probability that two of "
                       f"them share a role), at similarity {ALIKE[1]}, in brackets at {ALIKE[0]} and {ALIKE[2]}.",
        "families": FAMILIES, "contexts": CONTEXTS, "n_heads": model.config.n_heads, "chunk": pages.CHUNK, "tops": TOPS,
        "vocab": [tokenizer.decode([i]) for i in range(tokenizer.n_vocab)], "features": columns,
        "heads": [{"name": one["name"], "text": one["text"], "roles": {
            n: f"{shown(one, n, ALIKE[1])} [{shown(one, n, ALIKE[0])}, {shown(one, n, ALIKE[2])}]" for n in TOPS}}
            for one in census]}, folder / "index.html")
    print(f"{folder}/index.html")


def list_sample(config, collected, records, tokens, tokenizer, folder):
    """Live features drawn at random, with their strongest example; the judgement is the reader's."""
    lines = ["feature,page,clear yes or no,what it means"]
    for layer, kept in collected.items():
        random = np.random.default_rng([config.seed, layer])
        chosen = sorted(random.choice(len(records[layer]), min(config.sample, len(records[layer])), replace=False))
        print(f"\n{len(chosen)} live features of layer {layer}, drawn with seed {config.seed}")
        for r in (records[layer][j] for j in chosen):
            at = int(torch.searchsorted(kept.top.feature, r["feature"]))
            row, q = int(kept.top.row[at]), int(kept.top.q[at])
            text = lambda a, b: tokenizer.decode(tokens[row, max(a, 0):b].tolist()).replace("\n", "\\n")
            name = f"{layer}.{r['feature']}"
            print(f"{name:8} {r['family']:14} {text(q - 12, q)}\u27e8{text(q, q + 1)}\u27e9{text(q + 1, q + 4)}")
            lines.append(f"{name},index.html#{name},,")
    with common.atomic(folder / "sample.csv") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf8")
    print(f"to be filled in by eye: {folder}/sample.csv")


if __name__ == "__main__":
    common.run(main)
