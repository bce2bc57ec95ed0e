"""A projection in a basis in which some of its weights are the identity, and need not be stored."""

import torch
from torch import nn

__all__ = ["FixedProjection"]


class FixedProjection(nn.Module):
    """`y_h = x[start:start + d] + x[the other channels] W_h + b_h`, for every head h: a Linear whose block is given.

    `rest` is a plain Linear, and has `d` columns fewer than the projection that it stands for. All heads add the same
    block of `d` channels, which lie next to each other: a view, where single channels would have to be gathered.

    Shapes: `[.., D] -> [.., H d]`. Source: basis decomposition, arXiv 2510.01718.
    """

    def __init__(self, rest: nn.Linear, heads: int, start: int) -> None:
        super().__init__()
        self.rest = rest
        self.heads = heads
        self.width = rest.out_features // heads
        self.start = start

    def other_channels(self) -> torch.Tensor:
        """The channels of x that `rest` reads, `[D - d]`."""
        channels = torch.arange(self.rest.in_features)
        return torch.where(channels < self.start, channels, channels + self.width)

    def matrix(self) -> torch.Tensor:
        """The whole map as `[H, D + 1, d]` in float64 on the CPU, with its identity and the biases in the last rows."""
        weight = self.rest.weight.detach().double().cpu().reshape(self.heads, self.width, -1)
        whole = weight.new_zeros(self.heads, self.rest.in_features + self.width + 1, self.width)
        whole[:, self.start : self.start + self.width] = torch.eye(self.width, dtype=torch.float64)
        whole[:, self.other_channels()] = weight.mT
        if self.rest.bias is not None:
            whole[:, -1] = self.rest.bias.detach().double().cpu().reshape(self.heads, self.width)
        return whole

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"heads={self.heads}, block={self.start}:{self.start + self.width}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project; see the class."""
        block = x.narrow(-1, self.start, self.width)
        heads = self.rest(self._others(x)).unflatten(-1, (self.heads, self.width))
        # Under autocast the product is of another type than x, and the sum has to be of the product's.
        whole: torch.Tensor = heads + block.unsqueeze(-2).type_as(heads)
        return whole.flatten(-2)

    def _others(self, x: torch.Tensor) -> torch.Tensor:
        before, after = self.start, self.rest.in_features - self.start
        if not before or not after:
            # The block is at one end: a view has all the others, and nothing is copied.
            return x.narrow(-1, 0 if before else self.width, self.rest.in_features)
        return torch.cat([x.narrow(-1, 0, before), x.narrow(-1, before + self.width, after)], -1)
