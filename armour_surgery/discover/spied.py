"""How a tracer sees what a copied module reads off itself, and that it is called."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

__all__ = ["spy"]

# A flag that tells torch's layers how the weights lie, which is what surgery changes; a forward needs none of it then.
_LAYOUT_FLAG = "_qkv_same_embed_dim"


def spy(
    module: nn.Module,
    read: Callable[[nn.Module, str, bool | float], Any],
    called: Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
    **members: Any,
) -> None:
    """Let `read` hand out the flags and factors of a copied module, and `called` do its calls; `members` are others."""
    host = type(module)

    def get(self: nn.Module, name: str) -> Any:
        value = host.__getattribute__(self, name)
        # Flags and factors (`training`, `scale`, dropout's `p`) may be set to something else later on; whole numbers
        # state the structure, which is what was traced.
        if name != _LAYOUT_FLAG and type(value) in (bool, float) and name in object.__getattribute__(self, "__dict__"):
            return read(self, name, value)
        return value

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return called(self, partial(host.__call__, self), args, kwargs)

    # Python looks these up on the class, never on the object: each copied module gets a class of its own.
    members |= {"__getattribute__": get, "__call__": call, "__module__": host.__module__}
    object.__setattr__(module, "__class__", type(host.__name__, (host,), members))
