"""A softmax that is no softmax(q k^T) v: a gate, which weighs what it was made of, or attention in an unknown form."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from armour_surgery.discover.match import MATRIX_PRODUCTS, inputs_of, is_call_of, takes_softmax
from armour_surgery.discover.nodes import name_of
from armour_surgery.errors import TraceError

__all__ = ["Gate", "MadeOutside", "judge_softmax"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYER_FUNCTIONS = {F.linear, F.conv1d, F.conv2d, F.conv3d}
# With two tensors these make no scores of tokens for tokens: masks, biases and parts are put together in this way.
_NO_PRODUCTS = {
    "add", "iadd", "__iadd__", "sub", "isub", "cat", "concat", "stack", "where", "masked_fill", "masked_fill_",
    "expand_as", "view_as", "reshape_as", "type_as", "to", "maximum", "minimum", "div", "truediv", "div_", "itruediv",
}  # fmt: skip


class Gate(TraceError):
    """The softmax weighs channels, branches or positions by what one layer made of them: there is no attention."""


class MadeOutside(TraceError):
    """The softmax acts on what the module was given: only the module around it shows what that is."""


def judge_softmax(graph: fx.Graph, modules: dict[str, nn.Module]) -> TraceError:
    """Why a graph has no attention core."""
    written_out = False
    starts = [node for node in graph.nodes if takes_softmax(node, modules)]
    if not starts:
        starts = [node for node in graph.nodes if name_of(node) in ("exp", "exp_")]
        written_out = bool(starts)
    found = [_made_by(node, modules) for node in starts]
    if "product" in found:
        if written_out:
            return TraceError(
                "its softmax is written out (exp, and a division by the sum), which is not followed; write it as "
                "torch.softmax, and q k^T and the product with v as matmul, einsum or bmm"
            )
        return TraceError(
            "no softmax(q k^T) v was found in its forward; write both products as matmul, einsum or bmm, with a "
            "softmax between them, or call F.scaled_dot_product_attention"
        )
    if "argument" in found:
        return MadeOutside(
            "its softmax acts on what the module is given, and no softmax(q k^T) v was found in the modules around it"
        )
    if "layer" in found:
        return Gate("its softmax weighs what a layer made, and no product of queries and keys")
    return TraceError("no softmax(q k^T) v was found in its forward")


def _made_by(softmax: fx.Node, modules: dict[str, nn.Module]) -> str:
    """Whether what a softmax acts on comes from a `product` of two tensors, from an `argument`, or from a `layer`."""
    found = "layer"
    moving = _activations(softmax.graph)
    waiting = [source for source in inputs_of(softmax) if source in moving]
    if not waiting:
        return "constant"
    seen: set[fx.Node] = set()
    for node in waiting:  # it grows on the way
        if node in seen or node not in moving or _is_layer(node, modules, moving):
            continue
        seen.add(node)
        if node.op == "placeholder":
            found = "argument"
            continue
        sources = [source for source in inputs_of(node) if source in moving]
        # One tensor may be given twice: `torch.where(x > 0, x, y)`.
        if len(set(sources)) > 1 and name_of(node) not in _NO_PRODUCTS and node.target is not operator.getitem:
            return "product"
        waiting += sources
    return found


def _activations(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are computed from the module's inputs, and not from its parameters alone."""
    moving: set[fx.Node] = set()
    for node in graph.nodes:
        is_input = node.op == "placeholder" and isinstance(node.meta.get("value"), torch.Tensor)
        if is_input or not moving.isdisjoint(inputs_of(node)):
            moving.add(node)
    return moving


def _is_layer(node: fx.Node, modules: dict[str, nn.Module], moving: set[fx.Node]) -> bool:
    if node.target is torch.einsum or node.target in MATRIX_PRODUCTS:
        return len(inputs_of(node)) == 2 and len(moving.intersection(inputs_of(node))) == 1  # `x @ self.weight`
    # The layers of torch and their subclasses; a module of the host's own may hold more than a layer.
    return is_call_of(node, modules, *_LAYERS) or (node.op == "call_function" and node.target in _LAYER_FUNCTIONS)
