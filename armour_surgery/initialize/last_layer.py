"""The layer that ends a block (an MLP's second, mostly) as one matrix that can be watched, read and written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from armour_surgery.altered import is_plain
from armour_surgery.initialize.taps import Taps

__all__ = ["LastLayer"]


class LastLayer:
    """A Linear or a 1x1 convolution, whose weights are `[n, E]`, or `[n + 1, E]` with its bias in the last row."""

    def __init__(self, layer: nn.Module) -> None:
        self.weight = layer.get_parameter("weight")
        self.bias: Tensor | None = getattr(layer, "bias", None)

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether a layer is one product over channels (no kernel over neighbors, no groups) of weights that it has.

        Weights that are computed at every call (pruned, under weight norm) or are no plain parameters stay as they are.
        """
        if not is_plain(layer, "weight") or (getattr(layer, "bias", None) is not None and not is_plain(layer, "bias")):
            return False
        weight = layer.get_parameter("weight")
        return weight[0].numel() == weight.shape[1]

    @property
    def inputs(self) -> int:
        """How many channels go in."""
        return self.weight.shape[1]

    @property
    def bytes_per_token(self) -> int:
        """What a token's inputs and outputs take in memory."""
        return self.weight.element_size() * (self.inputs + len(self.weight))

    @contextmanager
    def watched(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Inside, what goes into the layer and comes out of it is noted, call by call."""
        seen: list[tuple[Tensor, Tensor]] = []

        def tap(source: Tensor, product: Callable[[], Tensor]) -> Tensor:
            output = product()
            seen.append((source, output))
            return output

        with Taps({self.weight: tap}):
            yield seen

    def read(self) -> Tensor:
        """The matrix in float64."""
        matrix = self.weight.detach().double().flatten(1).mT.cpu()
        if self.bias is not None:
            matrix = torch.cat([matrix, self.bias.detach().double().cpu()[None]])
        return matrix

    def write(self, matrix: Tensor) -> None:
        """Store a matrix of the same form."""
        with torch.no_grad():
            self.weight.copy_(matrix[: self.inputs].mT.reshape(self.weight.shape))
            if self.bias is not None:
                self.bias.copy_(matrix[-1])
