"""What is kept of a stream of feature activations that does not fit in memory.

For every feature: its strongest places, a sample of places, and counts.

The sample is drawn in proportion to activation, by priority (Duffield, Lund and Thorup 2007).
Every place of the text has a random number u in (0,1], and a feature keeps the places with the
largest priority f / u. Let t be the largest priority that it did not keep: each kept place then
stands for max(f, t) of the feature's activation, and a sum of these over any kind of place is
right on average. All features share u, so that they keep the same places where they can.

Shapes: n entries, d_sae features; T positions.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

N_TOP = 20              # strongest places of each feature
N_PER_TENTH = 5         # places shown from each tenth of its range
N_BINS = 40             # of the histogram: bin i holds activations from 2^(i/2 - 12) on
FIRST_EDGE = 2.0**-12


class Entries(NamedTuple):
    """Active features, one entry for each place and feature."""
    row: Tensor             # (n,)
    q: Tensor               # (n,) position
    feature: Tensor         # (n,)
    f: Tensor               # (n,) activation

    def pick(self, which):
        return Entries(*(column[which] for column in self))

    def cpu(self):
        return Entries(*(column.cpu() for column in self))


def no_entries():
    """Entries, none of them."""
    none = torch.zeros(0, dtype=torch.int64)
    return Entries(none, none, none, torch.zeros(0))


def joined(parts):                                              # list of Entries -> Entries
    """The entries of all parts, one after the other."""
    return Entries(*(torch.cat(column) for column in zip(*parts)))


class StrongestPerGroup:
    """Keeps the n entries with the largest key of every group, on the CPU.

    What is added waits until there is as much of it as is kept; then the smaller ones go. An
    entry below what its group holds already does not even wait.
    """

    def __init__(self, n, n_groups, at_least=2**18):
        self.n = n
        self.at_least = at_least
        # the smallest key that a full group holds
        self.floor = torch.full((n_groups,), -torch.inf, dtype=torch.float64)
        self.entries = no_entries()
        self.group = torch.zeros(0, dtype=torch.int64)
        self.key = torch.zeros(0)
        self.waiting = []                                       # (entries, group, key)

    def add(self, entries, group, key):                         # n entries, (n,), (n,)
        entries = entries.cpu()
        group = group.cpu()
        key = key.cpu()
        above = key > self.floor[group]
        self.waiting.append((entries.pick(above), group[above], key[above]))
        n_waiting = sum(len(key) for _, _, key in self.waiting)
        if n_waiting > max(len(self.key), self.at_least):
            self.drop_the_smaller()

    def best(self):                                             # -> Entries, group (m,), key (m,)
        """What is kept, group by group, the largest key first."""
        self.drop_the_smaller()
        return self.entries, self.group, self.key

    def drop_the_smaller(self):
        everything = [(self.entries, self.group, self.key), *self.waiting]
        self.waiting = []
        entries = joined([entries for entries, _, _ in everything])
        group = torch.cat([group for _, group, _ in everything])
        key = torch.cat([key for _, _, key in everything])
        order = torch.from_numpy(np.lexsort((-key.numpy(), group.numpy())))
        rank = rank_in_group(group[order])
        full = order[rank == self.n - 1]
        self.floor[group[full]] = key[full].double()
        order = order[rank < self.n]
        self.entries = entries.pick(order)
        self.group = group[order]
        self.key = key[order]


def rank_in_group(group):                                       # (n,) sorted -> (n,)
    """0, 1, 2 ... through each run of equal numbers."""
    group = group.contiguous()
    first = torch.searchsorted(group, group)
    return torch.arange(len(group), device=group.device) - first


class Collected(NamedTuple):
    """What is kept of one layer's features. Entries are sorted by feature."""
    n: Tensor               # (d_sae,) places where each feature was active
    mass: Tensor            # (d_sae,) sum of its activations, float64
    largest: Tensor         # (d_sae,) its largest activation
    counts: Tensor          # (d_sae,N_BINS) histogram of its activations, see `bin_of`
    top: Entries            # the N_TOP strongest places, strongest first
    spread: Entries         # up to N_PER_TENTH places from each tenth of its range, from above
    sample: Entries         # places drawn in proportion to activation
    weight: Tensor          # (n,) how much activation each place of the sample stands for


class Collector:
    """Makes Collected while the text streams by."""

    def __init__(self, d_sae, n_places):
        self.n = torch.zeros(d_sae, dtype=torch.int64)
        self.mass = torch.zeros(d_sae, dtype=torch.float64)
        self.largest = torch.zeros(d_sae)
        self.counts = torch.zeros(d_sae, N_BINS, dtype=torch.int64)
        self.top = StrongestPerGroup(N_TOP, d_sae)
        self.sample = StrongestPerGroup(n_places + 1, d_sae)    # the last tells what was left out

    def add(self, entries, u):                                  # n entries, (n,) in (0,1]
        feature = entries.feature
        f = entries.f
        d_sae = len(self.n)
        self.n += torch.bincount(feature, minlength=d_sae)
        self.mass += torch.bincount(feature, f.double(), minlength=d_sae)
        self.largest.scatter_reduce_(0, feature, f.to(self.largest.dtype), "amax")
        cell = feature * N_BINS + bin_of(f)
        self.counts += torch.bincount(cell, minlength=d_sae * N_BINS).view_as(self.counts)
        self.top.add(entries, feature, f)
        self.sample.add(entries, feature, f / u)

    def result(self):                                           # -> Collected
        top, _, _ = self.top.best()
        sample, weight = priority_weights(*self.sample.best(), self.sample.n)
        spread = from_each_tenth(joined([top, sample]), self.largest)
        return Collected(self.n, self.mass, self.largest, self.counts, top, spread, sample, weight)


def bin_of(f):                                                  # (n,) -> (n,) 0 to N_BINS - 1
    """The histogram's bin of each activation. Edges grow by a factor of sqrt 2 from FIRST_EDGE; the
    first and the last bin also hold what lies outside."""
    return (2 * (f / FIRST_EDGE).log2()).floor().clamp(0, N_BINS - 1).long()


def priority_weights(entries, feature, key, n):                 # -> Entries, weight (m,)
    """The sample, and how much activation each of its places stands for.

    Of n places the last, by key, only says what was left out. A feature with fewer places has them
    all, and each stands for its own activation.
    """
    last = rank_in_group(feature) == n - 1
    left_out = torch.zeros(int(feature.max()) + 1 if len(feature) else 0)
    left_out[feature[last]] = key[last]
    weight = torch.maximum(entries.f, left_out[feature])
    return entries.pick(~last), weight[~last]


def from_each_tenth(entries, largest):                          # Entries, (d_sae,) -> Entries
    """Up to N_PER_TENTH different places from each tenth of a feature's range, drawn at random."""
    place = torch.stack([entries.feature, entries.row, entries.q], 1)
    _, index = np.unique(place.numpy(), axis=0, return_index=True)
    entries = entries.pick(torch.from_numpy(index))
    tenth = (entries.f / largest[entries.feature] * 10).long().clamp_max(9)
    drawn = StrongestPerGroup(N_PER_TENTH, 10 * len(largest))
    random = torch.rand(len(tenth), generator=torch.Generator().manual_seed(0))
    drawn.add(entries, entries.feature * 10 + 9 - tenth, random)
    return drawn.best()[0]


def feature_token_mass(feature, token, weight):             # (n,) x 3 -> (m,2), (m,) float64
    """How much weight falls on each (feature, token), feature by feature, largest first."""
    n_tokens = int(token.max()) + 1 if len(token) else 1
    pair, index = (feature * n_tokens + token).unique(return_inverse=True)
    mass = torch.zeros(len(pair), dtype=torch.float64).index_add_(0, index, weight.double())
    feature, token = pair // n_tokens, pair % n_tokens
    order = torch.from_numpy(np.lexsort((-mass.numpy(), feature.numpy())))
    return torch.stack([feature, token], 1)[order], mass[order]
