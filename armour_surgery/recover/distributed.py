"""One process or many: torchrun's environment, DDP or FSDP2 around a student, and sums over processes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from armour_surgery.devices import usable_device
from armour_surgery.initialize.processes import Processes
from armour_surgery.recover.student import Runner, blocks_of

__all__ = ["Process", "distributed", "full", "like", "no_sync", "shard", "share_weights", "wrapped"]


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is, and what it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in double precision."""
        if self.world == 1:
            return list(values)
        # Apple's GPUs have no double precision.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        tensor = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(tensor)
        return list(map(float, tensor.tolist()))

    def union(self, counts: dict[str, int]) -> dict[str, int]:
        """Counts by name, summed over all processes."""
        if self.world == 1:
            return counts
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, counts)
        total: dict[str, int] = {}
        for theirs in gathered:
            for name, count in theirs.items():
                total[name] = total.get(name, 0) + count
        return total

    def average_norms(self, model: nn.Module) -> None:
        """Give every process the mean of their running statistics (BatchNorm's)."""
        if self.world == 1:
            return
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and "running" in name:
                dist.all_reduce(buffer)
                buffer /= self.world

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def distributed(device: str = "auto", *, option: str = "run.device") -> Iterator[Process]:
    """The process that torchrun made this, or the only one; the process group ends with the block.

    `option` is how the user gives a device.

    Raises:
        UsageError: torch does not know the device, or it is not here.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    own = usable_device(device, f"{option}={device!r}")
    if own == torch.device("cuda") and world > 1:
        own = usable_device(torch.device("cuda", local), f"{option}={device!r} of process {rank}")
    if world == 1:
        yield Process(0, 1, own)
        return
    if own.type == "cuda":
        torch.cuda.set_device(own)
    # A caller's own process group is used, and left to the caller.
    owner = not dist.is_initialized()
    if owner:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield Process(rank, world, own)
    finally:
        if owner:
            dist.destroy_process_group()


def share_weights(model: nn.Module) -> None:
    """Give every process the first one's weights: some may be random (`--no-pretrained`, a new head)."""
    with Processes.together(dist.is_available() and dist.is_initialized()) as processes:
        processes.share(model)


def shard(runner: Runner, sites: Sequence[str], mlps: Sequence[str] = ()) -> None:
    """FSDP2: shard every block that holds something converted (or every child of `blocks`), then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(runner.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    modules = dict(runner.model.named_modules())
    names = blocks_of(runner.model, sites, mlps) or [name for name in modules if name.rpartition(".")[0] == "blocks"]
    # Blocks before the whole: what a block takes is no longer the rest's.
    for name in names:
        if name:
            fully_shard(modules[name], mesh=mesh)
    fully_shard(runner, mesh=mesh)


def wrapped(objective: nn.Module, process: Process, *, unused: bool) -> nn.Module:
    """The objective in DDP, where there is more than one process."""
    if process.world == 1:
        return objective
    devices = [process.device] if process.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices, find_unused_parameters=unused)


def no_sync(module: nn.Module, runner: nn.Module, last: bool) -> Any:
    """Inside, gradients are summed over processes only for the last part of an accumulated step."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    # A runner has this method once it is sharded.
    if hasattr(runner, "set_requires_gradient_sync"):
        runner.set_requires_gradient_sync(last)  # type: ignore[operator]
    return nullcontext()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP has shards of. Every process has to ask."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def like(whole: Tensor, sample: Tensor) -> Tensor:
    """A whole tensor sharded, typed and placed as `sample` is."""
    moved = whole.to(device=sample.device, dtype=sample.dtype)
    if isinstance(sample, DTensor) and whole.shape == sample.shape:
        return distribute_tensor(moved, sample.device_mesh, sample.placements)
    return moved
