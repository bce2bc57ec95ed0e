"""Every architecture of a library: its names, and each as it is by default, without weights, with what it is fed."""

from contextlib import suppress

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


def _of_transformers(name: str) -> nn.Module:
    """A class with its default config, cut where that is huge, or cannot be built without weights."""
    from armour_surgery.hosts.transformers_catalog import cut_config

    whole = None
    with suppress(SchemaError):  # the default may be too large for this machine
        whole = build(Source("transformers", name))
    if whole is not None and sum(map(torch.numel, whole.parameters())) <= _HUGE:
        return whole
    try:
        return build(Source("transformers", name, cut_config(name)))
    except SchemaError:
        if whole is None:
            raise
        return whole  # its config cannot be cut


def skeleton(library: str, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The architecture on the meta device, and an example of its input.

    A model of transformers that is huge by default has two layers in every part; torchvision's detectors do not enlarge
    their images.

    Raises:
        SchemaError: the library cannot build it.
        ExampleInputError: it takes something other than images.
    """
    if library == "transformers":
        model = _of_transformers(name)
    elif library == "torchvision":
        from armour_surgery.hosts.torchvision import cheap_arguments

        model = build(Source(library, name, cheap_arguments(name)))
    else:
        model = build(Source(library, name))
    example = example_input(model)
    if max(tensor.numel() for tensor in example.values()) > _LARGE:
        example = example_input(model, 1)
    return model, example
