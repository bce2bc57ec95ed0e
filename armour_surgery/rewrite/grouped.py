"""The grouped 1x1 convolution that makes the channels of V which Q does not provide."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["GroupedProjection", "group_of_output"]


def group_of_output(channels: int, groups: int, shuffle: bool) -> torch.Tensor:
    """For each output channel of a grouped projection: which slice of the input it reads."""
    outputs = torch.arange(channels)
    return outputs % groups if shuffle else outputs // (channels // groups)


def _row_of_output(channels: int, groups: int, shuffle: bool) -> torch.Tensor:
    """For each output channel: the row of the convolution that makes it."""
    outputs = torch.arange(channels)
    group = group_of_output(channels, groups, shuffle)
    return group * (channels // groups) + outputs // groups if shuffle else outputs


class GroupedProjection(nn.Module):
    """`V_rest = [shuffle](grouped_conv1x1(x))`, with the host's own BatchNorm after it where it has one.

    Output channel i * (C / g) + t of the convolution reads the i-th of g equal slices of the input's channels. With
    `shuffle` it becomes output channel t * g + i, so that every head mixes all slices.

    Shapes: `[.., D] -> [.., C]` for `axis` -1 (tokens), `[B, D, H, W] -> [B, C, H, W]` for `axis` -3 (images).
    Source: Armour paper, section 4, last paragraph (grouped and shuffled grouped convolution).
    """

    bias: nn.Parameter | None

    def __init__(self, weight: torch.Tensor, groups: int, shuffle: bool, axis: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None)
        self.norm: _BatchNorm | None = None
        self.groups = groups
        self.shuffle = shuffle
        self.axis = axis

    @classmethod
    def from_rows(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm: _BatchNorm | None,
        norm_tensors: dict[str, torch.Tensor],
        groups: int,
        shuffle: bool,
        axis: int,
    ) -> "GroupedProjection":
        """Start from rows of a full projection: of each row, keep the entries that its group may read.

        `norm_tensors` are weight, bias and statistics, by name, of these rows in the BatchNorm `norm` that follows.
        """
        channels, width = weight.shape[0], weight.shape[1] // groups
        # Row c of the result is output channel c; the convolution makes it as its row `made[c]`.
        outputs = torch.arange(channels)
        group = group_of_output(channels, groups, shuffle)
        made = _row_of_output(channels, groups, shuffle)
        full = weight.reshape(channels, groups, width, *weight.shape[2:])
        own = full[outputs.to(weight.device), group.to(weight.device)]
        result = cls(torch.empty_like(own).index_copy_(0, made.to(own.device), own), groups, shuffle, axis)
        if norm is not None:
            fresh = type(norm)(
                channels,
                eps=norm.eps,
                momentum=norm.momentum,
                affine=norm.affine,
                track_running_stats=norm.track_running_stats,
                device=weight.device,
                dtype=weight.dtype,
            )
            for name, tensor in norm_tensors.items():
                getattr(fresh, name).data.copy_(tensor)
            if norm.num_batches_tracked is not None and fresh.num_batches_tracked is not None:
                fresh.num_batches_tracked.copy_(norm.num_batches_tracked)
            result.norm = fresh
        if bias is not None:
            result.bias = nn.Parameter(bias)
        return result

    def reads(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For each output channel: its row of `weight`, `[C]`, and the input channels that it reads, `[C, D / g]`."""
        channels, width = self.weight.shape[:2]
        group = group_of_output(channels, self.groups, self.shuffle)
        return _row_of_output(channels, self.groups, self.shuffle), group[:, None] * width + torch.arange(width)

    def extra_repr(self) -> str:
        """What the printed module shows."""
        channels, width = self.weight.shape[:2]
        return f"{width * self.groups}, {channels}, groups={self.groups}, shuffle={self.shuffle}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project; see the class."""
        tokens = self.axis == -1
        # As a convolution over one axis: tokens become a batch of length one, images one long row of pixels.
        flat = x.flatten(0, -2).unsqueeze(-1) if tokens else x.flatten(2)
        y = F.conv1d(flat, self.weight.flatten(1).unsqueeze(-1), None, groups=self.groups)
        if self.shuffle:
            y = torch.unflatten(y, 1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        if self.bias is not None:
            y = y + self.bias[:, None]
        if tokens:
            # Flattened while it is normed: a BatchNorm takes axis 1 for its channels.
            y = y.squeeze(-1)
            return torch.unflatten(self._normed(y), 0, x.shape[:-1])
        return self._normed(torch.unflatten(y, 2, x.shape[2:]))

    def _normed(self, y: torch.Tensor) -> torch.Tensor:
        if self.norm is None:
            return y
        normed: torch.Tensor = self.norm(y)
        return normed
