"""What is kept of a stream that does not fit in memory: the few largest of each of many groups; and, of the
places where features are active, the strongest, some from every part of the range, and a sample drawn in
proportion to activation.

The sample is drawn by priority (Duffield, Lund and Thorup 2007). Every place of the text has a random number
u in (0,1]; a feature keeps the places with the largest f / u. With t the largest f / u that it did not keep,
each kept place stands for max(f, t) of the feature's activation, and sums of these over any part of the
places are right on average. u is shared by all features, so that they keep the same places where they can.

Shapes: n entries, d_sae features; T positions.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

N_TOP, N_PART, N_BINS = 20, 5, 40       # strongest places; places of each tenth of the range; bins


class Entries(NamedTuple):
    """Active features, one entry for each place and feature."""
    row: Tensor             # (n,)
    q: Tensor               # (n,) position
    feature: Tensor         # (n,)
    f: Tensor               # (n,) activation

    def pick(self, which):
        return Entries(*(column[which] for column in self))


NONE = Entries(*(torch.zeros(0, dtype=torch.int64),) * 3, torch.zeros(0))


class Keeper:
    """Keeps the n entries with the largest key of every group, on the CPU.

    What is added waits until there is as much of it as is kept; then the smaller ones go. An entry that is
    below what its group holds does not even wait.
    """

    def __init__(self, n, n_groups, at_least=2**18):
        self.n, self.at_least = n, at_least
        self.floor = torch.full((n_groups,), -torch.inf, dtype=torch.float64)   # a full group's smallest key
        self.kept = NONE, NONE.row, NONE.f                      # entries, group, key
        self.waiting = []                                       # the same, several times

    def add(self, entries, group, key):                         # n entries, (n,), (n,)
        entries, group, key = Entries(*(column.cpu() for column in entries)), group.cpu(), key.cpu()
        above = key > self.floor[group]
        self.waiting.append((entries.pick(above), group[above], key[above]))
        if sum(len(key) for _, _, key in self.waiting) > max(len(self.kept[2]), self.at_least):
            self._sort()

    def regroup(self, group_of):
        """Entries get new groups, group_of(entries), such as unions of the old."""
        entries, _, key = self.best()
        self.kept = entries, group_of(entries), key
        self.floor.fill_(-torch.inf)
        self._sort()

    def best(self):                                             # -> entries, group (m,), key (m,)
        """What is kept, group by group, the largest key first."""
        self._sort()
        return self.kept

    def _sort(self):
        parts, self.waiting = [self.kept, *self.waiting], []
        entries = Entries(*map(torch.cat, zip(*(part[0] for part in parts))))
        group, key = (torch.cat([part[i] for part in parts]) for i in (1, 2))
        order = torch.from_numpy(np.lexsort((-key.numpy(), group.numpy())))
        rank = rank_in_group(group[order])
        last, order = order[rank == self.n - 1], order[rank < self.n]
        self.floor[group[last]] = key[last].double()
        self.kept = entries.pick(order), group[order], key[order]


def rank_in_group(group):                                       # (n,) sorted -> (n,)
    """0, 1, 2 ... through each run of equal numbers."""
    group = group.contiguous()
    return torch.arange(len(group), device=group.device) - torch.searchsorted(group, group)


class Collected(NamedTuple):
    """What is kept of one layer's features. Entries are sorted by feature."""
    n: Tensor               # (d_sae,) places where each feature was active
    mass: Tensor            # (d_sae,) sum of its activations, float64
    largest: Tensor         # (d_sae,) largest activation
    counts: Tensor          # (d_sae,N_BINS) histogram of its activations, from 0
    width: Tensor           # (d_sae,) of a bin
    top: Entries            # the N_TOP strongest places, strongest first
    spread: Entries         # up to N_PART places from each tenth of the range, the highest tenth first
    sample: Entries         # places drawn in proportion to activation
    weight: Tensor          # (n,) how much activation each place of the sample stands for


class Collector:
    """Makes Collected while the text streams by. A histogram's bins double in width, joining in pairs, until
    the largest activation fits; half of them or more are in use then."""

    def __init__(self, d_sae, n_places):
        self.n, self.mass = torch.zeros(d_sae, dtype=torch.int64), torch.zeros(d_sae, dtype=torch.float64)
        self.largest, self.counts = torch.zeros(d_sae), torch.zeros(d_sae, N_BINS, dtype=torch.int64)
        self.exponent = torch.full((d_sae,), -100)              # a bin's width is 2^exponent
        self.top, self.sample = Keeper(N_TOP, d_sae), Keeper(n_places + 1, d_sae)
        self.parts = Keeper(N_PART, d_sae * N_BINS)

    def add(self, entries, u):                                  # n entries, (n,)
        feature, f = entries.feature, entries.f
        self.largest.scatter_reduce_(0, feature, f, "amax")
        self._widen()
        self.n += torch.bincount(feature, minlength=len(self.n))
        self.mass += torch.bincount(feature, f.double(), minlength=len(self.n))
        self.counts += torch.bincount(self._bin(entries), minlength=self.counts.numel()).view_as(self.counts)
        self.top.add(entries, feature, f)
        self.sample.add(entries, feature, f / u)
        self.parts.add(entries, self._bin(entries), u)

    def _widen(self):
        needed = torch.where(self.largest > 0, (self.largest / N_BINS).log2().floor().long() + 1, -100)
        self.exponent[self.n == 0] = needed[self.n == 0]
        if not (self.exponent < needed).any():
            return
        while (narrow := self.exponent < needed).any():
            pairs = self.counts[narrow].unflatten(1, (-1, 2)).sum(-1)
            self.counts[narrow] = torch.cat([pairs, torch.zeros_like(pairs)], 1)
            self.exponent[narrow] += 1
        self.parts.regroup(self._bin)

    def _bin(self, entries):                                    # -> (n,) feature * N_BINS + bin
        bins = (entries.f / 2.0 ** self.exponent[entries.feature]).long().clamp_max(N_BINS - 1)
        return entries.feature * N_BINS + bins

    def result(self):
        """-> Collected."""
        sample, weight = priority_weights(*self.sample.best(), self.sample.n)
        return Collected(self.n, self.mass, self.largest, self.counts, 2.0 ** self.exponent,
                         self.top.best()[0], tenths(self.parts.best()[0], self.largest), sample, weight)


def priority_weights(entries, feature, key, n):         # -> Entries, weight (m,)
    """Of n places the last, by key, only says what was left out; the others stand for max(f, its key) each.
    A feature with fewer places has them all, and each stands for its own activation."""
    last = rank_in_group(feature) == n - 1
    left_out = torch.zeros(int(feature.max()) + 1 if len(feature) else 0)
    left_out[feature[last]] = key[last]
    weight = torch.maximum(entries.f, left_out[feature])
    return entries.pick(~last), weight[~last]


def tenths(parts, largest):                             # Entries, (d_sae,) -> Entries
    """Up to N_PART places from each tenth of a feature's range."""
    tenth = (parts.f / largest[parts.feature] * 10).long().clamp_max(9)
    keeper = Keeper(N_PART, 10 * len(largest))
    mixed = torch.Generator().manual_seed(0)            # a tenth consists of several bins, and parts of bins
    keeper.add(parts, parts.feature * 10 + 9 - tenth, torch.rand(len(tenth), generator=mixed))
    return keeper.best()[0]
