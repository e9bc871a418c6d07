"""Do the attributions agree, with each other and with the model?

    python tests/measured/agreement.py          the shipped model, over held-out text

Three tables, also written to <out>/<model>/agreement/agreement.json: weight-based head attribution
against DFA by head; recursive DFA against what happens when a feature is removed from the model;
and what the model loses when SAEs and transcoders do its work.

Shapes: R rows, T positions, H heads, D = H*d_head, d_sae.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train  # noqa: E402
from attribution import (FEATURE, Place, ablation_effects, totals, trace_prompt,  # noqa: E402
                         upstream_features)
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


@torch.no_grad()
def head_agreement(model, sae, layer, rows):                # (R,T) -> dict
    """Weight-based head attribution against DFA by head, over the features that fire in `rows`.

    DFA by head of a feature is summed over the positions where it fires: z_h . w^h less the
    constant, which is DFA of direct.values_minus_bias summed over sources. rank: mean over
    features of Spearman's correlation over heads; top1: how often both name the same head; with
    intervals over features; None where there is nothing to compare.
    """
    H = model.config.n_heads
    weights = head_weights(sae.W_dec, H)
    by_head = torch.zeros_like(weights)                     # (d_sae,H)
    n_fired = torch.zeros(sae.d_sae, device=weights.device)
    W_enc = sae.W_enc.unflatten(0, (H, -1))                 # (H,d_head,d_sae)
    for tokens in rows.split(16):
        z = model.z_cat_at(tokens, [layer])[layer][:, 1:].flatten(0, 1)             # (n,D)
        active = (sae.encode(z) != 0).to(z.dtype)
        z = (z - model.value_bias(layer)).unflatten(-1, (H, -1))                    # (n,H,d_head)
        n_fired += active.sum(0)
        for h in range(H):
            by_head[:, h] += (active * (z[:, h] @ W_enc[h])).sum(0)
    live = n_fired > 0
    rank = spearman(weights[live], by_head[live]).numpy()
    same_top = (weights[live].argmax(-1) == by_head[live].argmax(-1)).cpu().double().numpy()
    result = {"n_fired": int(live.sum()), "n_silent": int((~live).sum())}
    for name, values in (("rank", rank[np.isfinite(rank)]), ("top1", same_top)):
        result |= {name: None, f"{name}_ci": None}
        if len(values):
            result[name] = float(values.mean())
            result[f"{name}_ci"] = bootstrap(lambda drawn: float(values[drawn].mean()), len(values))
    return result


@torch.no_grad()
# -> dict
def ablation_agreement(model, saes, transcoders, rows, n_roots=100, n_strong=10, n_random=10,
                       seed=0):
    """Recursive DFA against removal, nothing frozen.

    For features of the last layer that has an SAE, at positions drawn at random, the n_strong
    earlier attention features of largest direct attribution and n_random others are removed one at
    a time, each where it fired, and the model run anew. What is attributed to them: in one step,
    summed over heads; over all paths through attention features; and over all paths, MLP features
    too. rank: mean over roots of Spearman's correlation of attribution with the fall of the
    pre-activation. sign: how often their signs agree among the strong ones. slope: fall per unit
    attributed (least squares through 0, over all). Intervals over roots.
    """
    rng = np.random.default_rng(seed)
    layer = max(saes)
    measured = {}                                           # {way: [(rank, sign, product, square)]}
    n_measured = 0
    while n_measured < n_roots:
        if not len(rows):
            raise UserError(f"these rows have only {n_measured} features with "
                            f"{n_strong + n_random} earlier ones to remove, and {n_roots} are "
                            f"needed; give more text, or raise --n-rows.")
        tokens, rows = rows[0], rows[1:]
        traced = trace_prompt(model, saes, tokens)
        position = int(rng.integers(min(8, len(tokens) - 1), len(tokens)))
        active = traced.f[layer][position].nonzero()[:, 0]
        if not len(active):
            continue
        root = int(active[rng.integers(len(active))])
        reader = Place("feature", layer, position, root)
        upstream, in_one_step = upstream_features(traced, reader)
        if len(upstream) < n_strong + n_random:
            continue
        others = n_strong + rng.choice(len(upstream) - n_strong, n_random, replace=False)
        chosen = torch.from_numpy(np.concatenate([np.arange(n_strong), others])).to(tokens.device)
        removed = upstream[chosen]
        fall = ablation_effects(traced, removed, reader)
        attributed = {"one step": in_one_step[chosen],
                      "all paths through attention": totals(traced, reader).contribution[removed]}
        if transcoders:
            attributed["all paths, through MLPs too"] = through_mlps(
                traced, transcoders, reader, removed)
        for way, values in attributed.items():
            same_sign = (values.sign() == fall.sign())[:n_strong]
            measured.setdefault(way, []).append(
                (float(spearman(values, fall)), float(same_sign.double().mean()),
                 float((values * fall).sum()), float(values.square().sum())))
        n_measured += 1
    ways = {way: summary_over_roots(np.array(columns)) for way, columns in measured.items()}
    return {"layer": layer, "n_roots": n_roots, "n_removed": n_roots * (n_strong + n_random),
            "ways": ways}


def through_mlps(traced, transcoders, reader, removed):     # (n,) -> (n,)
    """What is attributed to attention features over all paths, when MLPs are taken apart as well.
    removed: rows of traced.components, which has the same attention features in the same order."""
    whole = trace_prompt(traced.model, traced.saes, traced.tokens, transcoders)
    contribution = totals(whole, reader).contribution[whole.components.kind == FEATURE]
    rank = (traced.components.kind == FEATURE).cumsum(0) - 1
    return contribution[rank[removed]]


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


def main():
    config = parse_flags(AgreementConfig, __doc__)
    study = begin(config, "agreement")
    rows = held_out_rows(study, config.n_rows)
    heads = {layer: head_agreement(study.model, sae, layer, rows)
             for layer, sae in study.saes.items()}
    print(f"weight-based head attribution against DFA by head, over features that fire in "
          f"{len(rows)} rows; [95% interval]\nlayer  fired  silent    Spearman over heads       "
          f"same top head")
    for layer, r in heads.items():
        rank = format_ci(r["rank"], r["rank_ci"], ".3f")
        top1 = format_ci(r["top1"], r["top1_ci"], ".1%")
        print(f"{layer:5d} {r['n_fired']:6d} {r['n_silent']:7d}   {rank:>21}  {top1:>22}")
    result = {"heads": {f"L{layer}": r for layer, r in heads.items()}}
    if len(study.saes) < 2:
        print("\nattribution against removal takes SAEs on two layers or more")
    else:
        result["removal"] = removal = ablation_agreement(study.model, study.saes, study.transcoders,
                                                         rows, seed=config.seed)
        print(f"\nrecursive DFA against removal, nothing frozen: {removal['n_removed']} removals "
              f"below {removal['n_roots']} features of layer {removal['layer']}\n"
              f"{'attribution':29} Spearman                 same sign, strongest ten   "
              f"fall per unit attributed")
        for way, r in removal["ways"].items():
            print(f"{way:29} {format_ci(r['rank'], r['rank_ci'], '.3f'):24} "
                  f"{format_ci(r['sign'], r['sign_ci'], '.1%'):26} "
                  f"{format_ci(r['slope'], r['slope_ci'], '.2f')}")
    if study.transcoders:
        result["replacement"] = replacement(study.model, study.saes, study.transcoders, rows)
        print("\ncross-entropy with all z_cat as SAEs make it, all MLP outputs as transcoders make "
              "them, both, and both 0" + layers_replaced(study))
        for name, (mean, interval) in result["replacement"].items():
            print(f"{name:12} {format_ci(mean, interval, '.3f')}")
    write_json(study.folder / "agreement.json", result)
    finish(study)


if __name__ == "__main__":
    run(main)
