"""Projections without a layer, written as `F.linear`: `x @ W`, `torch.matmul(x, W)`, `torch.einsum(.., x, W)`.

Whatever follows knows one form of a projection. The weight stays as it is stored; the graph turns it at every call.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from armour_surgery.discover.match import is_tensor
from armour_surgery.discover.nodes import Changes

__all__ = ["take_biases_apart", "write_as_linear"]

_PRODUCTS: set[Any] = {torch.matmul, operator.matmul, "matmul", "__matmul__"}


@dataclass(frozen=True)
class _Product:
    """A product with a parameter: `outputs` are the weight's axes that stay, `inner` the one that is summed over.

    The result's axes are those of `[.., outputs]` in the given `order`.
    """

    tokens: fx.Node
    weight: fx.Node
    outputs: tuple[int, ...]
    inner: int
    order: tuple[int, ...]


def write_as_linear(graph: fx.Graph) -> None:
    """Rewrite, in place, every product of tokens with a parameter of the module's own; the numbers stay the same."""
    for node in list(graph.nodes):
        product = _product(node)
        if product is None:
            continue
        weight, outputs = product.weight, product.outputs
        sizes = [weight.meta["value"].shape[axis] for axis in outputs]
        with graph.inserting_before(node):
            # [out, in]: the axes of the outputs, and the one that is summed over.
            turned = _call(graph, "permute", weight, (*outputs, product.inner))
            if len(outputs) > 1:
                turned = _call(graph, "flatten", turned, (0, len(outputs) - 1))
            result = graph.call_function(F.linear, (product.tokens, turned))
            result.meta["value"] = F.linear(product.tokens.meta["value"], turned.meta["value"])
            if len(outputs) > 1:
                result = _call(graph, "unflatten", result, (-1, tuple(sizes)))
            if list(product.order) != sorted(product.order):
                result = _call(graph, "permute", result, product.order)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def take_biases_apart(graph: fx.Graph) -> None:
    """Let every `F.linear` read its bias itself, in place, where it is cut out of biases that were joined for that.

    CLIP's attention pool hands its three biases over in one tensor, as `F.multi_head_attention_forward` asks for them.
    """
    changes = Changes()
    for node in graph.nodes:
        changes.note(node)
    for node in list(graph.nodes):
        if node.target is not F.linear:
            continue
        given = node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)
        part = _joined_part(given) if isinstance(given, fx.Node) else None
        # What is written to is not what was joined.
        if part is not None and not changes.last(given):
            given.replace_all_uses_with(part)  # its shape is read too
            _erase_unread(graph, given)


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nobody reads any more, and what it was made of: it would be taken for one that acts."""
    if node.users or node.op == "get_attr":
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        _erase_unread(graph, source)


def _joined_part(node: fx.Node) -> fx.Node | None:
    """The one tensor of a concatenation that a view of it holds; None for anything else."""
    joined = node
    while joined.target not in (torch.cat, torch.concat):
        source = joined.args[0] if joined.args else None
        if not isinstance(source, fx.Node):
            return None
        joined = source
    held, whole = node.meta["value"], joined.meta["value"]
    parts = joined.args[0]
    if not isinstance(parts, tuple | list) or node is joined or held.ndim != 1 or whole.ndim != 1:
        return None
    if held.untyped_storage()._cdata != whole.untyped_storage()._cdata or held.stride() != whole.stride():
        return None
    start = 0
    for part in parts:
        if not isinstance(part, fx.Node):
            return None
        if start == held.storage_offset() and part.meta["value"].shape == held.shape:
            return part
        start += part.meta["value"].numel()
    return None


def _call(graph: fx.Graph, method: str, source: fx.Node, arguments: tuple[Any, ...]) -> fx.Node:
    node = graph.call_method(method, (source, *arguments))
    node.meta["value"] = getattr(source.meta["value"], method)(*arguments)
    return node


def _product(node: fx.Node) -> _Product | None:
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is torch.einsum:
        return _einsum(node)
    if node.target not in _PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    tokens, weight = node.args
    if not isinstance(tokens, fx.Node) or not isinstance(weight, fx.Node) or not _are_factors(tokens, weight):
        return None
    if weight.meta["value"].ndim != 2:
        return None
    return _Product(tokens, weight, (1,), 0, tuple(range(tokens.meta["value"].ndim)))


def _einsum(node: fx.Node) -> _Product | None:
    if len(node.args) != 3:
        return None
    equation, tokens, weight = node.args
    if not isinstance(tokens, fx.Node) or not isinstance(weight, fx.Node) or not _are_factors(tokens, weight):
        return None
    if not isinstance(equation, str):
        return None
    given, arrow, output = equation.replace(" ", "").partition("->")
    first, _, second = given.partition(",")
    inner = first[-1:]
    outputs = [letter for letter in second if letter != inner]
    if not arrow or "." in equation or inner not in second or inner in output or inner in first[:-1]:
        return None
    # Each letter once, or it is a diagonal; and none of the weight's is one of the tokens'.
    made = [*first[:-1], *outputs]
    if len(set(made)) != len(made) or sorted(made) != sorted(output) or second.count(inner) != 1:
        return None
    axes = tuple(second.index(letter) for letter in outputs)
    return _Product(tokens, weight, axes, second.index(inner), tuple(made.index(letter) for letter in output))


def _are_factors(tokens: fx.Node, weight: fx.Node) -> bool:
    return is_tensor(tokens) and tokens.op != "get_attr" and weight.op == "get_attr" and is_tensor(weight)
