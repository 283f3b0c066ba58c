"""Several processes train one model: each takes its rows of the batch, and gradients are added over all of them.

Started by `torchrun --nproc-per-node 2 script.py`, whose environment variables say which process this is. The gradient
is one vector, so that one all-reduce a step replaces the buckets of DistributedDataParallel; the numbers are the same.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hooklens.core.errors import InputError
from hooklens.data.batches import Batch


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is. The first one reads and writes the files.

    >>> Processes().sum(torch.tensor(2.0)), Processes().first
    (tensor(2.), True)
    """

    rank: int = 0
    count: int = 1
    device: Any = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process reads and writes files and shows progress."""
        return self.rank == 0

    def first_row(self, n_rows: int) -> int:
        """The first of this process's rows of a batch."""
        if n_rows % self.count:
            raise InputError(
                f"a batch of {n_rows} rows does not split over {self.count} processes; give a batch that is a "
                f"multiple of {self.count}"
            )
        return self.rank * (n_rows // self.count)

    def rows(self, batch: Batch) -> Batch:
        """This process's rows of a batch."""
        start = self.first_row(len(batch))
        return batch.rows(start, start + len(batch) // self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def copy_first(self, *tensors: Tensor) -> None:
        """Give every process the tensors of the first one, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def numbers_of_first(self, numbers: Sequence[float]) -> list[float]:
        """The numbers that the first process passes; all pass equally many."""
        sent = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.copy_first(sent)
        return sent.tolist()

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether some process raises it: what all processes decide alike."""
        if self.count == 1:
            return list(flags)
        return [n > 0 for n in self.sum(torch.tensor([float(flag) for flag in flags], device=self.device)).tolist()]


def join_processes(model: nn.Module) -> Processes:
    """The processes that torchrun started, or this one alone. Where they share GPUs, each takes its own."""
    device = next(model.parameters()).device
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
        return Processes(device=device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        model.to(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), device)
