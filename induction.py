"""The induction study: '"board" is next by induction', and heads that need a long prefix (the paper, Fig. 2,
4 and 19).

An induction head at a query looks for the same token earlier in the text, and attends to the one after it:

    ... A B C X ...... A B C        prefix length 3: query C attends to key X, since A B C stood before X
              k            q        L[q,k] = length of the longest run up to q that equals the run before k

    heads          induction, previous-token and duplicate-token score of every head
    prefix         one random row, its prefix grown from 0 to 9 tokens with key and query in place: attention
                   to X, and direct logit attribution of X, for every head
    intervention   held-out text: the token at k-2 replaced, so that 1 token of the prefix is left. Controls:
                   the token at k+2 replaced instead; that at k-2 where only 1 token matched to begin with
    features       SAE features that fire where X followed the current token earlier: "X is next by induction"
                   (features.py finds by DFA those that read what followed, whatever it was)

    python induction.py                     all four on the shipped model, as tables, JSON and figures in
                                            <out>/<model>/induction/

Two tokens match if they are equal but for one leading space and the case of letters (`fuzzy`). BOS matches
nothing.

Shapes: B batch, T positions (q query, k key), H heads, d_head; n examples.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from attribution import head_logits, token_effects
from data import common
from data.common import Progress, UserError, field, mean_of, parse_flags, with_interval, write_json
from data.figures import plot_feature, plot_heads, plot_intervention, plot_lengths, plot_prefixes
from data.keep import Keeper
from data.study import StudyConfig, begin, finish, parse_feature, reported
from data.text import fuzzy, in_text
from sae import ablate, active_entries, check_feature

LENGTHS = range(10)             # prefix lengths of the paired protocol
ATTENDS = 0.3                   # attention above which a head counts as attending (Fig. 4b)
SHARE, EXCESS, N_ACTIVE = 0.5, 0.25, 100    # what makes a feature an induction feature: see `find_features`

# ---- which tokens match ----


def prefix_lengths(classes):                                            # (B,T) -> (B,q,k)
    """L[q,k]: the length of the longest run of tokens that ends at q and matches the run that ends at k-1; 0
    for k > q and for k = 0.

    classes: an integer for each token, equal where tokens match; BOS is -1, which matches nothing.

    L[q,k] = 1 + L[q-1,k-1] if q matches k-1, else 0.
    """
    B, T = classes.shape
    same = (classes[:, :, None] == classes[:, None]) & (classes >= 0)[:, None]                  # (B,q,k)
    lengths = classes.new_zeros(B, T, T)
    for q in range(1, T):
        lengths[:, q, 1:q + 1] = same[:, q, :q] * (1 + lengths[:, q - 1, :q])
    return lengths


def followed_by(tokens, classes, row, q, X):                            # (B,T), (B,T), (n,) x 3 -> (n,) bool
    """The proxy of Fig. 2: whether the token at q, or its variant in space or case, stood earlier in its row
    with token X after it."""
    earlier = torch.arange(tokens.shape[1] - 1, device=tokens.device) < q[:, None]              # (n,T-1)
    matches = classes[row, :-1] == classes[row, q][:, None]
    return ((classes[row, q] >= 0)[:, None] & earlier & matches & (tokens[row, 1:] == X[:, None])).any(-1)


# ---- heads ----


@torch.no_grad()
def head_scores(model, tokens, classes):                                # (B,T) each -> {score: (layers,H)}
    """Mean attention of every head at the queries that have something to look at.

    induction: to the tokens after earlier occurrences of the query's token, all together. duplicate: to those
    occurrences. previous: to the token before the query, wherever that is not BOS.
    """
    total, count = {}, {}
    for part in torch.arange(len(tokens), device=tokens.device).split(16):
        own = classes[part]
        q, k = positions(tokens)
        duplicate = (own[:, :, None] == own[:, None]) & (own >= 0)[:, None] & (k < q)
        follows = F.pad(duplicate, (1, 0))[..., :-1] & (k < q)
        previous = (k == q - 1) & (k > 0) & (own >= 0)[:, None]
        targets = {"induction": follows, "previous": previous, "duplicate": duplicate}
        for layer, kept in model.layer_by_layer(tokens[part]):
            for name, target in targets.items():
                mass = (kept.pattern * target[:, None]).sum(-1)         # (B,H,q)
                at = target.any(-1)                                     # (B,q)
                total[name, layer] = total.get((name, layer), 0) + mass.transpose(1, 2)[at].sum(0)
                count[name, layer] = count.get((name, layer), 0) + int(at.sum())
    layers = range(model.config.n_layers)
    return {name: torch.stack([total[name, layer] / max(count[name, layer], 1) for layer in layers])
            for name in ("induction", "previous", "duplicate")}


def positions(tokens):                                                  # (B,T) -> q (T,1), k (1,T)
    """Query and key positions, to compare with each other."""
    each = torch.arange(tokens.shape[1], device=tokens.device)
    return each[:, None], each[None]


def random_rows(model, bos, table, n, generator, repeat=False):         # -> (n,T)
    """BOS and random tokens that all differ, also fuzzily; with `repeat` the same again to fill the row."""
    T = min(128, model.config.n_ctx)
    different = (T - 1) // 2 if repeat else T - 1
    of_token = table.cpu().numpy()
    first = np.unique(of_token, return_index=True)[1]                   # one token of every class
    pool = torch.from_numpy(first[of_token[first] >= 0])
    if len(pool) < different:
        raise UserError(f"this vocabulary has {len(pool)} tokens that differ, and a row takes {different}.")
    drawn = torch.stack([pool[torch.randperm(len(pool), generator=generator)[:different]] for _ in range(n)])
    parts = [torch.full((n, 1), bos), drawn] + ([drawn] if repeat else [])
    return torch.cat(parts, 1).to(table.device)


# ---- prefix length (Fig. 4a, 19) ----


class PrefixCurves(NamedTuple):
    """Scores of every head by prefix length, paired: the sequences are the same for all lengths."""
    attention: np.ndarray   # (n,lengths,layers,H) from the query to the key that followed the prefix
    logit: np.ndarray       # (n,lengths,layers,H) direct logit attribution of the key's token, less the mean


@torch.no_grad()
def prefix_curves(model, bos, table, n=400, seed=0, say=lambda done: None):
    """The paired protocol: key e1 and query e2 of a random row stay, and for each p the tokens e1-p .. e1-1
    are copied to e2-p+1 .. e2. All tokens but the copies differ -> PrefixCurves."""
    generator = torch.Generator().manual_seed(seed)
    base = random_rows(model, bos, table, n, generator)
    longest, T = max(LENGTHS), base.shape[1]
    if T < 2 * longest + 3:
        raise UserError(f"prefixes of {longest} tokens take rows of {2 * longest + 3} tokens or more; this "
                        f"model has {T}.")
    key = torch.randint(longest + 1, T - longest - 1, (n,), generator=generator)
    query = torch.stack([torch.randint(int(e1) + longest, T, (), generator=generator) for e1 in key])
    key, query = key.to(base.device), query.to(base.device)
    matrices = [model.head_matrices(layer) for layer in range(model.config.n_layers)]
    attention, logit = [], []
    order = query.argsort()         # neighbours have their queries close together, and rows end there
    base, key, query = base[order], key[order], query[order]
    for rows in torch.arange(n, device=base.device).split(8):
        tokens, e1, e2 = grow_prefix(base[rows, :query[rows].max() + 1], key[rows], query[rows])
        at, seen, gathered = torch.arange(len(tokens), device=base.device), [], []
        for layer, kept in model.layer_by_layer(tokens):
            seen.append(kept.pattern[at, :, e2, e1])                    # (B,H)
            scale = kept.scales["attn_out"][at, e2] if "attn_out" in kept.scales else 1.0
            gathered.append((kept.z_cat[at, e2], matrices[layer], scale))
        final = (kept.resid_pre + kept.attn_out + kept.mlp_out)[at, e2]
        direction = model.logit_directions(tokens[at, e1]) / model.final_scale(final)
        made = [head_logits(z, m, direction, scale) for z, m, scale in gathered]
        attention.append(torch.stack(seen, 1).cpu().numpy())            # (B,layers,H)
        logit.append(torch.stack(made, 1).cpu().numpy())
        say(int(rows[-1]) + 1)
    heads = (len(matrices), model.config.n_heads)
    return PrefixCurves(*(np.concatenate(found).reshape(n, len(LENGTHS), *heads)
                          for found in (attention, logit)))


def grow_prefix(base, key, query):                  # (b,T), (b,), (b,) -> (B,T), (B,), (B,); B = b*lengths
    """Each row once for each prefix length, lengths varying fastest -> tokens, keys, queries."""
    tokens = base.repeat_interleave(len(LENGTHS), 0)
    e1, e2 = key.repeat_interleave(len(LENGTHS)), query.repeat_interleave(len(LENGTHS))
    length = torch.tensor(LENGTHS, device=base.device).repeat(len(base))
    source = tokens.clone()
    at = torch.arange(len(tokens), device=base.device)
    for back in range(max(LENGTHS)):
        there = back < length
        tokens[at[there], (e2 - back)[there]] = source[at[there], (e1 - 1 - back)[there]]
    return tokens, e1, e2


def pick_heads(attention):                              # (n,lengths,layers,H) -> (layer, head), (layer, head)
    """The short-prefix head attends most after 1 matching token; the long-prefix head is the one, of the
    others, whose attention grows most from 1 token to 9."""
    mean = attention.mean(0)
    best = lambda scores: tuple(int(i) for i in np.unravel_index(scores.argmax(), scores.shape))
    short, rise = best(mean[1]), mean[max(LENGTHS)] - mean[1]
    rise[short] = -np.inf
    return short, best(rise)


# ---- intervention on real text (Fig. 4b) ----


class Examples(NamedTuple):
    """Places in real text where a prefix matches."""
    row: Tensor             # (n,)
    q: Tensor               # (n,)
    k: Tensor               # (n,)
    length: Tensor          # (n,)

    def pick(self, which):
        return Examples(*(column[which] for column in self))


@torch.no_grad()
def find_examples(tokens, classes, model=None, head=None, unique=True):         # (B,T), (B,T) -> Examples
    """Places where a prefix of 1 or more tokens matches.

    By text alone: where the query has exactly one such key, so that no head's attention is divided (all
    places if not unique). Given a head: where that head's attention is over 0.3, as in the paper. In all, k
    is 3 or more, the token at k-2 is not BOS, and the two copies of the prefix do not overlap.
    """
    found = []
    for part in torch.arange(len(tokens), device=tokens.device).split(16):
        lengths, (q, k) = prefix_lengths(classes[part]), positions(tokens)
        lengths = lengths * (k < q)
        at = (lengths > 0) & (k >= 3) & (k + lengths <= q + 1) & (classes[part] >= 0).roll(2, 1)[:, None]
        if model is not None:
            for _, kept in model.layer_by_layer(tokens[part], head[0] + 1):
                attends = kept.pattern[:, head[1]] > ATTENDS            # of the last one, in the end
            at &= attends
        elif unique:
            at &= (lengths > 0).sum(-1, keepdim=True) == 1
        row, query, key = at.nonzero(as_tuple=True)
        found.append(Examples(part[row], query, key, lengths[row, query, key]))
    return Examples(*map(torch.cat, zip(*found)))


def replaced(tokens, table, examples, offset, generator):               # -> (n,T)
    """A copy of each example's row with the token at k + offset replaced by a random one that matches nothing
    in the row."""
    rows = tokens[examples.row].clone()
    for row, at in zip(rows, (examples.k + offset).tolist()):
        present = {-1, *table[row].tolist()}
        while int(table[token := int(torch.randint(len(table), (), generator=generator))]) in present:
            pass
        row[at] = token
    return rows


@torch.no_grad()
def attention_at(model, rows, examples, layers):                        # (n,T) -> (n,len(layers),H)
    """Every head's attention from q to k."""
    found = []
    for part in torch.arange(len(rows), device=rows.device).split(32):
        at, q, k = torch.arange(len(part), device=rows.device), examples.q[part], examples.k[part]
        found.append(torch.stack([kept.pattern[at, :, q, k] for layer, kept in
                                  model.layer_by_layer(rows[part], max(layers) + 1)
                                  if layer in layers], 1).cpu())
    return torch.cat(found).numpy()


def intervene(model, tokens, table, examples, heads, n, seed=0):      # -> {condition: {...}}
    """Attention of the heads before and after one token is replaced.

    corrupt: k-2, prefix 2 or longer. control, other token: k+2, the same examples; in both, k+2 stands before
    the prefix that ends at the query, and is not BOS. control, prefix 1: k-2, prefix exactly 1. At most n
    examples each, drawn at random; intervals over rows.
    """
    generator, layers, results = torch.Generator().manual_seed(seed), sorted({l for l, _ in heads}), {}
    later = tokens[examples.row, (examples.k + 2).clamp_max(tokens.shape[1] - 1)]
    room = (examples.k + 2 <= examples.q - examples.length) & (table[later] >= 0)
    draw = lambda e: e.pick(torch.randperm(len(e.q), generator=generator)[:n].to(e.q.device))
    long, one = draw(examples.pick((examples.length >= 2) & room)), draw(examples.pick(examples.length == 1))
    for name, chosen, offset in (("corrupt", long, -2), ("control, other token", long, 2),
                                 ("control, prefix 1", one, -2)):
        results[name] = {"n": len(chosen.q), "n_rows": len(chosen.row.unique())}
        if not len(chosen.q):
            continue
        before = attention_at(model, tokens[chosen.row], chosen, layers)
        after = attention_at(model, replaced(tokens, table, chosen, offset, generator), chosen, layers)
        for layer, h in heads:
            pair = [found[:, layers.index(layer), h] for found in (before, after)]
            values = np.stack([*pair, pair[1] - pair[0]], 1)
            mean, (low, high) = mean_of(values, chosen.row.cpu().numpy())
            names = ("before", "after", "change")
            results[name][f"{layer}.{h}"] = ({key: m for key, m in zip(names, mean)}
                                             | {f"{key}_ci": [a, b] for key, a, b in zip(names, low, high)})
    return results


# ---- "X is next by induction" features (Fig. 2) ----


def name_next(tokens, classes, entries, d_sae):                         # -> (d_sae,)
    """For each feature the token that followed earlier occurrences of the current token most often, weighted
    by activation; -1 where there is none."""
    owner, column = [], []
    for part in torch.arange(len(entries.q), device=tokens.device).split(2**16):
        row, q = entries.row[part], entries.q[part]
        matches = (classes[row, :-1] == classes[row, q][:, None]) & (classes[row, q] >= 0)[:, None]
        matches &= torch.arange(tokens.shape[1] - 1, device=tokens.device) < q[:, None]
        i, k = matches.nonzero(as_tuple=True)
        owner.append(part[i])
        column.append(k + 1)
    owner, column = torch.cat(owner), torch.cat(column)
    V, X = int(tokens.max()) + 1, tokens[entries.row[owner], column]
    vote = (owner * V + X).unique()                                     # a token once for each entry
    owner, X = vote // V, vote % V
    pair, index = (entries.feature[owner] * V + X).unique(return_inverse=True)
    weight = entries.f.new_zeros(len(pair)).index_add_(0, index, entries.f[owner])
    order = torch.from_numpy(np.lexsort((weight.cpu().numpy(), (pair // V).cpu().numpy()))).to(pair.device)
    feature, X = pair[order] // V, pair[order] % V
    last = feature != F.pad(feature[1:], (0, 1), value=-1)              # the heaviest token of each feature
    named = torch.full((d_sae,), -1, device=tokens.device)
    named[feature[last]] = X[last]
    return named


class Tally(NamedTuple):
    """Sums over text for each feature and the token X it is named after."""
    n: Tensor               # (d_sae,) active positions
    mass: Tensor            # (d_sae,) sum of activations
    n_hit: Tensor           # (d_sae,) active positions where X followed the current token earlier
    hit: Tensor             # (d_sae,) sum of activations there


def tally(model, saes, tokens, classes, names, say=lambda done: None):  # -> {layer: Tally}
    """Where the features are active, and how much of that where their token followed earlier."""
    zeros = lambda sae: torch.zeros(sae.d_sae, dtype=torch.float64)     # on the CPU: MPS has no float64
    tallies = {layer: Tally(*(zeros(sae) for _ in Tally._fields)) for layer, sae in saes.items()}
    for layer, (row, q, feature, f) in active_entries(model, saes, tokens, say):
        parts = zip(*(column.split(2**16) for column in (row, q, names[layer][feature])))
        hit = torch.cat([followed_by(tokens, classes, *part) for part in parts] or [f > 0]).cpu().double()
        feature, f = feature.cpu(), f.cpu().double()
        for total, each in zip(tallies[layer], (torch.ones_like(hit), f, hit, hit * f)):
            total.index_add_(0, feature, each)
    return tallies


def expected_share(model, sae, layer, tokens, classes, features, X, others, its_classes):       # -> (m,)
    """The share of a feature's activation that would fall where X followed earlier if it depended on the
    current token alone: sum over tokens of (activation at that token) * (how often X followed it earlier).

    features, X (m,). How often is counted in `others`, rows that are not those measured: with a token that is
    rare, its own hits would otherwise be what is expected. A feature that reads nothing but the current token
    has this share, up to the difference of the two texts.
    """
    n = int(max(classes.max(), its_classes.max())) + 2                  # class -1 is BOS
    mass, rate = (sae.b_enc.new_zeros(n, len(features)) for _ in range(2))
    count = torch.bincount(its_classes[:, 1:].flatten() + 1, minlength=n).clamp_min(1)
    for part in torch.arange(len(tokens), device=tokens.device).split(32):
        f = sae.encode(model.z_cat_at(tokens[part], [layer])[layer][:, 1:])[..., features]
        mass.index_add_(0, classes[part, 1:].flatten() + 1, f.flatten(0, 1))
    for one in X.unique().tolist():
        has = (others == one).any(1).nonzero()[:, 0]
        proxy = proxy_everywhere(others[has], its_classes[has], one)
        times = torch.bincount(its_classes[has, 1:][proxy] + 1, minlength=n)
        rate[:, X == one] = (times / count)[:, None].to(rate.dtype)
    return (mass * rate).sum(0) / mass.sum(0)


def proxy_everywhere(tokens, classes, X):                               # (B,T) -> (B,T-1) bool
    """The proxy at positions 1 to T-1."""
    found = []
    for part in torch.arange(len(tokens), device=tokens.device).split(64):
        row, q = torch.meshgrid(part, torch.arange(1, tokens.shape[1], device=tokens.device), indexing="ij")
        hits = followed_by(tokens, classes, row.flatten(), q.flatten(), torch.full_like(row, X).flatten())
        found.append(hits.view(row.shape))
    return torch.cat(found)


@torch.no_grad()
def find_features(model, saes, tokens, classes, say=lambda done: None):
    """Every "X is next by induction" feature -> list of dicts, first those whose share is most above the
    expected one; {layer: number of features active in the second half}; {layer: (d_sae,) each one's X}.

    X is named on the first half of the rows (by the 32 strongest activations), the rest is measured on the
    second half: a feature counts if it is active at 100 positions or more, if half of its activation or more
    is where X followed the current token (or its variant) earlier, and if that share is 0.25 or more above
    what the current token alone would give (`expected_share`).
    """
    naming, measuring = tokens[:len(tokens) // 2], tokens[len(tokens) // 2:]
    names, its_classes = {}, classes[len(naming):]
    best = {layer: Keeper(32, sae.d_sae) for layer, sae in saes.items()}
    for layer, entries in active_entries(model, saes, naming, say):
        best[layer].add(entries, entries.feature, entries.f)
    for layer, sae in saes.items():
        named = name_next(naming.cpu(), classes[:len(naming)].cpu(), best[layer].best()[0], sae.d_sae)
        names[layer] = named.to(tokens.device)
    found, n_live = [], {}
    later = lambda done: say(len(naming) + done)
    for layer, t in tally(model, saes, measuring, its_classes, names, later).items():
        n_live[layer] = int((t.n > 0).sum())
        share = t.hit / t.mass.clamp_min(1e-30)
        chosen = ((t.n >= N_ACTIVE) & (share >= SHARE)).nonzero()[:, 0]
        X = names[layer][chosen]
        expected = expected_share(model, saes[layer], layer, measuring, its_classes, chosen, X, naming,
                                  classes[:len(naming)])
        of_layer = [{"layer": layer, "feature": i, "X": x, "share": float(share[i]), "expected_share": e,
                     "n_active": int(t.n[i]), "n_hit": int(t.n_hit[i])}
                    for i, x, e in zip(chosen.tolist(), X.tolist(), expected.tolist())]
        found += [one for one in of_layer if one["share"] >= one["expected_share"] + EXCESS]
    return sorted(found, key=lambda one: one["expected_share"] - one["share"]), n_live, names


class Detail(NamedTuple):
    """One feature over text, at positions 1 to T-2 (which have a next token)."""
    f: Tensor               # (B,T-2) its activation
    proxy: Tensor           # (B,T-2) whether X followed the current token earlier
    is_X: Tensor            # (B,T-2) whether X is the next token


@torch.no_grad()
def details(model, saes, wanted, tokens, classes):      # [(layer, feature, X)] -> [Detail]
    """Activation and proxy of some features at every position, for Fig. 2, in one pass over the text."""
    found, layers = [[] for _ in wanted], sorted({layer for layer, _, _ in wanted})
    for part in tokens.split(32):
        z = model.z_cat_at(part, layers)
        for each, (layer, feature, _) in zip(found, wanted):
            each.append(saes[layer].activation(z[layer][:, 1:-1], feature))
    return [Detail(torch.cat(f), proxy_everywhere(tokens, classes, X)[:, :-1], tokens[:, 2:] == X)
            for f, (_, _, X) in zip(found, wanted)]


def precision_and_recall(d, levels=(0.0, 0.25, 0.5, 0.75)):             # Detail -> list of dicts
    """At levels of activation, as parts of its maximum: precision P(proxy | f > level), recall P(f > level |
    proxy), with their denominators."""
    table = []
    for level in levels:
        over = d.f > level * d.f.max()
        both, n, n_proxy = int((over & d.proxy).sum()), int(over.sum()), int(d.proxy.sum())
        table.append({"level": level, "n_over": n, "n_proxy": n_proxy, "n_both": both,
                      "precision": both / n if n else None, "recall": both / n_proxy if n_proxy else None})
    return table


@torch.no_grad()
def downstream(model, sae, layer, feature, X, tokens, d, n_rows=64, seed=0):
    """What a feature does for X.

    direct_logit: what it adds, where it is active, to the logit of X less the mean over all tokens, the final
    norm's scale frozen; rank_of_X: X's place among all tokens in its direction. loss_if_X, loss_if_not_X: by
    how much the loss changes, in nats, when the feature is removed where it is active, SAE error kept and
    nothing frozen, apart by whether X is the next token. Intervals over rows.
    """
    rows = (d.f > 0).any(1).nonzero()[:, 0].cpu()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n_rows]]
    effects = token_effects(model, layer, sae, feature)                                           # (d_vocab,)
    direct, change, is_X, owner = [], [], [], []
    for row in rows.split(16):
        part, f = tokens[row], d.f[row]
        x, cache = model.through(model.embed(part), keep=(layer,))
        scale = model.final_scale(x) * cache[layer].scales.get("attn_out", 1.0)                     # (b,T,1)
        where = F.pad(f > 0, (1, 1))
        after, _ = model.through(cache[layer].resid_pre, {layer: ablate(sae, feature, where)},
                                 layers=range(layer, model.config.n_layers))
        at = where.nonzero(as_tuple=True)
        target = part[at[0], at[1] + 1]
        loss = [F.cross_entropy(model.unembed(stream[at]).float(), target, reduction="none")
                for stream in (x, after)]
        change.append(loss[1] - loss[0])
        direct.append(f[f > 0] * effects[X] / scale[at][:, 0])
        is_X.append(target == X)
        owner.append(row.to(part.device)[at[0]])
    change, direct, is_X, owner = (torch.cat(found).cpu().numpy() for found in (change, direct, is_X, owner))
    result = {"rank_of_X": 1 + int((effects > effects[X]).sum()), "n_rows": len(rows)}
    for name, values, chosen in (("direct_logit", direct, is_X | ~is_X), ("loss_if_X", change, is_X),
                                 ("loss_if_not_X", change, ~is_X)):
        mean, interval = mean_of(values[chosen], owner[chosen])
        result |= {name: mean, name + "_ci": interval, "n_" + name: int(chosen.sum())}
    return result


def show_places(d, tokens, tokenizer, n=5, seed=0):                     # -> {kind: list of text}
    """True positives and false positives with the largest activation, and false negatives drawn at random."""
    generator, shown = torch.Generator().manual_seed(seed), {}
    for kind, wanted in (("active, X followed earlier", (d.f > 0) & d.proxy),
                         ("active, X did not follow earlier", (d.f > 0) & ~d.proxy)):
        values = torch.where(wanted, d.f, 0).flatten()
        best = values.topk(min(n, int(wanted.sum()))).indices
        shown[kind] = [(float(values[i]), *divmod(int(i), d.f.shape[1])) for i in best]
    silent = ((d.f == 0) & d.proxy).nonzero()
    drawn = silent[torch.randperm(len(silent), generator=generator)[:n]].tolist()
    shown["silent, X followed earlier"] = [(0.0, row, q) for row, q in drawn]
    return {kind: [{"f": f, "text": in_text(tokens[row], q + 1, tokenizer)} for f, row, q in places]
            for kind, places in shown.items()}


# ---- the program ----


@dataclass(frozen=True)
class InductionConfig(StudyConfig):
    feature: str = field("", "the feature to draw, as layer.feature; empty: the first of those found")
    n_sequences: int = field(400, "random sequences for each prefix length (the paper: 400)")
    n_examples: int = field(300, "places in real text where a token is replaced, for each condition")
    n_rows: int = field(2048, "rows of real text")


def main():
    config = parse_flags(InductionConfig, __doc__)
    for flag, value in (("--n-sequences", config.n_sequences), ("--n-examples", config.n_examples),
                        ("--n-rows", config.n_rows)):
        if value < 2:
            raise UserError(f"{flag} must be 2 or more, not {value}.")
    layer, feature = parse_feature(config.feature)
    model, tokenizer, saes, folder = begin(config, "induction")
    if layer is not None:
        check_feature(saes, layer, feature)
    T = min(128, model.config.n_ctx)
    rows = next(data.rows(config.corpus, tokenizer, "held-out", T, config.n_rows, repeat_share=0.0))
    if len(rows) < 16:
        raise UserError(f"--corpus {config.corpus} gave {len(rows)} held-out rows, and 16 are needed; give "
                        f"more text, or raise --n-rows.")
    device = next(model.parameters()).device
    rows, table = rows.to(device), fuzzy(tokenizer).to(device)
    study_heads(config, model, tokenizer, rows, table, folder)
    heads = study_prefixes(config, model, tokenizer, table, folder)
    reported(config, "5.1 below 0.3 for short prefixes, over 0.7 for long ones; 5.5 already 0.7 for short")
    study_intervention(config, model, rows, table, heads, folder)
    reported(config, "long prefixes corrupted: 5.1 falls from 0.55 to 0.05, 5.5 stays at 0.43")
    study_features(config, model, tokenizer, saes, rows, table, (layer, feature), folder)
    finish(config, folder)


def study_heads(config, model, tokenizer, rows, table, folder):
    """Induction, previous-token and duplicate-token score of every head."""
    generator = torch.Generator().manual_seed(config.seed)
    random = random_rows(model, tokenizer.bos, table, 64, generator, repeat=True)
    scores = {"repeated random tokens": head_scores(model, random, table[random]),
              "held-out text": head_scores(model, rows[:256], table[rows[:256]])}
    for text, by_name in scores.items():
        print(f"\nmean attention on {text}, strongest heads")
        for name, values in by_name.items():
            order = values.flatten().argsort(descending=True)[:5].tolist()
            best = [divmod(i, values.shape[1]) for i in order]
            print(f"{name:>10}  " + "  ".join(f"{l}.{h} {float(values[l, h]):.2f}" for l, h in best))
            by_name[name] = values.tolist()
    write_json(folder / "heads.json", scores)
    plot_heads(scores, folder / "heads.png")


def study_prefixes(config, model, tokenizer, table, folder):            # -> (short head, long head)
    """The paired protocol for every head; picks the short-prefix and the long-prefix head."""
    progress = Progress(config.n_sequences, "sequences")
    curves = prefix_curves(model, tokenizer.bos, table, config.n_sequences, config.seed,
                           progress)
    short, long = pick_heads(curves.attention)
    statistics = {}
    for name, values in zip(PrefixCurves._fields, curves):
        mean, interval = mean_of(values)
        statistics |= {name: mean, name + "_ci": interval}
    rise, rise_ci = mean_of(curves.attention[:, max(LENGTHS)] - curves.attention[:, 1])
    found = {"n_sequences": config.n_sequences, "prefix_lengths": list(LENGTHS),
             "short_head": f"{short[0]}.{short[1]}", "long_head": f"{long[0]}.{long[1]}",
             **statistics, "rise": rise, "rise_ci": rise_ci}
    write_json(folder / "prefix.json", found)
    plot_prefixes(found, folder / "prefix.png")
    mean = curves.attention.mean(0)
    strong = [divmod(int(i), mean.shape[2]) for i in mean[max(LENGTHS)].argsort(axis=None)[::-1][:6]]
    print(f"\nattention to the token after the prefix, by prefix length; {config.n_sequences} random "
          f"sequences, the same for all lengths\nhead " + "".join(f"{p:6d}" for p in LENGTHS)
          + "   rise from 1 to 9")
    for l, h in dict.fromkeys([short, long, *strong]):
        role = {short: "  short-prefix head", long: "  long-prefix head"}.get((l, h), "")
        print(f"{l}.{h:<3}" + "".join(f"{a:6.2f}" for a in mean[:, l, h])
              + "   " + with_interval(rise[l][h], [rise_ci[0][l][h], rise_ci[1][l][h]], "+.2f") + role)
    return short, long


def study_intervention(config, model, rows, table, heads, folder):
    """The prefix cut to one token in real text, with both controls, on three choices of examples."""
    classes, found = table[rows], {}
    everywhere = find_examples(rows, classes, unique=False).length.clamp_max(10)
    lengths = {"everywhere": torch.bincount(everywhere, minlength=11)[1:].tolist()}
    chosen = {"by text alone": (find_examples(rows, classes), heads)}
    for layer, h in heads:
        chosen[f"where {layer}.{h} attends"] = find_examples(rows, classes, model, (layer, h)), [(layer, h)]
    print(f"\nattention before and after one token is replaced; [95% interval]\n{'examples':22}"
          f"{'replaced':22}{'n':>5}  head  before  after   change")
    for choice, (examples, mine) in chosen.items():
        found[choice] = intervene(model, rows, table, examples, mine, config.n_examples, config.seed)
        lengths[choice] = torch.bincount(examples.length.clamp_max(10), minlength=11)[1:].tolist()
        for condition, r in found[choice].items():
            for layer, h in mine:
                if (one := r.get(f"{layer}.{h}")) is None:
                    print(f"{choice:22}{condition:22}{0:5}  {layer}.{h}   n/a: no such place in this text")
                    continue
                print(f"{choice:22}{condition:22}{r['n']:5}  {layer}.{h}  {one['before']:6.2f} "
                      f"{one['after']:6.2f}   {with_interval(one['change'], one['change_ci'], '+.3f')}")
    names = [f"{layer}.{h}" for layer, h in heads]
    write_json(folder / "intervention.json", {"heads": names, "conditions": found, "prefix_lengths": lengths})
    plot_intervention(found, names, folder / "intervention.png")
    plot_lengths(lengths, folder / "prefix_lengths.png")


def study_features(config, model, tokenizer, saes, rows, table, asked, folder, n_shown=20):
    """Every "X is next by induction" feature; one of them in full."""
    classes, progress = table[rows], Progress(len(rows), "rows")
    print("\nlooking for features ...", flush=True)
    found, n_live, names = find_features(model, saes, rows, classes, progress)
    rows, classes = rows[len(rows) // 2:], classes[len(rows) // 2:]
    counts = {layer: sum(one["layer"] == layer for one in found) for layer in saes}
    print("\"X is next by induction\" features: "
          + ", ".join(f"layer {layer} {n} of {n_live[layer]} live" for layer, n in counts.items()))
    print("share: of its activation, where X followed its token earlier; loss: change without it\n"
          "feature   X             active    share   by token alone   rank of X   loss, X next / not")
    for one in found:
        one["X_text"] = tokenizer.decode([one["X"]])
    shown = [(one["layer"], one["feature"], one["X"]) for one in found[:n_shown]]
    for one, d, (layer, feature, X) in zip(found, details(model, saes, shown, rows, classes), shown):
        one["downstream"] = r = downstream(model, saes[layer], layer, feature, X, rows, d, seed=config.seed)
        loss = " / ".join("n/a" if change is None else f"{change:+.3f}"
                          for change in (r["loss_if_X"], r["loss_if_not_X"]))
        print(f"{layer}.{feature:<7} {one['X_text']!r:12} {one['n_active']:7} {one['share']:8.1%} "
              f"{one['expected_share']:12.1%} {r['rank_of_X']:14}   {loss}")
    result = {"n_live": n_live, "n_found": counts, "features": found}
    write_json(folder / "features.json", result)
    if asked[0] is None and not found:
        print("none, so none is drawn; --feature draws one all the same")
        return
    layer, feature = (found[0]["layer"], found[0]["feature"]) if asked[0] is None else asked
    X = int(names[layer][feature])
    if X < 0:
        raise UserError(f"feature {layer}.{feature} was never active where a token came again in these rows; "
                        f"raise --n-rows, or name another with --feature.")
    d, = details(model, saes, [(layer, feature, X)], rows, classes)
    drawn = {"layer": layer, "feature": feature, "X": X, "X_text": tokenizer.decode([X]),
             "found": any((one["layer"], one["feature"]) == (layer, feature) for one in found),
             "precision_and_recall": precision_and_recall(d),
             "places": show_places(d, rows, tokenizer, seed=config.seed),
             "downstream": downstream(model, saes[layer], layer, feature, X, rows, d, seed=config.seed)}
    print_feature(drawn)
    write_json(folder / "features.json", result | {"drawn": drawn})
    active = d.f > 0
    plot_feature(d.f[active].cpu().numpy(), d.proxy[active].cpu().numpy(),
                 f"{layer}.{feature}, named after {drawn['X_text']!r}", folder / "feature.png")


def print_feature(drawn):
    """Precision, recall, what the feature does for X, and places in the text."""
    print(f"\nfeature {drawn['layer']}.{drawn['feature']}, named after {drawn['X_text']!r}, "
          + ("one of those found" if drawn["found"] else "not one of those found: it does not meet the rule"))
    print("activation over   precision            recall")
    for r in drawn["precision_and_recall"]:
        precision, recall = ("n/a" if r[name] is None else f"{r[name]:.1%} of {r[n]}"
                             for name, n in (("precision", "n_over"), ("recall", "n_proxy")))
        print(f"{r['level']:8.0%} of max   {precision:18}   {recall}")
    for name, meaning in (("direct_logit", "adds to X's logit, directly"),
                          ("loss_if_X", "loss without it, X next"), ("loss_if_not_X", "X not next")):
        r = drawn["downstream"]
        print(f"{meaning:28} {with_interval(r[name], r[name + '_ci'], '+.3f')}, n = {r['n_' + name]}")
    for kind, examples in drawn["places"].items():
        print(kind + ":")
        for e in examples:
            print(f"  {e['f']:6.2f}  {e['text']}")


if __name__ == "__main__":
    common.run(main)
