"""data/strongest.py: what is kept of a stream, against sorting all of it."""

import math

import numpy as np
import pytest
import torch

from data import strongest as keep
from data.strongest import Entries


def random_entries(n, d_sae, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Entries(torch.randint(500, (n,), generator=g), torch.randint(1, 50, (n,), generator=g),
                   torch.randint(d_sae, (n,), generator=g),
                   torch.rand(n, generator=g).pow(4) + 1e-4)


def test_a_keeper_of_a_stream_keeps_what_sorting_everything_keeps():
    every = random_entries(20_000, 7)
    keeper = keep.StrongestPerGroup(5, 7, at_least=50)
    for i in range(0, 20_000, 333):
        part = every.pick(slice(i, i + 333))
        keeper.add(part, part.feature, part.f)
    kept, group, key = keeper.best()
    for i in range(7):
        best = every.f[every.feature == i].sort(descending=True).values[:5]
        torch.testing.assert_close(kept.f[kept.feature == i], best)
    assert torch.equal(group, kept.feature) and torch.equal(key, kept.f)


def test_an_empty_keeper_has_nothing():
    kept, group, key = keep.StrongestPerGroup(3, 4).best()
    assert len(kept.f) == len(group) == len(key) == 0


def collector_of(every, d_sae, n_places=30, seed=0):
    collector = keep.Collector(d_sae, n_places)
    u = 1 - torch.rand(500, 50, generator=torch.Generator().manual_seed(seed))
    for i in range(0, len(every.f), 700):
        part = every.pick(slice(i, i + 700))
        collector.add(part, u[part.row, part.q])
    return collector.result()


def test_a_collector_counts_as_numpy_does():
    every, d_sae = random_entries(20_000, 6), 8
    every = every._replace(f=every.f * torch.linspace(0.001, 3, 20_000))
    kept = collector_of(every, d_sae)
    for i in range(d_sae):
        f = every.f[every.feature == i]
        assert int(kept.n[i]) == len(f)
        assert float(kept.mass[i]) == pytest.approx(float(f.double().sum()))
        if not len(f):
            continue
        assert float(kept.largest[i]) == float(f.max())
        edges = keep.FIRST_EDGE * 2 ** (np.arange(keep.N_BINS + 1) / 2)
        edges[0], edges[-1] = 0, np.inf                     # these two also hold what lies outside
        counts, _ = np.histogram(f.double().numpy(), edges)
        assert counts.tolist() == kept.counts[i].tolist()
        top = kept.top.f[kept.top.feature == i]
        torch.testing.assert_close(top, f.sort(descending=True).values[:keep.N_TOP])


def test_examples_come_from_every_tenth_of_the_range():
    """From the strongest places and the sample, a place once; the highest tenth first."""
    every = random_entries(50_000, 2)
    kept = collector_of(every, 2, n_places=200)
    for i in range(2):
        f = every.f[every.feature == i]
        at_hand = {(row, q): value for entries in (kept.top, kept.sample)
                   for row, q, feature, value in zip(*(column.tolist() for column in entries))
                   if feature == i}
        shown = kept.spread.f[kept.spread.feature == i]

        def tenth(values):
            return (torch.as_tensor(values) / f.max() * 10).long().clamp_max(9)

        there = torch.bincount(tenth(list(at_hand.values())), minlength=10)
        assert torch.equal(torch.bincount(tenth(shown), minlength=10),
                           there.clamp_max(keep.N_PER_TENTH)), "too few of a tenth, or too many"
        assert (there > 0).sum() >= 8 and (tenth(shown).diff() <= 0).all()


def test_shares_by_priority_sampling_are_right_on_average():
    """A property that half of the places have, more so the strong ones; 30 places of about 1,000
    are kept."""
    every = random_entries(2000, 2)
    has = (every.f > 0.3) | (every.q < 5)
    true = torch.bincount(every.feature, every.f * has) / torch.bincount(every.feature, every.f)
    found, whole = [], []
    for seed in range(300):
        kept = collector_of(every, 2, seed=seed)
        hit = (kept.sample.f > 0.3) | (kept.sample.q < 5)
        assert torch.bincount(kept.sample.feature).tolist() == [30, 30]
        total = torch.bincount(kept.sample.feature, kept.weight)
        found.append(torch.bincount(kept.sample.feature, kept.weight * hit) / total)
        whole.append(total / torch.bincount(every.feature, every.f))
    found, whole = torch.stack(found), torch.stack(whole)
    allowed = 4 * float(found.std(0).max()) / math.sqrt(300) + 0.005
    assert (found.mean(0) - true).abs().max() < allowed
    assert (whole.mean(0) - 1).abs().max() < 4 * float(whole.std(0).max()) / math.sqrt(300)


def test_a_feature_with_few_places_has_them_all():
    every = random_entries(40, 2)
    kept = collector_of(every, 2)
    assert len(kept.sample.f) == 40 and torch.equal(kept.weight, kept.sample.f)


def test_mass_of_features_and_tokens_by_hand():
    pair, mass = keep.feature_token_mass(torch.tensor([1, 0, 1, 1, 0]),
                                         torch.tensor([5, 9, 5, 2, 3]),
                                         torch.tensor([1.0, 2.0, 1.5, 4.0, 1.0]))
    assert pair.tolist() == [[0, 9], [0, 3], [1, 2], [1, 5]]
    assert mass.tolist() == [2.0, 1.0, 4.0, 2.5]


def test_a_float64_model_is_collected_as_well():
    every = random_entries(200, 7)
    collector = keep.Collector(7, 30)
    collector.add(every._replace(f=every.f.double()), torch.ones(200))
    of_3 = every.f[every.feature == 3]
    assert float(collector.largest[3]) == pytest.approx(float(of_3.max()))
