"""The libraries that models come from, which of them a model is of, and what each adapter has to know."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from armour_surgery.records import Source

__all__ = ["LIBRARIES", "OWN", "Adapter", "Library", "adapter", "is_users_class", "library_of"]

Library = Literal["transformers", "timm", "torchvision"]
# transformers first: its TimmWrapper models are transformers' to build, whatever they hold.
LIBRARIES: tuple[Library, ...] = ("transformers", "timm", "torchvision")
# The `library` of a Source that none of them can build: only the user has the code.
OWN = "own"


class Adapter(Protocol):
    """All that is known about one library: the public functions of `hosts/timm.py` and the modules beside it."""

    def owns(self, model: nn.Module) -> bool:
        """Whether a model is this library's."""

    def known_names(self) -> list[str]:
        """What this version of the library can build without fetching anything."""

    def load(
        self, name: str, *, pretrained: bool, checkpoint: str | Path | None, sizes: Mapping[str, Any]
    ) -> tuple[nn.Module, Source]:
        """The model of that name in the library's own grammar, and how to build it again.

        `sizes` holds those of img_size, num_classes and in_chans that were asked for, by these names, and whatever
        else of the builder's arguments (for transformers: of the config) was.

        Raises:
            UsageError: the builder does not take one of them.
        """

    def source_of(self, model: nn.Module, arguments: Mapping[str, Any]) -> Source:
        """How to build such a model, read off it; `arguments` win over that. Nothing is verified.

        Raises:
            ModelError: the model does not say what it is.
        """

    def build(self, architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
        """A model without weights, for a registered name and arguments that fetch nothing.

        Raises:
            SchemaError: the name is not registered, or an argument may not be given.
        """

    def example(self, model: nn.Module) -> Mapping[str, tuple[tuple[int, ...], torch.dtype] | torch.Tensor]:
        """Name, shape without batch, and type of what `forward` takes; or what one image adds to the first axis.

        Raises:
            ExampleInputError: the model takes something other than images.
        """


def library_of(model: nn.Module) -> Library | None:
    """timm, transformers or torchvision, by the class of the model; None for any other."""
    for library in LIBRARIES:
        # A library that was never imported has no instances, and must not be imported to find that out.
        if library in sys.modules and adapter(library).owns(model):
            return library
    return None


def is_users_class(model: nn.Module) -> bool:
    """Whether the class of a model is in none of the libraries, though it may derive from one of theirs."""
    return type(model).__module__.partition(".")[0] not in LIBRARIES


def adapter(library: Library) -> Adapter:
    """All that is known about one library; imports it."""
    if library == "transformers":
        from armour_surgery.hosts import transformers

        return transformers
    if library == "timm":
        from armour_surgery.hosts import timm

        return timm
    from armour_surgery.hosts import torchvision

    return torchvision
