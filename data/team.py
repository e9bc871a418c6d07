"""Several processes that train together: torchrun --nproc-per-node N train.py, on one machine or
more.

Each takes its share of every batch. Sums over all of them make the batch's loss, gradients and
counts, so that all hold the same weights, and the result is that of one process up to the order in
which numbers are added.
"""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist


class Team(NamedTuple):
    """This process among `size` of them."""
    rank: int = 0
    size: int = 1

    @property
    def leads(self):
        """One of them writes and speaks."""
        return self.rank == 0

    def sum(self, *tensors):
        """Each tensor's sum over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def sum_step(self, result, weight):
        """The loss and gradients of a whole batch from those of this process's share, in place.

        weight: the share's part of the batch, which turns means over it into parts of the mean.
        """
        if self.size > 1:
            means = (result.mse, result.sparsity, *result.gradients.values())
            for mean in means:
                mean *= weight
            self.sum(result.fired, *means)

    def any(self, flag):
        """Whether the flag is set in any of them."""
        count = torch.tensor(float(flag))
        self.sum(count)
        return bool(count)

    def share(self, index, per_row):                        # (n,) places in a block -> (m,), (m,)
        """Which of the places are this process's, and where it keeps them. Place p is in row
        p // per_row, and rows are dealt out in turn. Alone, all are: where p is kept is p."""
        row = index // per_row
        own = (row % self.size == self.rank).nonzero()[:, 0]
        return own, row[own] // self.size * per_row + index[own] % per_row


def join():
    """The team that torchrun started; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and not dist.is_initialized():
        # gloo also moves what is on a GPU, through main memory; with a GPU each, nccl is faster
        enough_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= size
        if enough_gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if enough_gpus else "gloo")
    return Team(int(os.environ.get("RANK", 0)), size)


def leave():
    """Part from the team, at the end of a program."""
    if dist.is_initialized():
        dist.destroy_process_group()
