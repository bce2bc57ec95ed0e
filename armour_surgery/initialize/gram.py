"""Sums in float64 on the CPU; of `X^T X` half is kept, since it is the same on both sides of its diagonal."""

import torch
from torch import Tensor

from armour_surgery.initialize.processes import Processes

__all__ = ["Gram", "added", "nothing"]

# Rows that are multiplied, kept and sent at a time. Where inputs have no more channels, all are.
_ROWS = 512


def nothing() -> Tensor:
    """What a sum in float64 starts from; it takes the shape of what is added first."""
    return torch.zeros((), dtype=torch.float64)


def added(total: Tensor, more: Tensor) -> Tensor:
    """A sum in float64 on the CPU with one more term, in the sum's own memory once it has some."""
    return total.add_(more.cpu()) if total.ndim else more.to("cpu", torch.float64, copy=True)


class Gram:
    """`X^T X [n, n]`, summed up in float64 on the CPU as rows of blocks, each from the left up to the diagonal.

    `rows` are those. For an MLP's second layer it is by far the largest thing that a fit holds: 128 MiB for 4096
    channels in full.
    """

    def __init__(self, rows: list[Tensor] | None = None) -> None:
        self.rows = rows or []

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def __add__(self, other: "Gram") -> "Gram":
        return Gram([mine + theirs for mine, theirs in zip(self.rows, other.rows, strict=True)])

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs [T, n]`. Products are made in the inputs' own precision."""
        for place, start in enumerate(range(0, inputs.shape[1], _ROWS)):
            stop = start + _ROWS
            if place == len(self.rows):
                self.rows.append(nothing())
            self.rows[place] = added(self.rows[place], inputs[:, start:stop].mT @ inputs[:, :stop])

    def gathered(self, processes: Processes) -> "Gram":
        """The sum of all processes'; every one of them asks."""
        if processes.world == 1:
            return self
        # One that has seen nothing has to ask as often as the others do.
        count = max(processes.all(len(self.rows)))
        mine = self.rows or [nothing()] * count
        return Gram([processes.sum(row) for row in mine])

    def diagonal(self) -> Tensor:
        """`[n]`"""
        return torch.cat([row.diagonal(row.shape[1] - row.shape[0]) for row in self.rows])

    def times(self, matrix: Tensor) -> Tensor:
        """`X^T X matrix` for `matrix [n, E]`."""
        product = torch.zeros_like(matrix)
        stop = 0
        for row in self.rows:
            start, stop = stop, stop + len(row)
            product[start:stop] += row @ matrix[:stop]
            product[:start] += row[:, :start].mT @ matrix[start:stop]
        return product

    def lower(self, place: torch.device) -> Tensor:
        """A new `[n, n]` on `place` that is right on and below its diagonal; its columns lie one after the other.

        So a factorization has it in the form that it needs, and makes no copy of it.
        """
        size = len(self)
        whole = torch.zeros(size, size, dtype=torch.float64, device=place).mT
        stop = 0
        for row in self.rows:
            start, stop = stop, stop + len(row)
            whole[start:stop, :stop] = row.to(place)
        return whole

    def dense(self) -> Tensor:
        """All of it, `[n, n]`."""
        lower = self.lower(torch.device("cpu")).tril()
        return lower + lower.tril(-1).mT
