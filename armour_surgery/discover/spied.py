"""How a tracer sees what a copied module reads off itself, and that it is called."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

__all__ = ["spy", "structure_of"]

# A flag that tells torch's layers how the weights lie, which is what surgery changes; a forward needs none of it then.
_LAYOUT_FLAG = "_qkv_same_embed_dim"


def spy(
    module: nn.Module,
    read: Callable[[nn.Module, str, bool | float], Any],
    structure: Callable[[nn.Module, str, Any], None],
    called: Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
    **members: Any,
) -> None:
    """Let `read` hand out the flags and factors of a copied module, and `called` do its calls; `members` are others.

    `structure` is told which whole numbers are read off it.
    """
    host = type(module)
    states_sizes = _states_sizes(host)

    def get(self: nn.Module, name: str) -> Any:
        value = host.__getattribute__(self, name)
        if name == _LAYOUT_FLAG or name not in object.__getattribute__(self, "__dict__"):
            return value
        # Flags and factors (`training`, `scale`, dropout's `p`) may be set to something else later on. Whole numbers
        # state the structure, and what was traced holds for them alone (timm's `set_input_size` changes windows).
        if type(value) in (bool, float):
            return read(self, name, value)
        if not states_sizes and _is_whole(value):
            structure(self, name, value)
        return value

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return called(self, partial(host.__call__, self), args, kwargs)

    # Python looks these up on the class, never on the object: each copied module gets a class of its own.
    members |= {"__getattribute__": get, "__call__": call, "__module__": host.__module__}
    object.__setattr__(module, "__class__", type(host.__name__, (host,), members))


def structure_of(module: nn.Module) -> dict[str, Any]:
    """The whole numbers, and tuples of them, that are written on a module of a host's."""
    return {} if _states_sizes(type(module)) else {name: held for name, held in vars(module).items() if _is_whole(held)}


def _is_whole(value: Any) -> bool:
    return type(value) is int or (type(value) is tuple and all(type(item) is int for item in value))


def _states_sizes(kind: type[nn.Module]) -> bool:
    # The numbers on torch's layers are the sizes of their weights, which surgery changes.
    return any(owner.__module__.startswith("torch.nn.") for owner in kind.__mro__ if owner is not nn.Module)
