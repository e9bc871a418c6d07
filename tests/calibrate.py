"""What the head census of features.py says about heads whose jobs are known.

    python tests/calibrate.py [number of hand-wired models, 24 if not given]

Each model (tests/wired.py) has four heads that do one, two or four jobs, and an SAE trained on their z_cat. A
feature's true role in a head is the job of the tokens at which the head gathers most of its activation; the
true number of roles among the features that lie in a head most follows from these as the measured one does
from the roles found. The threshold of similarity is chosen on one half of the models and judged on the other;
a head is wrong if it is polysemantic (features.MANY) by one of the two numbers and not by the other.
features.py has the threshold chosen here (ALIKE).
"""

import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import features as F  # noqa: E402
import wired as W  # noqa: E402
from data.common import Progress, wilson, with_interval  # noqa: E402

LEAST = [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8]       # similarities tried


class Head(NamedTuple):
    """One hand-wired head."""
    n_jobs: int
    true: dict              # {choice: number of roles among its features of that choice, by the jobs wired}
    found: dict             # {choice: {similarity: the number found}}


def census_of_wired(seed):
    """One model -> list of Head."""
    rng = random.Random(seed)
    jobs_of = [W.draw_jobs(n_jobs, rng) for n_jobs in (1, 1, 2, 4)]
    rng.shuffle(jobs_of)
    model = W.wire(jobs_of)
    sae = W.train_sae(W.z_cat(model, W.text(600, f"{seed} train")), seed=seed)
    saes, text = {1: sae}, W.text(1000, f"{seed} census")
    classes = torch.where(text == W.BOS, -1, text)
    tokens, collected = F.collect(model, saes, [text], len(text), seed=seed)
    reads = F.look_again(model, saes, tokens, collected)[1][0]
    family = torch.zeros(sae.d_sae, dtype=torch.int64)      # of no importance here
    census = F.head_census(model, sae, 1, collected[1], reads, tokens, classes, family, LEAST)
    heads = []
    for jobs, one in zip(jobs_of, census):
        chosen = {f"top {n}": one["features"][:n] for n in F.TOPS} | {F.DRAWN: one["drawn"]["features"]}
        true = {}
        for choice, features in chosen.items():
            truth = [true_job(jobs, one["head"], i, collected[1], reads, tokens) for i in features]
            groups = [[i for i, its in enumerate(truth) if its == job] for job in set(truth)]
            true[choice] = F.number_of_roles(groups)
        heads.append(Head(len(jobs), true, one["roles"]))
    return heads


def true_job(jobs, h, feature, kept, reads, tokens):
    """The job of the tokens at which head h gathers most of a feature's activation; -1: they have none."""
    mine = kept.sample.feature == feature
    at = tokens[kept.sample.row[mine], kept.sample.q[mine]].long()
    gathered = (kept.weight / kept.sample.f)[mine] * reads.head_value[mine, h].clamp_min(0)
    by_kind = torch.bincount(at % W.KINDS, gathered, minlength=W.KINDS)
    return next((i for i, (_, kinds) in enumerate(jobs) if int(by_kind.argmax()) in kinds), -1)


def wrong(heads, choice, least):                        # -> (one role called many, many called one)
    """Numbers of heads on the wrong side, of each kind."""
    called = [(one.true[choice] > F.MANY, one.found[choice][least] > F.MANY) for one in heads]
    return sum(got and not true for true, got in called), sum(true and not got for true, got in called)


def distance(heads, choice, least):
    """Median factor between the number of roles found and the true one; where no two share a role, a hundred
    stands for infinitely many."""
    pairs = [(min(one.found[choice][least], 100), min(one.true[choice], 100)) for one in heads]
    return 2 ** float(np.median([abs(math.log2(found / true)) for found, true in pairs]))


def main():
    n_models = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    progress, halves = Progress(n_models, "models"), ([], [])
    for seed in range(n_models):
        halves[seed % 2].extend(census_of_wired(seed))
        progress(seed + 1)
    chosen_on, judged_on = halves
    choice = F.TOP
    print(f"\n{len(chosen_on)} heads to choose on, their {choice} features\n"
          f"similarity   wrong   median factor")
    n_wrong = [sum(wrong(chosen_on, choice, least)) for least in LEAST]
    fewest = [least for least, number in zip(LEAST, n_wrong) if number == min(n_wrong)]
    best = fewest[(len(fewest) - 1) // 2]
    for least, number in zip(LEAST, n_wrong):
        print(f"{least:10.2f} {number:7d} {distance(chosen_on, choice, least):12.2f}")
    print(f"chosen: {best}, in the middle of those with the fewest\n\non the other {len(judged_on)} heads; "
          "intervals as if the heads of one model were independent\n"
          "features   similarity   one role called many   "
          "many called one       wrong [95% interval]   median factor")
    for choice in F.CHOICES:
        for least in LEAST:
            one, many = wrong(judged_on, choice, least)
            n_one = sum(head.true[choice] <= F.MANY for head in judged_on)
            share = with_interval((one + many) / len(judged_on), wilson(one + many, len(judged_on)), ".1%")
            print(f"{choice:9} {least:11.2f} {one:16d} of {n_one:2d} {many:14d} of "
                  f"{len(judged_on) - n_one:2d} {share:>26} {distance(judged_on, choice, least):10.2f}")
    print("\nheads with several jobs whose features of a choice are nearly all of one job, so that no "
          "judgement of these could tell:")
    for choice in F.CHOICES:
        several = [one for one in chosen_on + judged_on if one.n_jobs > 1]
        hidden = sum(one.true[choice] <= F.MANY for one in several)
        share = with_interval(hidden / len(several), wilson(hidden, len(several)), ".1%")
        print(f"{choice}: {hidden} of {len(several)}, {share}")


if __name__ == "__main__":
    main()
