"""What stands in the place of projections that the surgery took away, where transformers asks for them.

Modeling files of exported models have these functions in them, as they are written here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["placeholders", "with_placeholders", "with_stand_ins"]


def placeholders(model: nn.Module) -> dict[str, Tensor]:
    """One number for each projection that the surgery removed, under the name that its weight had.

    A stock class of transformers finds a weight of the wrong size by it, and fails; without it, it would draw one.
    """
    numbers = {}
    for fqn, module in model.named_modules():
        # The surgery leaves None where a module was.
        gone = [name for name, child in module._modules.items() if child is None]
        for name in gone:
            numbers[f"{fqn}.{name}.weight" if fqn else f"{name}.weight"] = torch.zeros(1)
    return numbers


def with_placeholders(model: nn.Module, state_dict: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a converted model's `save_pretrained` writes, given what its caller wants written (None: all)."""
    whole = dict(model.state_dict() if state_dict is None else state_dict)
    return whole | placeholders(model)


def with_stand_ins(draw: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Have weights drawn for what a file lacks, also in classes that name the projections of their attention (SigLIP).

    In the place of one that is gone they find another, of one number, which is gone again afterwards.
    """
    gone = [name for name, child in module._modules.items() if child is None]
    try:
        module._modules.update({name: nn.Linear(1, 1) for name in gone})
        return draw(module, *args, **kwargs)
    finally:
        module._modules.update(dict.fromkeys(gone))
