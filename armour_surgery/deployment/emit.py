"""The module that a deployed attention becomes: an instance of a subclass of its own class, with another forward."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn
from torch._compile import _disable_dynamo

from armour_surgery.copies import alias
from armour_surgery.rewrite import Generated, Variant, answers_of, generated_class, taking_nested, write_forward

__all__ = ["DeployedAttention", "make_deployed_class"]

# Globals of the generated code; no argument of a host is called so.
_HOST = "_host_class"
_HOSTS_OWN = "_hosts_own"


class DeployedAttention(Generated):
    """What every deployed attention has besides its host's class: the source of its forward."""

    to_keep = (
        "its class was made in this process. Keep the model that deploy() was given, and deploy it in each process"
    )
    deployed_source: ClassVar[str]

    @property
    def code(self) -> str:
        """The generated forward, as it runs."""
        return type(self).deployed_source


def make_deployed_class(
    host: type[nn.Module], variant: Variant, undo: tuple[Callable[[nn.Module], None], ...] = ()
) -> type[nn.Module]:
    """A subclass of `host` with a forward for the call that `variant` was traced from.

    Another kind of call goes to the host's own forward. Where its weights are no longer those that this forward needs,
    it runs on a copy, on which `undo` made them so: right, and no faster than it was.
    """
    conditions = variant.conditions
    # Norms and dropout were folded away as they are at rest, whether or not the traced code asked for the mode.
    if "not self.training" not in conditions:
        conditions = (*conditions, "not self.training")
    branch = Variant(variant.header, conditions, variant.body, variant.objects)

    # Not kept: weights put back would take memory, and would not follow the model to another device or type.
    @_disable_dynamo
    def hosts_own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = alias(module)
        object.__setattr__(own, "__class__", host)
        for step in undo:
            step(own)
        return host.forward(own, *args, **kwargs)

    name = f"Deployed{host.__name__}"
    otherwise = f"{_HOSTS_OWN}(self, {{}})" if undo else f"{_HOST}.forward(self, {{}})"
    scope = {_HOST: host, _HOSTS_OWN: hosts_own}
    members: dict[str, Any] = {
        "__module__": host.__module__,
        "__doc__": f"{host.__name__} for inference. Only forward differs; `print(module.code)` shows it.",
    }
    if undo:
        members |= answers_of(host)
    cls = generated_class(name, DeployedAttention, host, members)
    cls.deployed_source, forward = write_forward([branch], f"<deployed {name} {id(cls):x}>", otherwise, scope)
    cls.forward = taking_nested(forward, host)
    return cls
