"""What the head census of features.py says about heads whose jobs are known.

    python tests/calibrate.py [number of hand-wired models, 24 if not given]

Each model (tests/wired.py) has four heads that do one, two or four jobs, and an SAE trained on their z_cat.
The threshold of similarity and the number of roles above which a head counts as polysemantic are chosen on
one half of the models, and judged on the other: errors are heads with one job called polysemantic, and heads
with several called monosemantic. features.py has what was chosen here (ALIKE, MANY).
"""

import math
import random
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import features as F  # noqa: E402
import wired as W  # noqa: E402
from attribution import head_weights  # noqa: E402
from data.common import Progress, wilson  # noqa: E402

LEAST = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]         # thresholds of similarity tried
MANY = [1.2, 1.35, 1.5, 1.75, 2.0]                  # numbers of roles tried


def census_of_wired(seed):
    """One model -> [(number of jobs, {n: {threshold: roles}}) for each head]."""
    rng = random.Random(seed)
    heads = [W.draw_jobs(n_jobs, rng) for n_jobs in (1, 1, 2, 4)]
    rng.shuffle(heads)
    model = W.wire(heads)
    sae = W.train_sae(W.z_cat(model, W.text(600, f"{seed} train")), seed=seed)
    saes, text = {1: sae}, W.text(1000, f"{seed} census")
    classes = torch.where(text == W.BOS, -1, text)
    tokens, collected = F.collect(model, saes, [text], len(text), n_places=200, seed=seed)
    reads = F.look_again(model, saes, tokens, collected)[1][0]
    found = F.head_census(model, sae, 1, collected[1], reads, tokens, classes, LEAST)
    return [(len(jobs), {n: roles for n, roles in one["roles"].items()}) for jobs, one in zip(heads, found)]


def errors(heads, n, least, many):                      # -> (one job called many, many called one)
    """Numbers of wrong heads, of each kind."""
    called = [(jobs > 1, roles[n][least] > many) for jobs, roles in heads]
    return sum(got and not true for true, got in called), sum(true and not got for true, got in called)


def main():
    n_models = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    progress, halves = Progress(n_models, "models"), ([], [])
    for seed in range(n_models):
        halves[seed % 2].extend(census_of_wired(seed))
        progress(seed + 1, last=seed == n_models - 1)
    chosen_on, judged_on = halves
    n = F.TOPS[1]
    least, many = min(((a, b) for a in LEAST for b in MANY), key=lambda ab: (
        sum(errors(chosen_on, n, *ab)), abs(ab[0] - 0.5), abs(ab[1] - 1.5)))
    print(f"\nchosen on {len(chosen_on)} heads, by the {n} features that lie in each most: a role is shared "
          f"from similarity {least} on, a head is polysemantic above {many} roles")
    print("\nthreshold   errors on the half it was chosen on, by number of roles " + str(MANY))
    for a in LEAST:
        print(f"{a:9.2f}   " + "  ".join(f"{sum(errors(chosen_on, n, a, b)):4d}" for b in MANY))
    print("\non the other half:")
    print("features   threshold   one job called many   many called one    wrong [95% interval]      roles found: "
          "median of heads with 1, 2, 4 jobs")
    for n in F.TOPS:
        for a in sorted({least, *F.ALIKE} & set(LEAST) | {least}):
            one, several = errors(judged_on, n, a, many)
            low, high = wilson(one + several, len(judged_on))
            medians = [np.median([min(roles[n][a], 2 * n) for jobs, roles in judged_on if jobs == m])
                       for m in (1, 2, 4)]
            print(f"{n:8d} {a:11.2f} {one:17d} of {sum(j == 1 for j, _ in judged_on):2d} "
                  f"{several:14d} of {sum(j > 1 for j, _ in judged_on):2d}   "
                  f"{(one + several) / len(judged_on):6.1%} [{low:.1%}, {high:.1%}]   "
                  + "  ".join(f"{m:5.1f}" for m in medians))
    right = np.mean([abs(math.log2(min(roles[F.TOPS[1]][least], 64) / jobs)) < 0.5 for jobs, roles in judged_on])
    print(f"\nheads whose number of roles is within a factor of 1.4 of the number of jobs: {right:.1%}")


if __name__ == "__main__":
    main()
