"""Several processes that train together, on one machine or more: torchrun --nproc-per-node N train.py.

Each takes its share of every batch; sums over them make the batch's loss, gradients and counts, so that all
hold the same weights, and the result is that of one process up to the order in which numbers are added.
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

    def any(self, flag):
        """Whether the flag is set in any of them."""
        count = torch.tensor(float(flag))
        self.sum(count)
        return bool(count)

    def share(self, index, per_row):                    # (n,) places in a block -> (m,), (m,)
        """Which of the places are this process's, whose rows are every size-th, and where it keeps them."""
        row = index // per_row
        mine = (row % self.size == self.rank).nonzero()[:, 0]
        return mine, row[mine] // self.size * per_row + index[mine] % per_row


def join():
    """The team that torchrun started; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and not dist.is_initialized():
        # gloo also moves what is on a GPU, through main memory; with one GPU for each process nccl is faster
        enough = torch.cuda.is_available() and torch.cuda.device_count() >= size
        if enough:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if enough else "gloo")
    return Team(int(os.environ.get("RANK", 0)), size)
