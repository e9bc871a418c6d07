"""Do the attributions agree, with each other and with the model?

    python tests/measured/agreement.py          the shipped model, over held-out text

Three tables, also written to <out>/<model>/agreement/agreement.json: weight-based head attribution
against DFA by head; recursive DFA of features and logits against what happens when a feature is
removed from the model; and what the model loses when SAEs and transcoders do its work.

Shapes: R rows, T positions, H heads, D = H*d_head, d_sae.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train  # noqa: E402
from attribution import (FEATURE, KINDS, MLP_FEATURE, Place, ablation_effects,  # noqa: E402
                         read_anew, totals, trace_prompt, upstream_features)
from data.errors import UserError, run  # noqa: E402
from data.files import write_json  # noqa: E402
from data.flags import field, parse_flags  # noqa: E402
from data.stats import bootstrap, format_ci, mean_with_ci, spearman  # noqa: E402
from direct import head_weights  # noqa: E402
from sae import splice, splice_mlp  # noqa: E402
from study import StudyConfig, begin, finish, held_out_rows  # noqa: E402


@dataclass(frozen=True)
class AgreementConfig(StudyConfig):
    n_rows: int = field(256, "held-out rows")
    n_roots: int = field(100, "features, and logits, below which features are removed")


# ---- weight-based head attribution against DFA by head ----


@torch.no_grad()
def head_agreement(model, saes, rows):                      # (R,T) -> {layer: dict}
    """Weight-based head attribution against DFA by head, over the features that fire in `rows`.

    DFA by head of a feature is summed over the positions where it fires. rank: mean over features
    of Spearman's correlation over heads; top1: how often both name the same head; with intervals
    over features; None where there is nothing to compare.
    """
    H = model.config.n_heads
    weights = {layer: head_weights(sae.W_dec, H) for layer, sae in saes.items()}    # (d_sae,H)
    by_head = {layer: torch.zeros_like(weights[layer]) for layer in saes}
    n_fired = {layer: torch.zeros_like(weights[layer][:, 0]) for layer in saes}
    for tokens in rows.split(16):
        for layer, z in model.z_cat_at(tokens, list(saes)).items():
            z = z[:, 1:].flatten(0, 1)                                  # (n,D)
            active = (saes[layer].encode(z) != 0).to(z.dtype)           # (n,d_sae)
            n_fired[layer] += active.sum(0)
            by_head[layer] += dfa_where_active(model, layer, saes[layer], z, active)
    return {layer: compare_heads(weights[layer], by_head[layer], n_fired[layer] > 0)
            for layer in saes}


def dfa_where_active(model, layer, sae, z, active):         # (n,D), (n,d_sae) -> (d_sae,H)
    """DFA by head, summed over the places where each feature is active: z_h . w^h less the
    constant, which is DFA of direct.values_minus_bias summed over sources."""
    n_heads = model.config.n_heads
    W_enc = sae.W_enc.unflatten(0, (n_heads, -1))           # (H,d_head,d_sae)
    z = (z - model.value_bias(layer)).unflatten(-1, (n_heads, -1))      # (n,H,d_head)
    return torch.stack([(active * (z[:, h] @ W_enc[h])).sum(0) for h in range(n_heads)], -1)


def compare_heads(weights, by_head, live):                  # (d_sae,H), (d_sae,H), (d_sae,) -> dict
    """Both rankings of heads, over the features that are live; as `head_agreement` says."""
    rank = spearman(weights[live], by_head[live]).numpy()
    same_top = (weights[live].argmax(-1) == by_head[live].argmax(-1)).cpu().double().numpy()
    result = {"n_fired": int(live.sum()), "n_silent": int((~live).sum())}
    for name, values in (("rank", rank[np.isfinite(rank)]), ("top1", same_top)):
        result |= {name: None, f"{name}_ci": None}
        if len(values):
            result[name] = float(values.mean())
            result[f"{name}_ci"] = bootstrap(lambda drawn: float(values[drawn].mean()), len(values))
    return result


# ---- recursive DFA against removal ----
#
# Below a root, a feature or a logit at the end of a text cut at random, features are removed one at
# a time, each where it fired, and the model is run anew with nothing frozen. How far the root falls
# is compared with what was attributed to the feature removed.

N_STRONG = 10           # features removed below each root: those of largest one-step attribution,
N_OTHERS = 10           # and some drawn from the rest


def feature_root(traced, next_token, rng):                  # -> Place or None
    """A feature that is active at the last token, drawn at random, of the last layer that has an
    SAE."""
    layer = max(traced.saes)
    active = traced.f[layer][-1].nonzero()[:, 0]
    if not len(active):
        return None
    feature = int(active[rng.integers(len(active))])
    return Place("feature", layer, len(traced.tokens) - 1, feature)


def logit_root(traced, next_token, rng):                    # -> Place
    """The logit of the token that comes next in the text, less the mean over all tokens."""
    return Place("logit", traced.model.config.n_layers, len(traced.tokens) - 1, next_token)


ROOTS = {"feature": feature_root, "logit": logit_root}
REMOVED = {"feature": "attention feature", "MLP feature": "MLP feature"}    # kinds, in words
# runs in which more is held, and whether active features are (`falls_with_leaves_held`)
HELD = {"leaves held": False, "leaves and active features held": True}
LABELS = {"leaves held": "  leaves held",               # below the line "all paths"
          "leaves and active features held": "  and active features"}


@torch.no_grad()
# -> {kind removed: {way: dict}}
def ablation_agreement(model, saes, transcoders, rows, choose_root, n_roots, seed=0):
    """How well attribution predicts removal, for attention features and, where there are
    transcoders, MLP features, N_STRONG + N_OTHERS of each below every root.

    What is attributed to them: in one step; over all paths through attention features; and over
    all paths, MLP features too. The last is also compared with removal in a model of which more is
    held (`falls_with_leaves_held`). rank: mean over roots of Spearman's correlation of attribution
    with the root's fall. sign: how often their signs agree among the strong ones. slope: fall per
    unit attributed (least squares through 0, over all). Intervals over roots.
    """
    rng = np.random.default_rng(seed)
    measured = {}                                   # {kind: {way: [(rank, sign, product, square)]}}
    n_measured = 0
    for tokens in rows:
        if n_measured == n_roots:
            break
        n_seen = int(rng.integers(min(8, len(tokens) - 2), len(tokens) - 1)) + 1
        traced = trace_prompt(model, saes, tokens[:n_seen], transcoders)
        root = choose_root(traced, int(tokens[n_seen]), rng)
        chosen = root and choose_removed(traced, root, rng)
        if not chosen:
            continue
        n_measured += 1
        everywhere = totals(traced, root).contribution
        for kind, (removed, in_one_step) in chosen.items():
            ways = measured.setdefault(kind, {})
            pairs = attributed_and_fall(traced, root, kind, removed, in_one_step,
                                        everywhere[removed])
            for way, pair in pairs.items():
                ways.setdefault(way, []).append(compare(*pair))
    if n_measured < n_roots:
        raise UserError(f"these rows have only {n_measured} places with {N_STRONG + N_OTHERS} "
                        f"earlier features of each kind to remove, and {n_roots} are needed; give "
                        f"more text, raise --n-rows, or lower --n-roots.")
    return {kind: {way: summary_over_roots(np.array(columns)) for way, columns in ways.items()}
            for kind, ways in measured.items()}


def choose_removed(traced, root, rng):                      # -> {kind: ((n,), (n,))} or None
    """Which features are removed, of attention and, where a transcoder stands before the root, of
    MLPs: rows of traced.components, and what one step attributes to them, strong ones first. None
    where a kind has too few."""
    upstream, in_one_step = upstream_features(traced, root)
    has_mlp = any(layer < root.layer for layer in traced.transcoders)
    chosen = {}
    for kind in REMOVED if has_mlp else ["feature"]:
        is_kind = traced.components.kind[upstream] == KINDS.index(kind)
        rows, values = upstream[is_kind], in_one_step[is_kind]
        if len(rows) < N_STRONG + N_OTHERS:
            return None
        others = N_STRONG + rng.choice(len(rows) - N_STRONG, N_OTHERS, replace=False)
        index = torch.from_numpy(np.concatenate([np.arange(N_STRONG), others])).to(rows.device)
        chosen[kind] = rows[index], values[index]
    return chosen


def attributed_and_fall(traced, root, kind, removed, in_one_step, over_all_paths):
    """For every way to attribute or to remove: what is attributed to the features removed, and how
    far the root falls without them -> {way: ((n,), (n,))}."""
    fall = ablation_effects(traced, removed, root)
    pairs = {"one step": (in_one_step, fall)}
    if kind == "feature" and traced.transcoders:
        pairs["all paths through attention"] = (without_mlps(traced, root, removed), fall)
    pairs["all paths"] = (over_all_paths, fall)
    for way, hold_active in HELD.items():
        held = falls_with_leaves_held(traced, removed, root, hold_active)
        pairs[way] = (over_all_paths, held)
    return pairs


def without_mlps(traced, root, removed):                    # (n,) -> (n,)
    """What is attributed to attention features over all paths, when MLPs are not taken apart."""
    alone = trace_prompt(traced.model, traced.saes, traced.tokens)
    return totals(alone, root).contribution[same_features(traced, alone, removed)]


def same_features(traced, alone, rows):                     # (n,) -> (n,)
    """Rows of another trace's components that are the same attention features: both traces of a
    prompt have them in the same order."""
    rank = (traced.components.kind == FEATURE).cumsum(0) - 1
    return (alone.components.kind == FEATURE).nonzero()[:, 0][rank[rows]]


def falls_with_leaves_held(traced, removed, root, hold_active):     # (n,) -> (n,)
    """How far the root falls where only features pass an effect on: errors, and outputs without SAE
    or transcoder, stay as they were.

    hold_active: features that were active stay linear in what they read, below 0 too, and the
    others stay at 0. Then all that differs from attribution are attention patterns and norm scales.
    """
    gone = traced.components.pick(removed)
    edit_z = {}
    edit_mlp = {}
    for layer in range(root.layer):
        kept = traced.cache[layer]
        write = held_output(traced.saes.get(layer), traced.f.get(layer), kept.z_cat[0],
                            gone, (FEATURE, layer), hold_active)
        write_mlp = held_output(traced.transcoders.get(layer), traced.f_mlp.get(layer),
                                kept.mlp_out[0], gone, (MLP_FEATURE, layer), hold_active)
        edit_z[layer] = write
        edit_mlp[layer] = lambda mlp_in, mlp_out, write=write_mlp: write(mlp_in)
    clean = read_anew(traced, root, traced.tokens[None], {}, {})
    return clean - read_anew(traced, root, traced.tokens.expand(len(removed), -1), edit_z, edit_mlp)


def held_output(sae, f, written, gone, writer, hold_active):
    """What a layer writes from what it reads, in a run in which row i of the batch has lost
    component i of `gone`.

    f, written: (T,d_sae) and (T,d_out) of the clean run. writer: the kind and layer of its
    features.
    """
    if sae is None:
        return lambda read: written.expand(len(read), -1, -1)
    error = written - sae.decode(f)
    row = ((gone.kind == writer[0]) & (gone.layer == writer[1])).nonzero()[:, 0]
    removed = (row, gone.position[row], gone.feature[row])

    def write(read):                                        # (n,T,d_in) -> (n,T,d_out)
        anew = sae.pre_activations(read) * (f != 0) if hold_active else sae.encode(read)
        anew[:, 0] = 0                                      # BOS
        anew[removed] = 0
        return sae.decode(anew) + error
    return write


def compare(attributed, fall):                              # (n,), (n,) -> 4 numbers
    """Below one root: rank correlation, share of equal signs among the strong ones, and the two
    sums of a least-squares slope, attributed . fall and attributed . attributed."""
    same_sign = (attributed.sign() == fall.sign())[:N_STRONG]
    return (float(spearman(attributed, fall)), float(same_sign.double().mean()),
            float((attributed * fall).sum()), float(attributed.square().sum()))


def summary_over_roots(columns):                            # (n_roots,4) -> dict
    """Means with intervals, of rank, sign, and the two sums behind the slope."""
    rank, sign, product, square = columns.T
    statistics = {"rank": lambda drawn: np.nanmean(rank[drawn]),
                  "sign": lambda drawn: sign[drawn].mean(),
                  "slope": lambda drawn: product[drawn].sum() / square[drawn].sum()}
    result = {}
    for name, statistic in statistics.items():
        result[name] = float(statistic(np.arange(len(columns))))
        result[f"{name}_ci"] = bootstrap(statistic, len(columns))
    return result


# ---- the model with SAEs and transcoders in place ----


@torch.no_grad()
def replacement(model, saes, transcoders, rows):            # (R,T) -> {name: (mean, interval)}
    """Cross-entropy, at the positions of train.evaluate, with every z_cat that has an SAE, every
    MLP's output that has a transcoder, or both, as these make them; and with both set to 0.
    Position 0 keeps its own. Intervals over rows."""
    spliced_z = {layer: splice(sae) for layer, sae in saes.items()}
    spliced_mlp = {layer: splice_mlp(one) for layer, one in transcoders.items()}

    def zero(z):
        return torch.cat([z[:, :1], torch.zeros_like(z[:, 1:])], 1)

    zero_z = {layer: zero for layer in saes}
    zero_mlp = {layer: lambda mlp_in, mlp_out: zero(mlp_out) for layer in transcoders}
    edits = {"clean": ({}, {}), "SAEs": (spliced_z, {}), "transcoders": ({}, spliced_mlp),
             "both": (spliced_z, spliced_mlp), "both 0": (zero_z, zero_mlp)}
    at = train.ce_positions(*rows.shape, train.ce_stride(model)).to(rows.device)    # (R,m)
    found = {}
    for name, (edit_z, edit_mlp) in edits.items():
        losses = []
        for tokens, q in zip(rows.split(8), at.split(8)):
            x, _ = model.run_layers(model.embed(tokens), edit_z, edit_mlp=edit_mlp)
            logits = model.unembed(train.at_positions(x, q))
            losses.append(train.row_ce(logits, tokens, q).cpu())
        found[name] = mean_with_ci(torch.cat(losses).double().numpy())
    return found


def layers_replaced(study):
    """The layers that have SAEs and transcoders, in words; "" if all have both."""
    n = study.model.config.n_layers
    if len(study.saes) == len(study.transcoders) == n:
        return ""
    return (f" (SAEs of {len(study.saes)} of {n} layers, transcoders of "
            f"{', '.join(map(str, study.transcoders))})")


# ---- the report ----


def report_heads(found, n_rows):
    print(f"weight-based head attribution against DFA by head, over features that fire in "
          f"{n_rows} rows; [95% interval]\nlayer  fired  silent    Spearman over heads       "
          f"same top head")
    for layer, r in found.items():
        rank = format_ci(r["rank"], r["rank_ci"], ".3f")
        top1 = format_ci(r["top1"], r["top1_ci"], ".1%")
        print(f"{layer:5d} {r['n_fired']:6d} {r['n_silent']:7d}   {rank:>21}  {top1:>22}")


def report_removal(found, layer, n_roots):
    print(f"\nrecursive DFA against removal, nothing frozen: {n_roots} features of layer {layer}, "
          f"and {n_roots} logits of the next token;\nof each kind {N_STRONG + N_OTHERS} features "
          f"below it removed one at a time, the {N_STRONG} strongest in one step and {N_OTHERS} "
          f"others\n"
          f"root     removed            attribution                  Spearman                "
          f"same sign, strongest   fall per unit attributed")
    for root, kinds in found.items():
        for kind, ways in kinds.items():
            for way, r in ways.items():
                print(f"{root:8} {REMOVED[kind]:18} {LABELS.get(way, way):28} "
                      f"{format_ci(r['rank'], r['rank_ci'], '.3f'):23} "
                      f"{format_ci(r['sign'], r['sign_ci'], '.1%'):22} "
                      f"{format_ci(r['slope'], r['slope_ci'], '.2f')}")


def report_replacement(found, what):
    print("\ncross-entropy with all z_cat as SAEs make it, all MLP outputs as transcoders make "
          "them, both, and both 0" + what)
    for name, (mean, interval) in found.items():
        print(f"{name:12} {format_ci(mean, interval, '.3f')}")


def main():
    config = parse_flags(AgreementConfig, __doc__)
    study = begin(config, "agreement")
    rows = held_out_rows(study, config.n_rows)
    heads = head_agreement(study.model, study.saes, rows)
    report_heads(heads, len(rows))
    result = {"heads": {f"L{layer}": r for layer, r in heads.items()}}
    if len(study.saes) < 2:
        print("\nattribution against removal takes SAEs on two layers or more")
    else:
        result["removal"] = {
            root: ablation_agreement(study.model, study.saes, study.transcoders, rows, choose,
                                     config.n_roots, config.seed)
            for root, choose in ROOTS.items()}
        report_removal(result["removal"], max(study.saes), config.n_roots)
    if study.transcoders:
        result["replacement"] = replacement(study.model, study.saes, study.transcoders, rows)
        report_replacement(result["replacement"], layers_replaced(study))
    write_json(study.folder / "agreement.json", result)
    finish(study)


if __name__ == "__main__":
    run(main)
