"""Stored batches: which of them are held out, and how much each of their tokens counts."""

from collections.abc import Iterator

import torch
from torch import Tensor

from armour_surgery.initialize.processes import ALONE, Processes
from armour_surgery.measure.fidelity import Answer
from armour_surgery.measure.token_error import token_weights

__all__ = ["HELD_OUT", "Batches"]

# Of every so many batches the last is held out; of fewer, the last of all.
HELD_OUT = 8
# Batches on which alternatives are compared; of those held out, half as many.
_TRIAL = 4


class Batches:
    """Stored batches of both models, and which of them are held out.

    Sizes are those of all batches; where several processes calibrate together, each goes through its own.
    """

    def __init__(self, sizes: list[int], images: dict[int, Tensor], processes: Processes = ALONE) -> None:
        self.sizes = sizes
        self.processes = processes
        self.first = processes.rank  # the first batch that is here
        self.kept: list[Tensor] = []
        self.wanted: list[Answer] = []  # what the original makes of these
        self.images = images  # one batch of each size: only its shape matters from the second unit on
        # With fewer batches than that, the last one is held out all the same.
        every = min(HELD_OUT, len(sizes))
        self.held_out = [index % every == every - 1 for index in range(len(sizes))]
        self.learned: Tensor | None = None  # which tokens the first site gets whatever the image shows

    def weights(self, count: int) -> Tensor | None:
        """How much each of an image's `count` tokens counts, `[count, 1]`; None if all count alike."""
        if self.learned is None or len(self.learned) != count:
            return None
        return token_weights(self.learned)[:, None]

    def thinned(self, shape: torch.Size, offset: int, stride: int) -> tuple[Tensor, Tensor | None]:
        """Every so-many-th of the tokens `[B, N]` and all learned ones: places among `B * N`, and weights."""
        images, count = shape
        weights = self.weights(count)
        if weights is None or self.learned is None:
            return torch.arange(offset, images * count, stride), None
        places = torch.arange(images * count).reshape(shape)
        others = places[:, ~self.learned].flatten()[offset::stride]
        learned = places[:, self.learned].flatten()
        # One of the others stands for `stride` of them, and a learned token for itself.
        of_learned = weights[self.learned].repeat(images, 1) / stride
        return torch.cat([others, learned]), torch.cat([torch.ones(len(others), 1), of_learned])

    def __iter__(self) -> Iterator[tuple[int, Tensor, bool]]:
        for index, size in enumerate(self.sizes):
            if self.processes.has(index):
                yield index, self.images[size], self.held_out[index]

    def trial(self) -> Iterator[tuple[int, Tensor, bool]]:
        """A few batches of each kind."""
        fitted = [place for place, held in enumerate(self.held_out) if not held]
        judging = [place for place, held in enumerate(self.held_out) if held]
        few = {*fitted[:_TRIAL], *judging[: _TRIAL // 2]}
        for index, image, held in self:
            if index in few:
                yield index, image, held
