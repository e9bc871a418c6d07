"""The induction study: '"board" is next by induction', and heads that need a long prefix (the
paper, Fig. 2, 4 and 19).

An induction head at a query looks for the same token earlier in the text, and attends to the one
after it:

    ... A B C X ...... A B C    prefix length 3: query C attends to key X, as A B C stood before X
              k            q    L[q,k] = length of the longest run up to q that equals that before k

    heads          induction, previous-token and duplicate-token score of every head
    prefix         random rows; in each, the prefix grown from 0 to 9 tokens with key and query in
                   place: attention to X, and direct logit attribution of X, for every head
    intervention   held-out text: the token at k-2 replaced, so that 1 token of the prefix is left.
                   Controls: the token at k+2 replaced instead; that at k-2 where only 1 matched
    features       "X is next" features: SAE features that fire where X followed the current token
                   earlier. They are found by text; the family "after a copy" of features.py is
                   found by DFA, and may read whatever followed

    python induction.py         all four on the shipped model, in <out>/<model>/induction/

Two tokens match if they are equal but for one leading space and the case of letters
(data.tokens.fuzzy_classes). BOS, which also stands between the documents of a row, matches nothing,
and is never the key X.

Shapes: B batch, T positions (q query, k key), H heads, d_head; n examples.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import UserError, run
from data.figures import plot_feature, plot_heads, plot_intervention, plot_prefixes
from data.files import write_json
from data.flags import field, parse_flags
from data.progress import Progress
from data.stats import format_ci, mean_with_ci
from data.strongest import StrongestPerGroup, feature_token_mass, rank_in_group
from data.tokens import fuzzy_classes, is_copy, text_around
from direct import direct_logits, token_directions, token_effects
from model import span
from sae import ablate, check_feature
from sparse import active_entries
from study import (StudyConfig, begin, finish, held_out_rows, parse_feature, parse_heads,
                   reported)

LENGTHS = range(10)             # prefix lengths of the paired protocol
SHORTEST_ROW = 2 * max(LENGTHS) + 3     # tokens: BOS, two of the longest prefix, key and query
MIN_ATTENTION = 0.3             # above which a head counts as attending (Fig. 4b)

# ---- which tokens match ----


def prefix_lengths(classes):                                # (B,T) -> (B,q,k)
    """L[q,k]: the length of the longest run of tokens that ends at q and matches the run that ends
    at k-1; 0 for k > q and for k = 0.

    classes: an integer for each token, equal where tokens match; BOS is -1, which matches nothing.

    L[q,k] = 1 + L[q-1,k-1] if q matches k-1, else 0.
    """
    B, T = classes.shape
    same = (classes[:, :, None] == classes[:, None]) & (classes >= 0)[:, None]          # (B,q,k)
    lengths = classes.new_zeros(B, T, T)
    for q in range(1, T):
        lengths[:, q, 1:q + 1] = same[:, q, :q] * (1 + lengths[:, q - 1, :q])
    return lengths


def followed_by(tokens, classes, row, q, X):                # (B,T) x 2, (n,) x 3 -> (n,) bool
    """The proxy of Fig. 2: whether the token at q, or its variant in space or case, stood earlier
    in its row with token X after it."""
    was_X = tokens[row, 1:] == X[:, None]                               # (n,T-1)
    return (earlier_copies(classes, row, q) & was_X).any(-1)


def earlier_copies(classes, row, q):                        # (B,T), (n,), (n,) -> (n,T-1) bool
    """Where in its row copies of the token at q stand before it."""
    k = torch.arange(classes.shape[1] - 1, device=classes.device)
    row, q = row[:, None], q[:, None]
    return is_copy(classes, row, q, k) & (k < q)


def followed_everywhere(tokens, classes, X):                # (B,T) x 2, a token -> (B,T-1) bool
    """The proxy for one token at positions 1 to T-1."""
    T = tokens.shape[1]
    parts = []
    for rows in torch.arange(len(tokens), device=tokens.device).split(64):
        row = rows.repeat_interleave(T - 1)
        q = torch.arange(1, T, device=tokens.device).repeat(len(rows))
        hits = followed_by(tokens, classes, row, q, torch.full_like(row, X))
        parts.append(hits.view(len(rows), T - 1))
    return torch.cat(parts)


# ---- heads ----


@torch.no_grad()
def head_scores(model, tokens, classes, matched=1):         # (B,T) x 2 -> {score: (layers,H)}
    """Mean attention of every head at the queries that have something to look at.

    induction: to the keys k with L[q,k] >= matched, summed over them. duplicate: to earlier
    occurrences of the query's token, summed. previous: to the token before the query. BOS is never
    such a key. Also "n_queries", how many the induction score is a mean over. (data/tiny/make.py
    asks for other `matched`, and for n_queries.)
    """
    layers = range(model.config.n_layers)
    names = ("induction", "previous", "duplicate")
    attention = {(name, layer): 0 for name in names for layer in layers}
    n_queries = dict.fromkeys(names, 0)
    for part in torch.arange(len(tokens), device=tokens.device).split(16):
        targets = score_targets(classes[part], matched)
        for name in names:
            n_queries[name] += int(targets[name].any(-1).sum())
        for layer, kept in model.layer_caches(tokens[part]):
            for name in names:
                on_target = (kept.pattern * targets[name][:, None]).sum(-1)         # (B,H,q)
                attention[name, layer] = attention[name, layer] + on_target.sum((0, 2))
    scores = {}
    for name in names:
        sums = torch.stack([attention[name, layer] for layer in layers])            # (layers,H)
        scores[name] = sums / max(n_queries[name], 1)
    return scores | {"n_queries": n_queries["induction"]}


def score_targets(classes, matched):                        # (B,T) -> {score: (B,q,k) bool}
    """The keys that each score is about. None of them is BOS: many heads look there from anywhere,
    and between documents it may follow a copy of the query's token by chance."""
    q, k = query_and_key_positions(classes)
    is_token = (classes >= 0)[:, None]                                  # (B,1,k)
    same = classes[:, :, None] == classes[:, None]
    return {"induction": (prefix_lengths(classes) >= matched) & (k < q) & is_token,
            "duplicate": same & (k < q) & is_token,
            "previous": (k == q - 1) & is_token}


def query_and_key_positions(tokens):                        # (B,T) -> (T,1), (1,T)
    """Query and key positions, to compare with each other."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return position[:, None], position[None]


def random_rows(model, bos, token_class, n, generator, repeat=False):   # -> (n,T)
    """BOS and random tokens that all differ, also in class; with `repeat` half as many, all of them
    twice. token_class: (n_vocab,)."""
    longest = min(128, model.config.n_ctx)                  # with `repeat` T is odd: 127
    n_different = (longest - 1) // 2 if repeat else longest - 1
    class_of = token_class.cpu().numpy()
    _, one_of_each = np.unique(class_of, return_index=True)
    pool = torch.from_numpy(one_of_each[class_of[one_of_each] >= 0])
    if len(pool) < n_different:
        raise UserError(f"this vocabulary has {len(pool)} tokens that differ, and a row takes "
                        f"{n_different}.")
    drawn = torch.stack([pool[torch.randperm(len(pool), generator=generator)[:n_different]]
                         for _ in range(n)])
    parts = [torch.full((n, 1), bos), drawn]
    if repeat:
        parts.append(drawn)
    return torch.cat(parts, 1).to(token_class.device)


# ---- prefix length (Fig. 4a, 19) ----


class PrefixCurves(NamedTuple):
    """Scores of every head by prefix length, paired: the sequences are the same for all lengths."""
    attention: np.ndarray   # (n,lengths,layers,H) from the query to the key after the prefix
    logit: np.ndarray       # (n,lengths,layers,H) direct logit attribution of the key's token


@torch.no_grad()
def prefix_curves(model, bos, token_class, n=400, seed=0, progress=lambda rows: None):
    """The paired protocol -> PrefixCurves.

    Key and query of a random row stay where they are, and for each length p the p tokens before the
    key are copied to the p tokens up to the query. All tokens but the copies differ.
    """
    generator = torch.Generator().manual_seed(seed)
    base = random_rows(model, bos, token_class, n, generator)
    key, query = draw_key_and_query(base, generator)
    order = query.argsort()         # a block is cut after its last query: sorted, that is cheapest
    base, key, query = base[order], key[order], query[order]
    matrices = [model.head_matrices(layer) for layer in range(model.config.n_layers)]
    attention, logit = [], []
    for rows in torch.arange(n, device=base.device).split(8):
        up_to_query = base[rows, :query[rows].max() + 1]
        tokens, k, q = grow_prefix(up_to_query, key[rows], query[rows])
        pattern, direct = attention_and_logits(model, matrices, up_to_query, tokens, k, q)
        attention.append(pattern.cpu().numpy())
        logit.append(direct.cpu().numpy())
        progress(int(rows[-1]) + 1)
    shape = (n, len(LENGTHS), model.config.n_layers, model.config.n_heads)
    return PrefixCurves(np.concatenate(attention).reshape(shape),
                        np.concatenate(logit).reshape(shape))


def draw_key_and_query(base, generator):                    # (n,T) -> (n,), (n,)
    """Random positions with room for the longest prefix before each."""
    n, T = base.shape
    longest = max(LENGTHS)
    if T < SHORTEST_ROW:
        raise UserError(f"prefixes of {longest} tokens take rows of {SHORTEST_ROW} tokens or more; "
                        f"this model has {T}.")
    key = torch.randint(longest + 1, T - longest - 1, (n,), generator=generator)
    query = [torch.randint(int(k) + longest, T, (), generator=generator) for k in key]
    return key.to(base.device), torch.stack(query).to(base.device)


def grow_prefix(base, key, query):              # (b,T), (b,), (b,) -> (B,T), (B,), (B,)
    """Each row once for each prefix length, lengths varying fastest, so that B = b * lengths ->
    tokens, keys, queries."""
    n_lengths = len(LENGTHS)
    tokens = base.repeat_interleave(n_lengths, 0)
    k = key.repeat_interleave(n_lengths)
    q = query.repeat_interleave(n_lengths)
    length = torch.tensor(LENGTHS, device=base.device).repeat(len(base))
    row = torch.arange(len(tokens), device=base.device)
    for back in range(max(LENGTHS)):
        grown = back < length                               # the rows whose prefix is longer
        tokens[row[grown], (q - back)[grown]] = tokens[row[grown], (k - 1 - back)[grown]]
    return tokens, k, q


def attention_and_logits(model, matrices, base, tokens, k, q):  # (b,T), (B,T), (B,), (B,)
    """Every head's attention from q to k, and what it adds at q, directly, to the logit of the
    token at k, less the mean over all tokens -> (B,layers,H) each.

    tokens: of `grow_prefix`, base with other tokens in the longest prefix before q. What stands
    before that is the same in all, and is run once.
    """
    n_new = max(LENGTHS)                                    # positions up to q that may differ
    row = torch.arange(len(tokens), device=tokens.device)
    positions = q[:, None] + torch.arange(1 - n_new, 1, device=q.device)            # (B,n_new)
    caches = model.rerun_caches(model.run(base), row // len(LENGTHS), positions, tokens=tokens)
    attention = []

    def look(kept):
        attention.append(kept.pattern[row, :, -1, k])                   # (B,H): q is the last

    direction = model.logit_directions(tokens[row, k])
    last = torch.full_like(q, n_new - 1)
    logits = direct_logits(model, matrices, caches, last, direction, look)
    return torch.stack(attention, 1), logits


def pick_heads(attention):                      # (n,lengths,layers,H) -> two of (layer, head)
    """The head that attends most after 1 matching token; and, of the others, the one whose
    attention grows most from 1 token to 9. In GPT-2 Small they are to be a short-prefix and a
    long-prefix head; in another model they need not."""
    mean = attention.mean(0)
    first = argmax_head(mean[1])
    rise = mean[max(LENGTHS)] - mean[1]
    rise[first] = -np.inf
    return first, argmax_head(rise)


def argmax_head(scores):                                    # (layers,H) -> (layer, head)
    """The head with the largest score."""
    layer, head = np.unravel_index(scores.argmax(), scores.shape)
    return int(layer), int(head)


# ---- intervention on real text (Fig. 4b) ----


class Examples(NamedTuple):
    """Places in real text where a prefix matches."""
    row: Tensor             # (n,)
    q: Tensor               # (n,)
    k: Tensor               # (n,)
    length: Tensor          # (n,)

    def pick(self, which):
        return Examples(*(column[which] for column in self))


def find_examples(classes):                                 # (B,T) -> Examples
    """Places where a prefix matches, by text alone: the query has no other such key, so that no
    head's attention is divided."""
    parts = []
    for rows in torch.arange(len(classes), device=classes.device).split(16):
        lengths, possible = possible_examples(classes[rows])
        is_only_key = (lengths > 0).sum(-1, keepdim=True) == 1
        parts.append(examples_where(possible & is_only_key, lengths, rows))
    return joined_examples(parts)


@torch.no_grad()
def find_attended(model, tokens, classes, heads):           # (B,T) x 2 -> {head: Examples}
    """Places where a prefix matches and a head's attention is over 0.3, as in the paper.
    heads: of (layer, head)."""
    parts = {head: [] for head in heads}
    layers = {layer for layer, _ in heads}
    for rows in torch.arange(len(tokens), device=tokens.device).split(16):
        lengths, possible = possible_examples(classes[rows])
        for layer, kept in model.layer_caches(tokens[rows], layers):
            for head in heads:
                if head[0] == layer:
                    attends = kept.pattern[:, head[1]] > MIN_ATTENTION
                    parts[head].append(examples_where(possible & attends, lengths, rows))
    return {head: joined_examples(of_head) for head, of_head in parts.items()}


def possible_examples(classes):                             # (b,T) -> (b,q,k), (b,q,k) bool
    """Prefix lengths, 0 where the key is not before the query; and where a prefix of 1 or more
    tokens matches, the key and the token at k-2, which is to be replaced, are not BOS, and the two
    copies of the prefix do not overlap."""
    q, k = query_and_key_positions(classes)
    lengths = prefix_lengths(classes) * (k < q)
    is_token = classes >= 0
    before_is_token = F.pad(is_token, (2, 0))[:, :-2]                   # (b,k): at k-2
    fits = (is_token & before_is_token)[:, None]                        # (b,1,k)
    return lengths, (lengths > 0) & (k + lengths <= q + 1) & fits


def examples_where(chosen, lengths, rows):                  # (b,q,k) x 2, (b,) -> Examples
    """The places that are chosen; rows: the number of each row in the text."""
    row, q, k = chosen.nonzero(as_tuple=True)
    return Examples(rows[row], q, k, lengths[row, q, k])


def joined_examples(parts):                                 # list of Examples -> Examples
    """The examples of all parts, one after the other."""
    return Examples(*(torch.cat(column) for column in zip(*parts)))


def with_token_replaced(tokens, token_class, examples, offset, generator):      # -> (n,T)
    """A copy of each example's row with the token at k + offset replaced by a random one that
    matches nothing in the row."""
    rows = tokens[examples.row].clone()
    for row, position in zip(rows, (examples.k + offset).tolist()):
        present = {-1, *token_class[row].tolist()}
        for _ in range(10_000):
            token = int(torch.randint(len(token_class), (), generator=generator))
            if int(token_class[token]) not in present:
                row[position] = token
                break
        else:
            raise UserError("a row of this text has nearly every token of the vocabulary, and none "
                            "is left to replace one by.")
    return rows


@torch.no_grad()
def attention_at(model, rows, examples, layers):            # (n,T) -> (n,len(layers),H)
    """Every head's attention from q to k, in some layers."""
    parts = []
    order = examples.q.argsort()        # a block is cut after its last query: sorted is cheapest
    for part in order.split(32):
        row = torch.arange(len(part), device=rows.device)
        q, k = examples.q[part], examples.k[part]
        up_to_query = rows[part, :q.max() + 1]
        attention = [kept.pattern[row, :, q, k]
                     for _, kept in model.layer_caches(up_to_query, layers)]
        parts.append(torch.stack(attention, 1))
    return torch.cat(parts)[order.argsort()].cpu().numpy()


def intervene(model, tokens, token_class, examples, heads, n, seed=0):  # -> {condition: {...}}
    """Attention of the heads before and after one token is replaced.

    corrupt: k-2, prefix 2 or longer. control, other token: k+2, the same examples; in both, k+2
    stands before the prefix that ends at the query, and is not BOS. control, prefix 1: k-2, prefix
    exactly 1. At most n examples each, drawn at random; intervals over rows.
    """
    generator = torch.Generator().manual_seed(seed)
    after_k = (examples.k + 2).clamp_max(tokens.shape[1] - 1)
    has_room = (examples.k + 2 <= examples.q - examples.length) \
        & (token_class[tokens[examples.row, after_k]] >= 0)
    long = draw(examples.pick((examples.length >= 2) & has_room), n, generator)
    of_one_token = draw(examples.pick(examples.length == 1), n, generator)
    layers = sorted({layer for layer, _ in heads})
    results = {}
    for chosen, offsets in ((long, {"corrupt": -2, "control, other token": 2}),
                            (of_one_token, {"control, prefix 1": -2})):
        counts = {"n": len(chosen.q), "n_rows": len(chosen.row.unique())}
        if not len(chosen.q):
            results |= {condition: counts for condition in offsets}
            continue
        before = attention_at(model, tokens[chosen.row], chosen, layers)
        for condition, offset in offsets.items():
            rows = with_token_replaced(tokens, token_class, chosen, offset, generator)
            after = attention_at(model, rows, chosen, layers)
            results[condition] = counts | {
                f"{layer}.{h}": before_and_after(before[:, layers.index(layer), h],
                                                 after[:, layers.index(layer), h],
                                                 chosen.row.cpu().numpy())
                for layer, h in heads}
    return results


def before_and_after(before, after, row):                   # (n,) x 3 -> {name: mean, name_ci: ...}
    """Means of both and of the change, with intervals over rows."""
    result = {}
    for name, values in (("before", before), ("after", after), ("change", after - before)):
        result[name], result[f"{name}_ci"] = mean_with_ci(values, row)
    return result


def draw(examples, n, generator):                           # -> Examples, n at most
    """Some of the examples, drawn at random without replacement."""
    drawn = torch.randperm(len(examples.q), generator=generator)[:n]
    return examples.pick(drawn.to(examples.q.device))


# ---- "X is next" features (Fig. 2) ----
#
# On one half of the text, take the places where the feature is most active. Each gives its
# activation to the tokens that followed earlier copies of the token there; the one that is given
# most is X, and the feature is named after it. The feature counts if, on the other half, it is
# active often enough, at least MIN_SHARE of its activation is at places where X followed an earlier
# copy, and that is MIN_EXCESS more than the token at the place alone would give (at the rates of
# the first half).
#
# Entries (data/strongest.py) are the active features of a text: row, q, feature and activation f of
# each.

MIN_SHARE, MIN_EXCESS = 0.5, 0.25
MIN_ACTIVE = 100                # positions, at least, at which such a feature is active
N_NAMING = 32                   # strongest activations that name it


@torch.no_grad()
def find_features(model, saes, tokens, classes, progress=lambda rows: None):
    """Every "X is next" feature -> list of dicts, first those whose share is most above the
    expected one; {layer: number of features active in the second half}; {layer: (d_sae,) each one's
    X}."""
    half = len(tokens) // 2
    naming = Text(tokens[:half], classes[:half])
    measuring = Text(tokens[half:], classes[half:])
    names = name_features(model, saes, *naming, progress)
    sums = sum_where_followed(model, saes, *measuring, names, lambda rows: progress(half + rows))
    chosen = {}
    for layer, s in sums.items():
        is_often = (s.n >= MIN_ACTIVE) & (s.share >= MIN_SHARE)
        chosen[layer] = is_often.nonzero()[:, 0].to(tokens.device)
    X = {layer: names[layer][features] for layer, features in chosen.items()}
    expected = expected_shares(model, saes, chosen, X, measuring, naming,
                               lambda rows: progress(len(tokens) + rows))
    found = []
    for layer, s in sums.items():
        for i, x, by_token_alone in zip(chosen[layer].tolist(), X[layer].tolist(),
                                        expected[layer].tolist()):
            share = float(s.share[i])
            if share >= by_token_alone + MIN_EXCESS:
                found.append({"layer": layer, "feature": i, "X": x, "share": share,
                              "expected_share": by_token_alone, "n_active": int(s.n[i]),
                              "n_hit": int(s.n_hit[i])})
    found.sort(key=lambda feature: feature["expected_share"] - feature["share"])
    n_live = {layer: int((s.n > 0).sum()) for layer, s in sums.items()}
    return found, n_live, names


class Text(NamedTuple):
    """Rows of text."""
    tokens: Tensor          # (B,T)
    classes: Tensor         # (B,T)


def name_features(model, saes, tokens, classes, progress):  # -> {layer: (d_sae,)}
    """Every feature's X, from its strongest activations; -1 where there is none."""
    strongest = {layer: StrongestPerGroup(N_NAMING, sae.d_sae) for layer, sae in saes.items()}
    for layer, entries in active_entries(model, saes, tokens, progress):
        strongest[layer].add(entries, entries.feature, entries.f)
    names = {}
    for layer, sae in saes.items():
        entries, _, _ = strongest[layer].best()
        names[layer] = name_next(tokens.cpu(), classes.cpu(), entries, sae.d_sae).to(tokens.device)
    return names


def name_next(tokens, classes, entries, d_sae):             # (B,T) x 2 -> (d_sae,)
    """Each feature's X; -1 where no token of its entries came before.

    Each entry gives its activation to every token that followed an earlier copy of its own token,
    once to each, however often it followed; special tokens, of class -1, are left out. X is the
    token that is given most.
    """
    owner, position = [], []            # of each token that followed: its entry, and where it is
    for part in torch.arange(len(entries.q)).split(2**16):
        copies = earlier_copies(classes, entries.row[part], entries.q[part])
        i, earlier = copies.nonzero(as_tuple=True)
        owner.append(part[i])
        position.append(earlier + 1)
    owner, position = torch.cat(owner), torch.cat(position)
    is_text = classes[entries.row[owner], position] >= 0    # and no special token
    owner, position = owner[is_text], position[is_text]
    followed = tokens[entries.row[owner], position]
    # each pair (entry, token) once; as one number, since `unique` is slow on rows
    n_tokens = int(tokens.max()) + 1
    vote = (owner * n_tokens + followed).unique()
    owner, X = vote // n_tokens, vote % n_tokens
    # pairs (feature, token), feature by feature, the token that is given most first
    pair, _ = feature_token_mass(entries.feature[owner], X, entries.f[owner])
    heaviest = pair[rank_in_group(pair[:, 0]) == 0]
    named = torch.full((d_sae,), -1)
    named[heaviest[:, 0]] = heaviest[:, 1]
    return named


class SumsWhereFollowed(NamedTuple):
    """Sums over text for each feature and the token X it is named after, (d_sae,) each."""
    n: Tensor               # active positions
    mass: Tensor            # sum of activations
    n_hit: Tensor           # active positions where X followed the current token earlier
    mass_hit: Tensor        # sum of activations there

    @property
    def share(self):
        """The part of the activation that is there."""
        return self.mass_hit / self.mass.clamp_min(1e-30)


def sum_where_followed(model, saes, tokens, classes, names, progress=lambda rows: None):
    """How active each feature is, and how much of that where its X followed earlier -> {layer:
    SumsWhereFollowed}."""
    sums = {layer: torch.zeros(4, sae.d_sae, dtype=torch.float64) for layer, sae in saes.items()}
    for layer, entries in active_entries(model, saes, tokens, progress):
        X = names[layer][entries.feature]                   # -1, no name, equals no token
        hits = [followed_by(tokens, classes, *part) for part in
                zip(entries.row.split(2**16), entries.q.split(2**16), X.split(2**16))]
        is_hit = torch.cat(hits).cpu().double()             # 0 or 1
        f = entries.f.cpu().double()
        columns = torch.stack([torch.ones_like(f), f, is_hit, is_hit * f])
        sums[layer].index_add_(1, entries.feature.cpu(), columns)
    return {layer: SumsWhereFollowed(*columns) for layer, columns in sums.items()}


def expected_shares(model, saes, features, X, text, other, progress=lambda rows: None):
    """The share of a feature's activation that would fall where X followed earlier if it depended
    on the class of the current token alone (" the" and "The" are one) -> {layer: (m,)}.

    It is the sum over classes of (activation at that class, in the text) * (the share of its
    occurrences, in the other text, where X followed it earlier), over the sum of activations.
    features, X: {layer: (m,)}. Another text, because in the same one a token that occurs once,
    where X had followed, would have a rate of 1, and the expected share would be the measured one.
    A feature that reads nothing but the current class has this share, up to the difference of the
    two texts.
    """
    present, index = text.classes.unique(return_inverse=True)           # (n,), (B,T)
    mass = {layer: saes[layer].b_enc.new_zeros(len(present), len(of_layer))
            for layer, of_layer in features.items()}
    for part in torch.arange(len(index), device=index.device).split(32):
        for layer, z in model.z_cat_at(text.tokens[part], list(features)).items():
            f = saes[layer].encode(z[:, 1:])[..., features[layer]]      # (b,T-1,m)
            mass[layer].index_add_(0, index[part, 1:].flatten(), f.flatten(0, 1))
        progress(int(part[-1]) + 1)

    different = torch.cat(list(X.values())).unique().tolist()
    rates = {x: rate_followed(x, other, present) for x in different}    # (n,) each
    shares = {}
    for layer, of_classes in mass.items():
        rate = [rates[x] for x in X[layer].tolist()]
        rate = torch.stack(rate, 1).to(of_classes) if rate else of_classes
        shares[layer] = (of_classes * rate).sum(0) / of_classes.sum(0)
    return shares


def rate_followed(X, text, classes):                        # (n,) -> (n,)
    """The share of each class's occurrences in a text where token X had followed it earlier."""
    n = 2 + int(max(classes.max(), text.classes.max()))     # class -1, BOS, is counted at 0
    n_of_class = torch.bincount(text.classes[:, 1:].flatten() + 1, minlength=n)
    has_X = (text.tokens == X).any(1)
    followed = followed_everywhere(text.tokens[has_X], text.classes[has_X], X)
    n_followed = torch.bincount(text.classes[has_X, 1:][followed] + 1, minlength=n)
    return (n_followed / n_of_class.clamp_min(1))[classes + 1]


class OnText(NamedTuple):
    """One feature over text, at positions 1 to T-2 (which have a next token)."""
    f: Tensor               # (B,T-2) its activation
    proxy: Tensor           # (B,T-2) whether X followed the current token earlier


@torch.no_grad()
def features_on_text(model, saes, wanted, tokens, classes):     # [(layer, feature, X)] -> [OnText]
    """Activation and proxy of some features at every position, in one pass over the text."""
    layers = sorted({layer for layer, _, _ in wanted})
    activations = None                                                  # (len(wanted),B,T-2)
    for rows in torch.arange(len(tokens), device=tokens.device).split(32):
        for layer, z in model.z_cat_at(tokens[rows], layers).items():
            f = saes[layer].encode(z[:, 1:-1])                          # (32,T-2,d_sae)
            if activations is None:
                activations = f.new_empty(len(wanted), len(tokens), f.shape[1])
            for i, (feature_layer, feature, _) in enumerate(wanted):
                if feature_layer == layer:
                    activations[i, rows] = f[..., feature]
    return [OnText(activations[i], followed_everywhere(tokens, classes, X)[:, :-1])
            for i, (_, _, X) in enumerate(wanted)]


def precision_and_recall(on_text, levels=(0.0, 0.25, 0.5, 0.75)):       # OnText -> list of dicts
    """At levels of activation, as parts of its maximum: precision P(proxy | f > level), recall
    P(f > level | proxy), with their denominators."""
    n_proxy = int(on_text.proxy.sum())
    table = []
    for level in levels:
        above = on_text.f > level * on_text.f.max()
        n_above = int(above.sum())
        n_both = int((above & on_text.proxy).sum())
        table.append({"level": level, "n_over": n_above, "n_proxy": n_proxy, "n_both": n_both,
                      "precision": n_both / n_above if n_above else None,
                      "recall": n_both / n_proxy if n_proxy else None})
    return table


@torch.no_grad()
def downstream(model, saes, wanted, tokens, on_texts, n_rows=64, seed=0):   # -> list of dicts
    """What features do for the tokens that they are named after. wanted: [(layer, feature, X)];
    on_texts: the OnText of each.

    direct_logit: what one adds, where it is active, to the logit of X less the mean over all
    tokens, the final norm's scale frozen. rank_of_X: X's place among all tokens in its direction.
    loss_if_X, loss_if_not_X: by how much the loss changes, in nats, where the feature is active,
    when it is removed at all places of the row at once, SAE error kept and nothing frozen; apart by
    whether X is the next token. In n_rows rows at most where it is active, drawn for each feature;
    intervals over rows. None where it is active in no row.
    """
    rows_of = [rows_where_active(on_text, n_rows, seed) for on_text in on_texts]
    directions = token_directions(model)
    effects = [token_effects(model, layer, saes[layer], feature, directions)
               for layer, feature, _ in wanted]                         # (n_tokens,) each
    removals = [[] for _ in wanted]
    for part in torch.arange(len(tokens)).split(16):
        is_here = [(rows >= part[0]) & (rows <= part[-1]) for rows in rows_of]
        if not any(here.any() for here in is_here):
            continue
        clean = model.run(tokens[part])                     # once, for all features
        for n, (layer, feature, X) in enumerate(wanted):
            rows = rows_of[n][is_here[n]]
            if len(rows):
                removals[n].append(remove_feature(model, saes[layer], layer, feature, clean,
                                                  rows - part[0], on_texts[n].f[rows], rows))
    return [summarise_removals(X, effects[n], removals[n], len(rows_of[n]))
            for n, (_, _, X) in enumerate(wanted)]


def rows_where_active(on_text, n_rows, seed):               # -> (n,) in order
    """Rows in which a feature is active, n_rows of them at most, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    rows = (on_text.f > 0).any(1).nonzero()[:, 0].cpu()
    return rows[torch.randperm(len(rows), generator=generator)[:n_rows]].sort().values


class Removals(NamedTuple):
    """What happens at n places where a feature is active when it is removed from their rows."""
    row: Tensor             # (n,) of the text
    next_token: Tensor      # (n,)
    direct: Tensor          # (n,) f over the norms' scales: times its effect on a logit
    loss_change: Tensor     # (n,) nats


def remove_feature(model, sae, layer, feature, clean, rows, f, row_of_text):  # -> Removals
    """A feature removed where it is active, in some rows of a clean run. f (b,T-2): its activation
    there, at positions 1 to T-2. row_of_text (b,): the rows' numbers in the text."""
    rows, row_of_text = rows.to(f.device), row_of_text.to(f.device)
    tokens = clean.tokens[rows]
    active = F.pad(f > 0, (1, 1))                                       # (b,T)
    row, q = active.nonzero(as_tuple=True)                              # (n,) places
    first = active.int().argmax(1)                                      # (b,)
    positions = span(first, torch.full_like(first, active.shape[1] - 2))
    edit = {layer: ablate(sae, feature, active)}
    without = model.rerun(clean, rows, positions, edit)                   # (b,S,d_model)

    final = clean.final[rows]
    next_token = tokens[row, q + 1]
    before = losses(model, final[row, q], next_token)
    after = losses(model, without[row, q - first[row]], next_token)
    of_layer = model.blocks[layer].after_heads(clean.resid_pre[layer][rows],
                                               clean.z_cat[layer][rows], with_scales=True)
    scale = model.final_scale(final) * of_layer.scales.get("attn_out", 1.0)     # (b,T,1)
    return Removals(row_of_text[row], next_token, f[f > 0] / scale[row, q, 0], after - before)


def losses(model, stream, next_token):                      # (n,d_model), (n,) -> (n,)
    """Cross-entropy at n places, of 128 at once: a row of logits may have 262,144."""
    parts = [F.cross_entropy(model.unembed(x).float(), token, reduction="none")
             for x, token in zip(stream.split(128), next_token.split(128))]
    return torch.cat(parts)


def summarise_removals(X, effects, removals, n_rows):       # -> dict
    """Means with intervals over rows."""
    result = {"rank_of_X": 1 + int((effects > effects[X]).sum()), "n_rows": n_rows}
    columns = [torch.cat(column).cpu().numpy() for column in zip(*removals)] or [np.zeros(0)] * 4
    row, next_token, direct, loss_change = columns
    is_X = next_token == X
    for name, values, where in (("direct_logit", direct * float(effects[X]), is_X | ~is_X),
                                ("loss_if_X", loss_change, is_X),
                                ("loss_if_not_X", loss_change, ~is_X)):
        mean, interval = mean_with_ci(values[where], row[where])
        result |= {name: mean, f"{name}_ci": interval, f"n_{name}": int(where.sum())}
    return result


def show_places(on_text, tokens, tokenizer, n=5, seed=0):   # -> {kind: list of dicts}
    """True positives and false positives with the largest activation, and false negatives drawn at
    random."""
    f, proxy = on_text.f, on_text.proxy
    width = f.shape[1]
    shown = {}
    for kind, wanted in (("active, X followed earlier", (f > 0) & proxy),
                         ("active, X did not follow earlier", (f > 0) & ~proxy)):
        values = torch.where(wanted, f, 0).flatten()
        strongest = values.topk(min(n, int(wanted.sum()))).indices.tolist()
        shown[kind] = [(float(values[i]), *divmod(i, width)) for i in strongest]
    silent = ((f == 0) & proxy).nonzero()
    generator = torch.Generator().manual_seed(seed)
    drawn = silent[torch.randperm(len(silent), generator=generator)[:n]].tolist()
    shown["silent, X followed earlier"] = [(0.0, row, column) for row, column in drawn]
    return {kind: [{"f": value, "text": text_around(tokens[row], column + 1, tokenizer)}
                   for value, row, column in places]
            for kind, places in shown.items()}


# ---- the program ----


@dataclass(frozen=True)
class InductionConfig(StudyConfig):
    feature: str = field("", "the feature to draw, as layer.feature; empty: the first one found")
    n_sequences: int = field(400, "random sequences for each prefix length (the paper: 400)")
    n_examples: int = field(300, "places in real text where a token is replaced, per condition")
    heads: str = field("", "heads whose attention is measured where a token is replaced, such as "
                       "5.1,5.5; empty: the two that prefix lengths pick")
    n_rows: int = field(2048, "rows of real text")


def main():
    config = parse_flags(InductionConfig, __doc__)
    for flag, value in (("--n-sequences", config.n_sequences), ("--n-examples", config.n_examples),
                        ("--n-rows", config.n_rows)):
        if value < 2:
            raise UserError(f"{flag} must be 2 or more, not {value}.")
    layer, feature = parse_feature(config.feature)
    study = begin(config, "induction")
    if layer is not None:
        check_feature(study.saes, layer, feature)
    heads = parse_heads(config.heads, study.model) if config.heads else None
    rows = held_out_rows(study, config.n_rows)
    token_class = fuzzy_classes(study.tokenizer).to(study.device)

    report_heads(study, compute_head_scores(study, rows, token_class))

    if study.n_ctx >= SHORTEST_ROW:
        study_prefixes(study, rows, token_class, heads)
    else:
        print(f"\nprefixes of {max(LENGTHS)} tokens take rows of {SHORTEST_ROW} tokens; this "
              f"model has {study.n_ctx}, so that they are left out")

    print("\nlooking for features ...", flush=True)
    study_features(study, rows, token_class, layer, feature)
    finish(study)


def compute_head_scores(study, rows, token_class):          # -> {text: {score: (layers,H)}}
    """The scores on repeated random tokens and on held-out text."""
    generator = torch.Generator().manual_seed(study.config.seed)
    repeated = random_rows(study.model, study.tokenizer.bos, token_class, 64, generator,
                           repeat=True)
    scores = {}
    for text, tokens in (("repeated random tokens", repeated), ("held-out text", rows[:256])):
        scores[text] = head_scores(study.model, tokens, token_class[tokens])
        del scores[text]["n_queries"]
    return scores


def study_prefixes(study, rows, token_class, heads):
    """The heads by prefix length, and the intervention on those named, or on the two that are
    picked."""
    config = study.config
    progress = Progress(config.n_sequences, "sequences")
    curves = prefix_curves(study.model, study.tokenizer.bos, token_class, config.n_sequences,
                           config.seed, progress)
    picked = pick_heads(curves.attention)
    report_prefixes(study, curves, *picked)
    heads = heads or picked
    report_interventions(study, compute_interventions(study, rows, token_class, heads), heads)


def compute_interventions(study, rows, token_class, heads):     # -> {choice of examples: {...}}
    """The intervention on examples chosen by text alone, and where each head attends."""
    config, model = study.config, study.model
    classes = token_class[rows]
    by_text = find_examples(classes)
    results = {"by text alone": intervene(model, rows, token_class, by_text, heads,
                                          config.n_examples, config.seed)}
    for (layer, h), examples in find_attended(model, rows, classes, heads).items():
        results[f"where {layer}.{h} attends"] = intervene(
            model, rows, token_class, examples, [(layer, h)], config.n_examples, config.seed)
    return results


def study_features(study, rows, token_class, layer, feature, n_shown=20):
    """Every "X is next" feature; what the first of them do; one of them in full."""
    config, model, saes = study.config, study.model, study.saes
    classes = token_class[rows]
    half = len(rows) // 2
    progress = Progress(2 * len(rows) - half, "rows")       # the second half is read twice
    found, n_live, names = find_features(model, saes, rows, classes, progress)
    rows, classes = rows[half:], classes[half:]             # the half that did not name them
    for one in found:
        one["X_text"] = study.tokenizer.decode([one["X"]])
    shown = found[:n_shown]
    wanted = [(one["layer"], one["feature"], one["X"]) for one in shown]
    named = layer is None or int(names[layer][feature]) >= 0
    if layer is not None and named:
        asked_for = (layer, feature, int(names[layer][feature]))
        wanted = [asked_for, *(one for one in wanted if one != asked_for)]
    on_texts = dict(zip(wanted, features_on_text(model, saes, wanted, rows, classes)))
    effects = dict(zip(wanted, downstream(model, saes, wanted, rows, list(on_texts.values()),
                                          seed=config.seed)))
    for one in shown:
        one["downstream"] = effects[one["layer"], one["feature"], one["X"]]
    result = {"n_live": n_live, "features": found,
              "n_found": {layer: sum(one["layer"] == layer for one in found) for layer in saes}}
    report_features(result, shown)
    write_json(study.folder / "features.json", result)

    if not named:
        raise UserError(f"feature {layer}.{feature} cannot be named: it is not active in the first "
                        f"half of these rows, or at its strongest places there the token had not "
                        f"come before. Raise --n-rows, or name another with --feature.")
    if not wanted:
        print("none, so none is drawn; --feature draws one all the same")
        return
    layer, feature, X = wanted[0]
    on_text = on_texts[wanted[0]]
    drawn = {"layer": layer, "feature": feature, "X": X, "X_text": study.tokenizer.decode([X]),
             "found": any((one["layer"], one["feature"]) == (layer, feature) for one in found),
             "precision_and_recall": precision_and_recall(on_text),
             "places": show_places(on_text, rows, study.tokenizer, seed=config.seed),
             "downstream": effects[wanted[0]]}
    report_feature(drawn)
    write_json(study.folder / "features.json", result | {"drawn": drawn})
    active = on_text.f > 0
    plot_feature(on_text.f[active].cpu().numpy(), on_text.proxy[active].cpu().numpy(),
                 f"{layer}.{feature}, named after {drawn['X_text']!r}",
                 study.folder / "feature.png")


# ---- the report ----


def report_heads(study, scores):
    """The strongest heads by each score."""
    plain = {}
    for text, by_name in scores.items():
        print(f"\nmean attention on {text}, strongest heads")
        plain[text] = {}
        for name, values in by_name.items():
            n_heads = values.shape[1]
            strongest = [divmod(i, n_heads)
                         for i in values.flatten().argsort(descending=True)[:5].tolist()]
            shown = [f"{layer}.{h} {float(values[layer, h]):.2f}" for layer, h in strongest]
            print(f"{name:>10}  " + "  ".join(shown))
            plain[text][name] = values.tolist()
    write_json(study.folder / "heads.json", plain)
    plot_heads(plain, study.folder / "heads.png")


def report_prefixes(study, curves, first, grows):
    """Attention by prefix length, for the two heads picked and the strongest others."""
    longest = max(LENGTHS)
    statistics = {}
    for name, values in zip(PrefixCurves._fields, curves):
        statistics[name], statistics[f"{name}_ci"] = mean_with_ci(values)
    rise, rise_ci = mean_with_ci(curves.attention[:, longest] - curves.attention[:, 1])
    result = {"n_sequences": study.config.n_sequences, "prefix_lengths": list(LENGTHS),
              "most_after_one": f"{first[0]}.{first[1]}", "grows_most": f"{grows[0]}.{grows[1]}",
              **statistics, "rise": rise, "rise_ci": rise_ci}
    write_json(study.folder / "prefix.json", result)
    plot_prefixes(result, study.folder / "prefix.png")

    mean = curves.attention.mean(0)                                     # (lengths,layers,H)
    strongest = mean[longest].argsort(axis=None)[::-1][:6]
    others = [divmod(int(i), mean.shape[2]) for i in strongest]
    print(f"\nattention to the token after the prefix, by prefix length; "
          f"{study.config.n_sequences} random sequences, the same for all lengths")
    print("head " + "".join(f"{length:6d}" for length in LENGTHS) + "   rise from 1 to 9")
    picked = {first: "  most after one", grows: "  grows most"}
    for layer, h in dict.fromkeys([first, grows, *others]):
        low, high = rise_ci
        print(f"{layer}.{h:<3}" + "".join(f"{a:6.2f}" for a in mean[:, layer, h])
              + "   " + format_ci(rise[layer][h], [low[layer][h], high[layer][h]], "+.2f")
              + picked.get((layer, h), ""))
    reported(study, "5.1 below 0.3 for short prefixes, over 0.7 for long ones; 5.5 already 0.7 for "
             "short")


def report_interventions(study, results, heads):
    """Attention before and after, for every choice of examples and condition."""
    names = [f"{layer}.{h}" for layer, h in heads]
    print(f"\nattention before and after one token is replaced; [95% interval]\n{'examples':22}"
          f"{'replaced':22}{'n':>5}  head  before  after   change")
    for choice, conditions in results.items():
        measured = [name for name in names if choice in ("by text alone", f"where {name} attends")]
        for condition, result in conditions.items():
            for name in measured:
                if name not in result:
                    print(f"{choice:22}{condition:22}{0:5}  {name}   n/a: no such place in this "
                          f"text")
                    continue
                r = result[name]
                change = format_ci(r["change"], r["change_ci"], "+.3f")
                print(f"{choice:22}{condition:22}{result['n']:5}  {name}  {r['before']:6.2f} "
                      f"{r['after']:6.2f}   {change}")
    write_json(study.folder / "intervention.json", {"heads": names, "conditions": results})
    plot_intervention(results, names, study.folder / "intervention.png")
    reported(study, "long prefixes corrupted: 5.1 falls from 0.55 to 0.05, 5.5 stays at 0.43")


def report_features(result, shown):
    """How many "X is next" features each layer has, and what the first of them do."""
    print("\"X is next\" features: " + ", ".join(
        f"layer {layer} {n} of {result['n_live'][layer]} live"
        for layer, n in result["n_found"].items()))
    print("share: of its activation, where X followed its token earlier; loss: change without it\n"
          "feature   X             active    share   by token alone   rank of X   "
          "loss, X next / not")
    for one in shown:
        losses = [one["downstream"][name] for name in ("loss_if_X", "loss_if_not_X")]
        loss = " / ".join("n/a" if change is None else f"{change:+.3f}" for change in losses)
        print(f"{one['layer']}.{one['feature']:<7} {one['X_text']!r:12} {one['n_active']:7} "
              f"{one['share']:8.1%} {one['expected_share']:12.1%} "
              f"{one['downstream']['rank_of_X']:14}   {loss}")


def report_feature(drawn):
    """Precision, recall, what the feature does for X, and places in the text."""
    rule = "one of those found" if drawn["found"] else \
        "not one of those found: it does not meet the rule"
    print(f"\nfeature {drawn['layer']}.{drawn['feature']}, named after {drawn['X_text']!r}, {rule}")
    print("activation over   precision            recall")
    for r in drawn["precision_and_recall"]:
        precision = share_text(r["precision"], r["n_over"])
        recall = share_text(r["recall"], r["n_proxy"])
        print(f"{r['level']:8.0%} of max   {precision:18}   {recall}")
    for name, meaning in (("direct_logit", "adds to X's logit, directly"),
                          ("loss_if_X", "loss change without it, X next"),
                          ("loss_if_not_X", "X not next")):
        r = drawn["downstream"]
        print(f"{meaning:30} {format_ci(r[name], r[name + '_ci'], '+.3f')}, n = {r['n_' + name]}")
    for kind, places in drawn["places"].items():
        print(kind + ":")
        for place in places:
            print(f"  {place['f']:6.2f}  {place['text']}")


def share_text(share, n):
    """"82.1% of 341", or "n/a"."""
    return "n/a" if share is None else f"{share:.1%} of {n}"


if __name__ == "__main__":
    run(main)
