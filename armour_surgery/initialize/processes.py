"""Several processes that calibrate one model together: each runs its share of the batches, and sums are those of all.

All of them go through the same steps and solve the same systems, so that what they choose is one model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from armour_surgery.errors import UsageError

__all__ = ["ALONE", "Processes"]

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is; by default the only one.

    `group` is one whose sums are made on the CPU, where moments are kept.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @staticmethod
    @contextmanager
    def together(wanted: bool) -> Iterator["Processes"]:
        """All processes of torch's default group, if they are `wanted`; every one of them has to come here.

        Raises:
            UsageError: there is no such group.
        """
        if not wanted:
            yield ALONE
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise UsageError(
                "distributed=True splits the images over torch's processes, and there is no process group; call "
                "torch.distributed.init_process_group first in every process of torchrun, or leave it out"
            )
        group = dist.new_group(backend="gloo")
        try:
            yield Processes(dist.get_rank(), dist.get_world_size(), group)
        finally:
            dist.destroy_process_group(group)

    def has(self, number: int) -> bool:
        """Whether the thing of that number (a batch, say) is this process's to do."""
        return number % self.world == self.rank

    def first(self, value: _Value) -> _Value:
        """What the first process has."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def union(self, values: dict[str, float]) -> dict[str, float]:
        """What all of them have together, by name."""
        if self.world == 1:
            return values
        whole: dict[str, float] = {}
        for theirs in self.all(values):
            whole |= theirs
        return whole

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor in float64 over all processes; of one that has nothing yet, it is a plain zero."""
        if self.world == 1:
            return tensor
        shapes = self.all(tuple(tensor.shape))
        total = tensor.expand(max(shapes, key=len)).clone()
        dist.all_reduce(total, group=self.group)
        return total

    def sum_number(self, number: float) -> float:
        """The sum of a number over all processes."""
        return float(self.sum(torch.tensor(number, dtype=torch.float64)))

    def share(self, module: nn.Module) -> None:
        """Give every process the first one's weights: two kinds of processors may round differently."""
        if self.world == 1:
            return
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    there = tensor.detach().cpu().contiguous()
                    dist.broadcast(there, src=0, group=self.group)
                    tensor.copy_(there)

    def all(self, value: Any) -> Sequence[Any]:
        """What each of them has, by rank."""
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


# The only process there is.
ALONE = Processes()
