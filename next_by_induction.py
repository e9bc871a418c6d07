"""'"board" is next by induction': SAE features that say which token comes next, because it followed
the current one before (the paper, Fig. 2).

    ... sk board ...... sk      the feature "board is next" is active at the second " sk"

Such a feature is named after a token X. Its *proxy*, found by text alone: X followed an earlier
copy of the current token. (The family "after a copy" of features.py is found by DFA, and may read
whatever followed.)

How they are found. On one half of the text, take the places where a feature is most active. Each
gives its activation to the tokens that followed earlier copies of the token there; the one that is
given most is X. The feature counts if, on the other half, it is active often enough, at least
MIN_SHARE of its activation is where the proxy holds, and that is MIN_EXCESS more than the token at
the place alone would give (at the rates of the first half).

In reading order: the proxy; which features are found; what one does for X; places in the text; the
report. induction.py is the program.

*Entries* (data/strongest.py) are the active features of a text: row, q, feature and activation f of
each. Two tokens match if they are equal but for one leading space and the case of letters
(data.tokens.fuzzy_classes); BOS matches nothing.

Shapes: B batch, T positions (q query, k key), d_sae; n entries, m features.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import UserError
from data.figures import plot_feature
from data.files import write_json
from data.progress import Progress
from data.stats import format_ci, mean_with_ci
from data.strongest import StrongestPerGroup, feature_token_mass, rank_in_group
from data.tokens import is_copy, text_around
from direct import token_directions, token_effects
from model import span
from sae import ablate
from sparse import active_entries

MIN_SHARE, MIN_EXCESS = 0.5, 0.25
MIN_ACTIVE = 100                # positions, at least, at which such a feature is active
N_NAMING = 32                   # strongest activations that name it

# ---- the proxy ----


def followed_by(tokens, classes, row, q, X):                # (B,T) x 2, (n,) x 3 -> (n,) bool
    """The proxy of Fig. 2: whether the token at q, or its variant in space or case, stood earlier
    in its row with token X after it."""
    was_X = tokens[row, 1:] == X[:, None]                               # (n,T-1)
    return (earlier_copies(classes, row, q) & was_X).any(-1)


def earlier_copies(classes, row, q):                        # (B,T), (n,), (n,) -> (n,T-1) bool
    """Where in its row copies of the token at q stand before it."""
    k = torch.arange(classes.shape[1] - 1, device=classes.device)       # the last has none after it
    row = row[:, None]
    q = q[:, None]
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


# ---- which features are found ----


class Text(NamedTuple):
    """Rows of text, and the class of each token."""
    tokens: Tensor          # (B,T)
    classes: Tensor         # (B,T)


@torch.no_grad()
def find_features(model, saes, naming, measuring, progress=lambda rows: None):      # Text x 2
    """Every "X is next" feature -> list of dicts, first those whose share is most above the
    expected one; {layer: number of features active in the text that measures}; {layer: (d_sae,)
    each one's X}."""
    n_naming = len(naming.tokens)
    n_rows = n_naming + len(measuring.tokens)
    names = name_features(model, saes, naming, progress)
    sums = sum_where_followed(model, saes, measuring, names,
                              lambda rows: progress(n_naming + rows))
    candidates = {}
    for layer, s in sums.items():
        is_candidate = (s.n >= MIN_ACTIVE) & (s.share >= MIN_SHARE)
        candidates[layer] = is_candidate.nonzero()[:, 0].to(measuring.tokens.device)
    X = {layer: names[layer][features] for layer, features in candidates.items()}
    expected = expected_shares(model, saes, candidates, X, measuring, naming,
                               lambda rows: progress(n_rows + rows))
    found = []
    for layer, s in sums.items():
        for i, x, by_token_alone in zip(candidates[layer].tolist(), X[layer].tolist(),
                                        expected[layer].tolist()):
            share = float(s.share[i])
            if share >= by_token_alone + MIN_EXCESS:
                found.append({"layer": layer, "feature": i, "X": x, "share": share,
                              "expected_share": by_token_alone, "n_active": int(s.n[i]),
                              "n_hit": int(s.n_hit[i])})
    found.sort(key=lambda feature: feature["expected_share"] - feature["share"])
    n_live = {layer: int((s.n > 0).sum()) for layer, s in sums.items()}
    return found, n_live, names


def name_features(model, saes, text, progress):             # -> {layer: (d_sae,)}
    """Every feature's X, from its strongest activations; -1 where there is none."""
    strongest = {layer: StrongestPerGroup(N_NAMING, sae.d_sae) for layer, sae in saes.items()}
    for layer, entries in active_entries(model, saes, text.tokens, progress):
        strongest[layer].add(entries, entries.feature, entries.f)
    tokens, classes = text.tokens.cpu(), text.classes.cpu()
    names = {}
    for layer, sae in saes.items():
        entries, _, _ = strongest[layer].best()
        names[layer] = name_next(tokens, classes, entries, sae.d_sae).to(text.tokens.device)
    return names


def name_next(tokens, classes, entries, d_sae):             # (B,T) x 2 -> (d_sae,)
    """Each feature's X; -1 where no token of its entries came before.

    Each entry gives its activation to every token that followed an earlier copy of its own token,
    once to each, however often it followed; special tokens, of class -1, are left out. X is the
    token that is given most.
    """
    # of each token that followed: the entry that gives to it, and where it stands
    givers = []
    positions = []
    for part in torch.arange(len(entries.q)).split(2**16):
        copies = earlier_copies(classes, entries.row[part], entries.q[part])
        i, earlier = copies.nonzero(as_tuple=True)
        givers.append(part[i])
        positions.append(earlier + 1)
    giver = torch.cat(givers)
    position = torch.cat(positions)
    is_text = classes[entries.row[giver], position] >= 0    # and no special token
    giver = giver[is_text]
    position = position[is_text]
    followed = tokens[entries.row[giver], position]

    # each pair (entry, token) once; as one number, since `unique` is slow on rows
    n_tokens = int(tokens.max()) + 1
    gift = (giver * n_tokens + followed).unique()
    giver = gift // n_tokens
    X = gift % n_tokens
    # pairs (feature, token), feature by feature, the token that is given most first
    pair, _ = feature_token_mass(entries.feature[giver], X, entries.f[giver])
    heaviest = pair[rank_in_group(pair[:, 0]) == 0]
    named = torch.full((d_sae,), -1)
    named[heaviest[:, 0]] = heaviest[:, 1]
    return named


class SumsWhereFollowed(NamedTuple):
    """Sums over text, positions 1 to T-1, for each feature and the token X it is named after,
    (d_sae,) each."""
    n: Tensor               # active positions
    mass: Tensor            # sum of activations
    n_hit: Tensor           # active positions where X followed the current token earlier
    mass_hit: Tensor        # sum of activations there

    @property
    def share(self):
        """The part of the activation that is there."""
        return self.mass_hit / self.mass.clamp_min(1e-30)


def sum_where_followed(model, saes, text, names, progress=lambda rows: None):
    """How active each feature is, and how much of that where its X followed earlier -> {layer:
    SumsWhereFollowed}."""
    sums = {layer: torch.zeros(4, sae.d_sae, dtype=torch.float64) for layer, sae in saes.items()}
    for layer, entries in active_entries(model, saes, text.tokens, progress):
        X = names[layer][entries.feature]                   # -1, no name, equals no token
        hits = [followed_by(*text, *part) for part in
                zip(entries.row.split(2**16), entries.q.split(2**16), X.split(2**16))]
        is_hit = torch.cat(hits).cpu().double()             # 0 or 1
        f = entries.f.cpu().double()
        # in the order of SumsWhereFollowed
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
    A class that the other text lacks has a rate of 0, which makes the expected share too low. A
    feature that reads nothing but the current class has this share, up to the difference of the two
    texts.
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
    has_X = (text.tokens == X).any(1)                       # in other rows X followed nothing
    followed = followed_everywhere(text.tokens[has_X], text.classes[has_X], X)
    n_followed = torch.bincount(text.classes[has_X, 1:][followed] + 1, minlength=n)
    return (n_followed / n_of_class.clamp_min(1))[classes + 1]


# ---- what a feature does ----


class OnText(NamedTuple):
    """One feature over text, at positions 1 to T-2 (which have a next token)."""
    f: Tensor               # (B,T-2) its activation
    proxy: Tensor           # (B,T-2) whether X followed the current token earlier


@torch.no_grad()
def features_on_text(model, saes, wanted, text):            # [(layer, feature, X)] -> [OnText]
    """Activation and proxy of some features at every position, in one pass over the text."""
    layers = sorted({layer for layer, _, _ in wanted})
    activations = None                                                  # (len(wanted),B,T-2)
    for rows in torch.arange(len(text.tokens), device=text.tokens.device).split(32):
        for layer, z in model.z_cat_at(text.tokens[rows], layers).items():
            f = saes[layer].encode(z[:, 1:-1])                          # (32,T-2,d_sae)
            if activations is None:
                activations = f.new_empty(len(wanted), len(text.tokens), f.shape[1])
            for i, (feature_layer, feature, _) in enumerate(wanted):
                if feature_layer == layer:
                    activations[i, rows] = f[..., feature]
    return [OnText(activations[i], followed_everywhere(*text, X)[:, :-1])
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
    direct: Tensor          # (n,) f over the norms' scales; `token_effects` times this is what it
                            # adds to a logit
    loss_change: Tensor     # (n,) nats


def remove_feature(model, sae, layer, feature, clean, rows, f, row_of_text):  # -> Removals
    """A feature removed where it is active, in some rows of a clean run. f (b,T-2): its activation
    there, at positions 1 to T-2. row_of_text (b,): the rows' numbers in the text."""
    rows = rows.to(f.device)
    row_of_text = row_of_text.to(f.device)
    tokens = clean.tokens[rows]
    active = F.pad(f > 0, (1, 1))                                       # (b,T)
    row, q = active.nonzero(as_tuple=True)                              # (n,) places
    first = active.int().argmax(1)                                      # (b,)
    positions = span(first, torch.full_like(first, active.shape[1] - 2))
    edit = {layer: ablate(sae, feature, active)}
    without = model.rerun(clean, rows, positions, edit)                 # (b,S,d_model)

    final = clean.final[rows]
    next_token = tokens[row, q + 1]
    before = losses(model, final[row, q], next_token)
    after = losses(model, without[row, q - first[row]], next_token)
    # the scales once more, which a Run does not keep
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
    everywhere = np.ones_like(is_X)
    for name, values, where in (("direct_logit", direct * float(effects[X]), everywhere),
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


# ---- the study ----


def study_features(study, rows, token_class, layer, feature, n_shown=20):
    """Every "X is next" feature; what the first of them do; one of them in full, the first or that
    which is asked for.

    Raises UserError if that one has no X, after all the rest has been written.
    """
    half = len(rows) // 2
    naming = Text(rows[:half], token_class[rows[:half]])
    measuring = Text(rows[half:], token_class[rows[half:]])
    progress = Progress(half + 2 * (len(rows) - half), "rows")      # the second half is read twice
    found, n_live, names = find_features(study.model, study.saes, naming, measuring, progress)
    for entry in found:
        entry["X_text"] = study.tokenizer.decode([entry["X"]])
    shown = found[:n_shown]
    wanted = [(entry["layer"], entry["feature"], entry["X"]) for entry in shown]
    has_name = layer is None or int(names[layer][feature]) >= 0
    if layer is not None and has_name:
        asked_for = (layer, feature, int(names[layer][feature]))
        wanted = [asked_for, *(other for other in wanted if other != asked_for)]
    on_texts = features_on_text(study.model, study.saes, wanted, measuring)
    effects = downstream(study.model, study.saes, wanted, measuring.tokens, on_texts,
                         seed=study.config.seed)
    effects_of = dict(zip(wanted, effects))
    for entry in shown:
        entry["downstream"] = effects_of[entry["layer"], entry["feature"], entry["X"]]
    n_found = {layer: sum(entry["layer"] == layer for entry in found) for layer in study.saes}
    result = {"n_live": n_live, "features": found, "n_found": n_found}
    report_features(result, shown)
    write_json(study.folder / "features.json", result)

    if not has_name:
        raise UserError(f"feature {layer}.{feature} cannot be named: it is not active in the first "
                        f"half of these rows, or at its strongest places there the token had not "
                        f"come before. Raise --n-rows, or name another with --feature.")
    if not wanted:
        print("none, so none is drawn; --feature draws one all the same")
        return
    drawn = draw_feature(study, wanted[0], found, measuring, on_texts[0], effects[0])
    report_feature(study, drawn, on_texts[0])
    write_json(study.folder / "features.json", result | {"drawn": drawn})


def draw_feature(study, wanted, found, text, on_text, effects):     # -> dict
    """One feature in full."""
    layer, feature, X = wanted
    is_found = any((entry["layer"], entry["feature"]) == (layer, feature) for entry in found)
    return {"layer": layer, "feature": feature, "X": X, "X_text": study.tokenizer.decode([X]),
            "found": is_found, "precision_and_recall": precision_and_recall(on_text),
            "places": show_places(on_text, text.tokens, study.tokenizer, seed=study.config.seed),
            "downstream": effects}


# ---- the report ----


def report_features(result, shown):
    """How many "X is next" features each layer has, and what the first of them do."""
    print("\"X is next\" features: " + ", ".join(
        f"layer {layer} {n} of {result['n_live'][layer]} live"
        for layer, n in result["n_found"].items()))
    print("share: of its activation, where X followed its token earlier; loss: change without it\n"
          "feature   X             active    share   by token alone   rank of X   "
          "loss, X next / not")
    for entry in shown:
        losses = [entry["downstream"][name] for name in ("loss_if_X", "loss_if_not_X")]
        loss = " / ".join("n/a" if change is None else f"{change:+.3f}" for change in losses)
        name = f"{entry['layer']}.{entry['feature']}"
        print(f"{name:9} {entry['X_text']!r:12} {entry['n_active']:7} "
              f"{entry['share']:8.1%} {entry['expected_share']:12.1%} "
              f"{entry['downstream']['rank_of_X']:14}   {loss}")


def report_feature(study, drawn, on_text):
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
    active = on_text.f > 0
    plot_feature(on_text.f[active].cpu().numpy(), on_text.proxy[active].cpu().numpy(),
                 f"{drawn['layer']}.{drawn['feature']}, named after {drawn['X_text']!r}",
                 study.folder / "feature.png")


def share_text(share, n):
    """"82.1% of 341", or "n/a"."""
    return "n/a" if share is None else f"{share:.1%} of {n}"
