"""A host in double precision, and how far off a deployed one is."""

from functools import cache

import torch
from oracle import outputs, relative_error
from tiny_hosts import CASES
from torch import nn

from armour_surgery import convert

__all__ = ["double", "worst"]


@cache
def double(name: str, converted: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny host in float64, in eval mode, and what deployments are shown."""
    case = CASES[name]
    model = case.build(torch.float64)
    example = {key: value.double() for key, value in case.example().items()}
    if converted:
        model = convert(model, example_input=example)
        model.eval()
    return model, example


def worst(name: str, model: nn.Module, deployed: nn.Module) -> float:
    """The largest relative error over the host's batches and image sizes."""
    with torch.no_grad():
        return max(
            relative_error(outputs(model, batch), outputs(deployed, batch))
            for batch in CASES[name].batches(torch.float64)
        )
