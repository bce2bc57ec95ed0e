"""Every architecture of a library: its names, and each as it is by default, without weights, with what it is fed."""

from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.errors import SchemaError
from armour_surgery.hosts.building import build
from armour_surgery.hosts.libraries import Library, adapter
from armour_surgery.hosts.running import example_input
from armour_surgery.records import Source

__all__ = ["architectures", "skeleton"]

# Parameters from which on a default config is cut: some need numbers to run, and these have to fit into memory.
_HUGE = 300_000_000
# Numbers of an input of two images from which on one has to do: a video, or an image of more than 512 pixels a side.
_LARGE = 2 * 3 * 512 * 512


def architectures(library: Library) -> list[str]:
    """All that the installed version has: names of timm and torchvision, and of transformers the vision classes."""
    if library != "transformers":
        return adapter(library).known_names()
    from armour_surgery.hosts.transformers_catalog import vision_classes

    return vision_classes()


def _whole(library: str, name: str, arguments: dict[str, Any]) -> nn.Module | None:
    """An architecture with all its layers; None where transformers cannot build it without weights.

    The default may be too large for this machine then.
    """
    try:
        return build(Source(library, name, arguments))
    except SchemaError:
        if library != "transformers":
            raise
        return None


def skeleton(library: str, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The architecture on the meta device, and an example of its input.

    A model of transformers that is huge by default has two layers in every part; torchvision's detectors do not enlarge
    their images.

    Raises:
        SchemaError: the library cannot build it.
        ExampleInputError: it takes something other than images.
    """
    arguments: dict[str, Any] = {}
    if library == "torchvision":
        from armour_surgery.hosts.torchvision import cheap_arguments

        arguments = cheap_arguments(name)
    model = _whole(library, name, arguments)
    if library == "transformers" and (model is None or sum(map(torch.numel, model.parameters())) > _HUGE):
        from armour_surgery.hosts.transformers_catalog import cut_config

        try:
            model = build(Source(library, name, cut_config(name)))
        except SchemaError:
            if model is None:
                raise  # else its config cannot be cut, and all of it is taken
    assert model is not None
    example = example_input(model)
    if max(tensor.numel() for tensor in example.values()) > _LARGE:
        example = example_input(model, 1)
    return model, example
