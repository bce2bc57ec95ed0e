"""What all formats that hold a graph have in common: which axes may have other sizes, and how tracing fails."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from armour_surgery.errors import ExportError
from armour_surgery.examples import images_in
from armour_surgery.exporting.comparison import Inputs

__all__ = ["BATCH", "free_axes", "traced"]

# What the axis of images is called in a graph.
BATCH = "batch"

T = TypeVar("T")


def free_axes(inputs: Inputs, *, any_size: bool) -> dict[str, dict[int, object]]:
    """The axes of every argument that are not fixed: the batch, and with `any_size` height and width of images."""
    image = images_in(inputs)
    count = inputs[image].shape[0] if image else max(len(value) for value in inputs.values() if value.ndim)
    axes: dict[str, dict[int, object]] = {}
    for name, value in inputs.items():
        axes[name] = {}
        if value.ndim and value.shape[0] == count:
            axes[name][0] = torch.export.Dim(BATCH)
        if any_size and name == image:
            # By themselves: a host may want multiples of its patch.
            axes[name] |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    return axes


def traced(model: nn.Module, what: str, follow: Callable[[], T]) -> T:
    """What `follow` makes of a model.

    Raises:
        ExportError: torch cannot follow the model; the message begins as torch's own does.
    """
    try:
        return follow()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = next((line for line in str(cause).strip().splitlines() if line.strip()), "")
        raise ExportError(
            f"torch could not follow {type(model).__name__} into {what}: {type(cause).__name__}: {first[:300]}. Try "
            "the original model the same way: if that fails too, its forward is what cannot be exported"
        ) from error
