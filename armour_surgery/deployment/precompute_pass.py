"""What an attention computes from its parameters alone, such as a gathered bias table, is computed once."""

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from armour_surgery.copies import alias
from armour_surgery.deployment.attention import CHANGED, NOTHING_TO_DO, AttentionGraph, Outcome
from armour_surgery.discover import SELF, guard
from armour_surgery.traced import FunctionReference

__all__ = ["precompute"]

_VIEWS = {
    "view", "reshape", "permute", "transpose", "unsqueeze", "squeeze", "flatten", "unflatten", "expand", "t", "detach",
}  # fmt: skip
_OF_ANY_INPUT = ("device", "dtype")


def precompute(state: AttentionGraph) -> Outcome:
    """Put tensors that depend on no input into buffers, which are not saved: they follow from what is.

    Views of a parameter stay as they are: they cost nothing.
    """
    constant: set[fx.Node] = set()
    for node in state.graph.nodes:
        if _is_constant(node, constant):
            constant.add(node)
    if any(map(_writes, constant)):
        return Outcome(reason="it writes into one of its own tensors")
    computed = [node for node in state.graph.nodes if node in constant and _is_worth_a_buffer(node, constant)]
    if not computed:
        return NOTHING_TO_DO
    for number, node in enumerate(computed):
        name = f"precomputed_{number}"
        for module, buffers in zip(state.modules, state.buffers, strict=True):
            own = alias(module)
            own.eval()  # timm's LeViT attention returns nothing here
            # A clone: what was computed may be a view of a parameter after all, and a buffer must not follow that.
            with torch.no_grad():
                buffers[name] = _evaluate(node, own, {}).detach().clone()
        with state.graph.inserting_before(node):
            read = state.graph.create_node("get_attr", name, (), {})
        read.meta["value"] = state.buffers[0][name].to("meta")
        node.replace_all_uses_with(read)
    state.changed = True
    return CHANGED


def _is_worth_a_buffer(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a constant node is a tensor that is computed, and that something not constant reads."""
    is_computed_tensor = node.op.startswith("call") and isinstance(node.meta["value"], Tensor)
    return is_computed_tensor and bool(node.users.keys() - constant) and not _is_view(node)


def _is_constant(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a node follows from the module alone, given that its inputs do or do not."""
    if node.op in ("placeholder", "get_attr"):
        return node.op == "get_attr" or str(node.target) == SELF
    if node.target is getattr and node.args[1] in _OF_ANY_INPUT:
        return True  # inputs and parameters are on one device and of one type
    return node.op.startswith("call") and node.target is not guard and set(node.all_input_nodes) <= constant


def _writes(node: fx.Node) -> bool:
    written = node.op == "call_method" and str(node.target).endswith("_")
    return written or node.target in (operator.setitem, operator.iadd, operator.imul)


def _is_view(node: fx.Node) -> bool:
    """Whether a node is a parameter or a buffer looked at in another shape."""
    while node.op == "call_method" and node.target in _VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr"


def _evaluate(node: fx.Node, module: nn.Module, known: dict[fx.Node, Any]) -> Any:
    """What a constant node holds, with the weights of `module`."""
    if node in known:
        return known[node]

    def pick(argument: Any) -> Any:
        if isinstance(argument, FunctionReference):
            return argument.function
        return _evaluate(argument, module, known) if isinstance(argument, fx.Node) else argument

    value: Any
    if node.op == "placeholder":
        value = module
    elif node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(module)
    elif node.target is getattr and node.args[1] in _OF_ANY_INPUT:
        # Asked of an input, which is not at hand here; its own numbers are of the same type, its indices are not.
        tensors = itertools.chain(module.parameters(), module.buffers())
        first = next(tensor for tensor in tensors if tensor.is_floating_point())
        value = getattr(first, str(node.args[1]))
    else:
        args, kwargs = fx.node.map_aggregate(node.args, pick), fx.node.map_aggregate(node.kwargs, pick)
        if node.op == "call_module":
            value = module.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    known[node] = value
    return value
