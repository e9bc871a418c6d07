"""Do the attributions agree, with each other and with the model?

    python tests/measured/agreement.py          the shipped model, over held-out text

Two tables, also written to <out>/<model>/agreement/agreement.json: weight-based head attribution
against DFA by head; and one step of recursive DFA against what happens when a feature is removed
from the model.

Shapes: R rows, T positions, H heads, D = H*d_head, d_sae.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from attribution import (Reader, ablation_effects, trace_prompt,  # noqa: E402
                         upstream_features)
from data.errors import UserError, run  # noqa: E402
from data.files import write_json  # noqa: E402
from data.flags import field, parse_flags  # noqa: E402
from data.stats import bootstrap, format_ci, spearman  # noqa: E402
from direct import head_weights  # noqa: E402
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
def ablation_agreement(model, saes, rows, n_roots=100, n_strong=10, n_random=10, seed=0):
    """One step of recursive DFA against removal, nothing frozen.

    For features of the last layer that has an SAE, at positions drawn at random, the n_strong
    earlier features of largest direct attribution and n_random others are removed one at a time,
    each where it fired, and the model run anew. rank: mean over roots of Spearman's correlation of
    attribution (summed over heads) with the fall of the pre-activation. sign: how often their signs
    agree among the strong ones. slope: fall per unit attributed (least squares through 0, over
    all). Intervals over roots.
    """
    rng = np.random.default_rng(seed)
    layer = max(saes)
    rank, sign, product, square = [], [], [], []            # one entry for each root
    while len(rank) < n_roots:
        if not len(rows):
            raise UserError(f"these rows have only {len(rank)} features with {n_strong + n_random} "
                            f"earlier ones to remove, and {n_roots} are needed; give more text, or "
                            f"raise --n-rows.")
        tokens, rows = rows[0], rows[1:]
        traced = trace_prompt(model, saes, tokens)
        position = int(rng.integers(min(8, len(tokens) - 1), len(tokens)))
        active = traced.f[layer][position].nonzero()[:, 0]
        if not len(active):
            continue
        root = int(active[rng.integers(len(active))])
        upstream, attributed = upstream_features(traced, Reader("feature", layer, position, root))
        if len(upstream) < n_strong + n_random:
            continue
        others = n_strong + rng.choice(len(upstream) - n_strong, n_random, replace=False)
        chosen = torch.from_numpy(np.concatenate([np.arange(n_strong), others])).to(tokens.device)
        attributed = attributed[chosen]
        fall = ablation_effects(traced, upstream[chosen],
                                Reader("feature", layer, position, root))
        rank.append(float(spearman(attributed, fall)))
        sign.append(float((attributed.sign() == fall.sign())[:n_strong].double().mean()))
        product.append(float((attributed * fall).sum()))
        square.append(float(attributed.square().sum()))
    rank, sign, product, square = (np.array(x) for x in (rank, sign, product, square))
    statistics = {"rank": lambda drawn: rank[drawn].mean(),
                  "sign": lambda drawn: sign[drawn].mean(),
                  "slope": lambda drawn: product[drawn].sum() / square[drawn].sum()}
    result = {"layer": layer, "n_roots": n_roots, "n_removed": n_roots * (n_strong + n_random)}
    for name, statistic in statistics.items():
        result[name] = float(statistic(np.arange(n_roots)))
        result[f"{name}_ci"] = bootstrap(statistic, n_roots)
    return result


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
        result["removal"] = r = ablation_agreement(study.model, study.saes, rows, seed=config.seed)
        print(f"\none step of recursive DFA against removal, nothing frozen: {r['n_removed']} "
              f"removals below {r['n_roots']} features of layer {r['layer']}")
        print(f"Spearman {format_ci(r['rank'], r['rank_ci'], '.3f')}; same sign, strongest ten "
              f"{format_ci(r['sign'], r['sign_ci'], '.1%')}; fall per unit attributed "
              f"{format_ci(r['slope'], r['slope_ci'], '.2f')}")
    write_json(study.folder / "agreement.json", result)
    finish(study)


if __name__ == "__main__":
    run(main)
