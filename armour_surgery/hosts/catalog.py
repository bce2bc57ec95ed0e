"""Every architecture of a library: its names, and each as it is by default, without weights, with what it is fed."""

from torch import Tensor, nn

from armour_surgery.hosts.building import build
from armour_surgery.hosts.libraries import Library, adapter
from armour_surgery.hosts.running import example_input
from armour_surgery.records import Source

__all__ = ["architectures", "skeleton"]


def architectures(library: Library) -> list[str]:
    """The names of all architectures that the installed version has."""
    return adapter(library).known_names()


def skeleton(library: Library, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The architecture on the meta device, and an example of its input.

    Raises:
        SchemaError: the library cannot build it.
        ExampleInputError: it takes something other than images.
    """
    model = build(Source(library, name))
    return model, example_input(model)
