"""What nodes of a traced graph hold, and how generated code names what they stand for."""

import re
from typing import Any

from torch import fx

from armour_surgery.traced import FunctionReference

__all__ = ["SELF", "attribute_of", "guard", "value_of"]

SELF = "_self"  # the placeholder that stands for the module itself; emitted code calls it `self`


def guard(value: Any, expected: Any) -> None:
    """Marks, in a graph, that tracing relied on `value == expected`. Emitted as an `if`; never called."""
    raise AssertionError("guards are emitted, not called")


def value_of(argument: Any) -> Any:
    """Replace every node (or proxy) in a nested argument by the value it had in the recorded call."""
    if isinstance(argument, fx.Proxy):
        argument = argument.node
    if isinstance(argument, fx.Node):
        return argument.meta["value"]
    if isinstance(argument, FunctionReference):
        return argument.function
    if isinstance(argument, slice):
        return slice(value_of(argument.start), value_of(argument.stop), value_of(argument.step))
    if isinstance(argument, tuple | list):
        # fx keeps its own immutable kinds of list and tuple; functions want the plain ones.
        items = list(map(value_of, argument))
        return items if isinstance(argument, list) else tuple(items)
    if isinstance(argument, dict):
        return {key: value_of(item) for key, item in argument.items()}
    return argument


def attribute_of(path: str, name: str) -> str:
    """How generated code reads an attribute of a submodule: `self.blocks[1].attn.training`."""
    # `self.blocks.1.attn` is a name of PyTorch's and no Python.
    return re.sub(r"\.(\d+)(?=\.)", r"[\1]", f"self.{path}.{name}" if path else f"self.{name}")
