"""Several processes that train one network together, as `torchrun` starts them.

Every process draws the same whole batch and takes its own part of it; the gradients of all are added up. So
each step is that of a single process, but for the order in which numbers are added.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; alone by default."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """The one that writes files and prints."""
        return self.rank == 0

    def part(self, size: int) -> slice:
        """This process's share of a batch of `size`; sizes differ by one at most."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def add(self, totals: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            distributed.all_reduce(totals)
        return totals

    def join(self, network: nn.Module) -> nn.Module:
        """`network`, with its gradients averaged over all processes."""
        if self.count == 1:
            return network
        on_gpu = next(network.parameters()).is_cuda
        if on_gpu:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return DistributedDataParallel(network, device_ids=[torch.cuda.current_device()] if on_gpu else None)


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """The processes that `torchrun` started, connected by NCCL on GPUs, else by Gloo; or this one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()
