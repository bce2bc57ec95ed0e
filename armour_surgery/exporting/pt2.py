"""torch.export's own format: a .pt2 that torch loads without the code of the model."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.discover.dataflow import tensors_in
from armour_surgery.exporting.comparison import Inputs
from armour_surgery.exporting.graphs import free_axes, traced

__all__ = ["load_pt2", "write_pt2"]

_FILE = "armour_surgery.json"


def write_pt2(model: nn.Module, inputs: Inputs, path: Path, origin: dict[str, Any], *, any_size: bool) -> None:
    """Write a model's graph and weights, for any batch size.

    Raises:
        ExportError: torch cannot follow the model.
    """
    axes = free_axes(inputs, any_size=any_size)
    program = traced(
        model, "torch.export", lambda: torch.export.export(model, (), kwargs=inputs, dynamic_shapes=axes, strict=False)
    )
    torch.export.save(program, path, extra_files={_FILE: json.dumps(origin)})


def load_pt2(path: Path) -> Callable[[Inputs], list[Tensor]]:
    """A function that runs the file."""
    with warnings.catch_warnings():
        # torch 2.9 warns of memory that it maps itself, and does not write to.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        module = torch.export.load(path).module()

    def loaded(inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return tensors_in(module(**inputs))

    return loaded
