"""Every architecture of a library: its names, and each as it is by default, without weights, with what it is fed."""

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


def skeleton(library: str, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The architecture on the meta device, and an example of its input.

    A model of transformers that is huge by default has two layers in every part.

    Raises:
        SchemaError: the library cannot build it.
        ExampleInputError: it takes something other than images.
    """
    try:
        model = build(Source(library, name))
        cut = sum(parameter.numel() for parameter in model.parameters()) > _HUGE
    except SchemaError:
        # Of what cannot be built weightless the default may be too large for this machine.
        if library != "transformers":
            raise
        cut = True
    if cut and library == "transformers":
        from armour_surgery.hosts.transformers_catalog import cut_config

        model = build(Source(library, name, cut_config(name)))
    example = example_input(model)
    if max(tensor.numel() for tensor in example.values()) > _LARGE:
        example = example_input(model, 1)
    return model, example
