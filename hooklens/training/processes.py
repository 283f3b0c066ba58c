"""Several processes train one model: each takes its rows of the batch, and gradients are added over all of them.

Started by `torchrun --nproc-per-node 2 script.py`, whose environment variables say which process this is. The gradient
is one vector, so that one all-reduce a step replaces the buckets of DistributedDataParallel; the numbers are the same.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.batches import Batch


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is. The first one writes the files.

    >>> Processes().sum(torch.tensor(2.0)), Processes().first
    (tensor(2.), True)
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def rows(self, batch: Batch) -> Batch:
        """This process's rows of a batch."""
        if len(batch) % self.count:
            raise InputError(f"a batch of {len(batch)} rows does not split over {self.count} processes")
        each = len(batch) // self.count
        return batch.rows(self.rank * each, (self.rank + 1) * each)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            dist.barrier()


def processes(device: torch.device) -> Processes:
    """The processes that torchrun started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
        return Processes()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size())
