"""What the head census of heads.py says about heads whose jobs are known.

    python tests/measured/calibrate.py [number of hand-wired models, 24 if not given]

Each model (tests/wired.py) has four heads that do one, two or four jobs, and an SAE trained on
their z_cat. A feature's true role in a head is the job of the tokens at which the head gathers most
of its activation; the true number of roles among the features that lie in a head most follows from
these as the measured one does from the roles found. The threshold of similarity is chosen on one
half of the models and judged on the other; a head is wrong if it is polysemantic
(heads.POLYSEMANTIC_ABOVE) by one of the two numbers and not by the other. heads.py has the
threshold chosen here (SIMILARITY_THRESHOLD).
"""

import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import heads as H  # noqa: E402
import wired as W  # noqa: E402
from data.progress import Progress  # noqa: E402
from data.stats import format_ci, wilson  # noqa: E402

THRESHOLDS = [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8]     # tried


class Head(NamedTuple):
    """One hand-wired head."""
    n_jobs: int
    # {choice: number of roles among its features of that choice, by the jobs wired}
    true: dict
    found: dict             # {choice: {similarity: the number found}}


def census_of_wired(seed):                                  # -> list of Head
    """One model."""
    rng = random.Random(seed)
    jobs_of = [W.draw_jobs(n_jobs, rng) for n_jobs in (1, 1, 2, 4)]
    rng.shuffle(jobs_of)
    model = W.wire(jobs_of)
    sae = W.train_sae(W.z_cat(model, W.text(600, f"{seed} train")), seed=seed)
    text = W.text(1000, f"{seed} census")
    classes = torch.where(text == W.BOS, -1, text)
    of_layer, tokens = W.collection(model, sae, text, seed=seed)
    heads = []
    looked_at = H.features_of_heads(model, sae, 1, of_layer, tokens, classes)
    for jobs, head in zip(jobs_of, looked_at):
        true = {choice: true_number_of_roles(jobs, features.tolist(), head.places, tokens)
                for choice, features in head.chosen.items()}
        found = {choice: {} for choice in H.CHOICES}
        for threshold in THRESHOLDS:
            for choice, groups in H.roles_of_head(head, threshold).items():
                found[choice][threshold] = H.number_of_roles(groups)
        heads.append(Head(len(jobs), true, found))
    return heads


def true_number_of_roles(jobs, features, places, tokens):
    """The number of roles among some features, by the jobs that were wired."""
    job_of = [true_job(jobs, i, places, tokens) for i in features]
    groups = [[i for i, its_job in enumerate(job_of) if its_job == job] for job in set(job_of)]
    return H.number_of_roles(groups)


def true_job(jobs, feature, places, tokens):
    """The job of the tokens at which a head gathers most of a feature's activation; -1: they have
    none."""
    is_this = places.feature == feature
    token = tokens[places.row[is_this], places.q[is_this]].long()
    by_kind = torch.bincount(token % W.KINDS, places.gathered[is_this], minlength=W.KINDS)
    kind = int(by_kind.argmax())
    return next((i for i, (_, kinds) in enumerate(jobs) if kind in kinds), -1)


def wrong(heads, choice, least):                        # -> (one role called many, many called one)
    """Numbers of heads on the wrong side, of each kind."""
    called_many = called_one = 0
    for head in heads:
        is_many = head.true[choice] > H.POLYSEMANTIC_ABOVE
        found_many = head.found[choice][least] > H.POLYSEMANTIC_ABOVE
        called_many += found_many and not is_many
        called_one += is_many and not found_many
    return called_many, called_one


def distance(heads, choice, least):
    """Median factor between the number of roles found and the true one; where no two share a role,
    a hundred stands for infinitely many."""
    pairs = [(min(one.found[choice][least], 100), min(one.true[choice], 100)) for one in heads]
    return 2 ** float(np.median([abs(math.log2(found / true)) for found, true in pairs]))


def main():
    n_models = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    progress, halves = Progress(n_models, "models"), ([], [])
    for seed in range(n_models):
        halves[seed % 2].extend(census_of_wired(seed))
        progress(seed + 1)
    chosen_on, judged_on = halves
    choice = H.TOP
    print(f"\n{len(chosen_on)} heads to choose on, their {choice} features\n"
          f"similarity   wrong   median factor")
    n_wrong = [sum(wrong(chosen_on, choice, least)) for least in THRESHOLDS]
    fewest = [least for least, number in zip(THRESHOLDS, n_wrong) if number == min(n_wrong)]
    best = fewest[(len(fewest) - 1) // 2]
    for least, number in zip(THRESHOLDS, n_wrong):
        print(f"{least:10.2f} {number:7d} {distance(chosen_on, choice, least):12.2f}")
    print(
        f"chosen: {best}, in the middle of those with the fewest\n\non the other {len(judged_on)} heads; "
        "intervals as if the heads of one model were independent\n"
        "features   similarity   one role called many   "
        "many called one       wrong [95% interval]   median factor")
    for choice in H.CHOICES:
        for least in THRESHOLDS:
            one, many = wrong(judged_on, choice, least)
            n_one = sum(head.true[choice] <= H.POLYSEMANTIC_ABOVE for head in judged_on)
            share = format_ci((one + many) / len(judged_on), wilson(one + many, len(judged_on)),
                              ".1%")
            print(f"{choice:9} {least:11.2f} {one:16d} of {n_one:2d} {many:14d} of "
                  f"{len(judged_on) - n_one:2d} {share:>26} "
                  f"{distance(judged_on, choice, least):10.2f}")
    print(
        "\nheads with several jobs whose features of a choice are nearly all of one job, so that no "
        "judgement of these could tell:")
    for choice in H.CHOICES:
        several = [one for one in chosen_on + judged_on if one.n_jobs > 1]
        hidden = sum(one.true[choice] <= H.POLYSEMANTIC_ABOVE for one in several)
        share = format_ci(hidden / len(several), wilson(hidden, len(several)), ".1%")
        print(f"{choice}: {hidden} of {len(several)}, {share}")


if __name__ == "__main__":
    main()
