"""What nodes of a traced graph hold, and how generated code names what they stand for."""

import operator
import re
from typing import Any

import torch
from torch import fx

from armour_surgery.traced import FunctionReference

__all__ = ["SELF", "Changes", "attribute_of", "changed_by", "guard", "name_of", "value_of"]

_IN_PLACE = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv}
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


def name_of(node: fx.Node) -> str:
    """What the method or the function that a node calls is called."""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def changed_by(node: fx.Node) -> torch.Tensor | None:
    """The tensor that a node changes in place, as it was in the recorded call."""
    target = str(node.target)
    method = node.op == "call_method" and target.endswith("_") and not target.endswith("__")
    if not (method or node.target in _IN_PLACE or node.kwargs.get("inplace") is True):
        return None
    value = value_of(node.args[0])
    return value if isinstance(value, torch.Tensor) else None


class Changes:
    """What was written to in place so far, while one goes through a graph in its order."""

    def __init__(self) -> None:
        self._last: dict[int, str] = {}

    def note(self, node: fx.Node) -> None:
        """Go on past a node."""
        written = changed_by(node)
        if written is not None:
            self._last[written.untyped_storage()._cdata] = node.name

    def last(self, node: fx.Node) -> str:
        """The name of what last wrote to the memory that a node holds; empty if nothing did."""
        value = node.meta.get("value")
        return self._last.get(value.untyped_storage()._cdata, "") if isinstance(value, torch.Tensor) else ""


def attribute_of(path: str, name: str) -> str:
    """How generated code reads an attribute of a submodule: `self.blocks[1].attn.training`."""
    # `self.blocks.1.attn` is a name of PyTorch's and no Python.
    return re.sub(r"\.(\d+)(?=\.)", r"[\1]", f"self.{path}.{name}" if path else f"self.{name}")
