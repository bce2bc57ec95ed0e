"""The libraries that models come from, and which of them a model is of."""

import importlib
import sys
from types import ModuleType

from torch import nn

__all__ = ["adapter", "library_of"]

# transformers first: its TimmWrapper models are transformers' to build, whatever they hold.
LIBRARIES = ("transformers", "timm", "torchvision")


def library_of(model: nn.Module) -> str | None:
    """timm, transformers or torchvision, by the class of the model; None for any other."""
    for library in LIBRARIES:
        # A library that was never imported has no instances, and must not be imported to find that out.
        if library in sys.modules and adapter(library).owns(model):
            return library
    return None


def adapter(library: str) -> ModuleType:
    """All that is known about one library; imports it."""
    return importlib.import_module(f"armour_surgery.hosts.{library}")
