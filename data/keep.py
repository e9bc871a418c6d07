"""The few largest of each of many groups, out of a stream that does not fit in memory."""

import numpy as np
import torch


class Keeper:
    """Keeps the n entries with the largest key of every group.

    An entry is a row of a NamedTuple of tensors (m,). What is added waits until there is as much of it as is
    kept; then the smaller ones go. An entry that is below what its group holds does not even wait. All on the
    CPU.
    """

    def __init__(self, n, n_groups, at_least=2**18):
        self.n, self.n_groups, self.at_least = n, n_groups, at_least
        self.floor = torch.full((n_groups,), -torch.inf)        # a full group's smallest key
        self.kept, self.waiting = [], []                        # lists of (entries, group, key)

    def add(self, entries, group, key):                         # (m,) each
        group, key = group.cpu(), key.cpu()
        above = key > self.floor[group]
        chosen = (column.cpu()[above] for column in entries)
        self.waiting.append((type(entries)(*chosen), group[above], key[above]))
        n_kept = sum(len(key) for _, _, key in self.kept)
        if sum(len(key) for _, _, key in self.waiting) > max(n_kept, self.at_least):
            self._sort()

    def regroup(self, group_of):
        """Entries get new groups, group_of(entries), such as unions of the old."""
        self._sort()
        self.kept = [(entries, group_of(entries), key) for entries, _, key in self.kept]
        self.floor.fill_(-torch.inf)
        self._sort()

    def best(self):                                             # -> entries, group (m,), key (m,)
        """What is kept, group by group, the largest key first. None of all three if nothing was added."""
        self._sort()
        return self.kept[0] if self.kept else (None, None, None)

    def _sort(self):
        parts, self.waiting = self.kept + self.waiting, []
        if not parts:
            return
        group, key = (torch.cat([part[i] for part in parts]) for i in (1, 2))
        order = torch.from_numpy(np.lexsort((-key.numpy(), group.numpy())))
        group, key = group[order], key[order]
        rank = torch.arange(len(group)) - torch.searchsorted(group, group)
        few = rank < self.n
        last = rank == self.n - 1
        self.floor[group[last]] = key[last]
        order = order[few]
        columns = (torch.cat(column)[order] for column in zip(*(part[0] for part in parts)))
        self.kept = [(type(parts[0][0])(*columns), group[few], key[few])]
