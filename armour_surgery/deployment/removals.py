"""Take a parameter out of a model, together with what is computed with it."""

from dataclasses import dataclass

from torch import Tensor, nn

from armour_surgery.copies import meta_copy
from armour_surgery.discover.dataflow import follow_model
from armour_surgery.errors import DiscoveryError
from armour_surgery.rewrite.edits import owner_of

__all__ = ["Removal", "do_removals", "survivors"]


@dataclass(frozen=True)
class Removal:
    """A parameter to take out. `module` is the module that does nothing else but use it, if there is one."""

    parameter: str
    module: str | None = None


def do_removals(model: nn.Module, removals: list[Removal]) -> None:
    """Put an Identity in the place of a module, or None in the place of a parameter."""
    for removal in removals:
        owner, name = owner_of(model, removal.module or removal.parameter)
        if removal.module is not None:
            setattr(owner, name, nn.Identity())
        else:
            owner.register_parameter(name, None)


def survivors(model: nn.Module, example: dict[str, Tensor], removals: list[Removal]) -> list[Removal]:
    """Those of the removals after which the model does not run, found out on a copy without weights."""
    tried = meta_copy(model)
    # A module that becomes an Identity still can be called; a parameter that becomes None may be read.
    bare = [removal for removal in removals if removal.module is None]
    do_removals(tried, bare)
    try:
        follow_model(tried, example)
    except DiscoveryError:
        return bare
    return []
