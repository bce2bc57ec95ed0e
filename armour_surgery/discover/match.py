"""Find the attention core in a traced graph: one fused call, or a softmax between two matrix products."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from armour_surgery.discover.nodes import value_of
from armour_surgery.errors import PostconditionError, TraceError
from armour_surgery.hosts.attention_interface import is_interface
from armour_surgery.traced import Core

__all__ = [
    "MATRIX_PRODUCTS",
    "all_above",
    "find_core",
    "find_cores",
    "inputs_of",
    "is_call_of",
    "is_tensor",
    "is_weight",
    "outputs_of",
    "projection_arguments",
    "result_of",
    "takes_softmax",
]

# Targets of fx nodes: functions as objects, methods by name.
MATRIX_PRODUCTS: set[Any] = {torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm", "__matmul__"}

# An equation, or what is added to the product, comes before the operands of these.
_AFTER_ONE = {torch.einsum, torch.baddbmm}
_SDPA = F.scaled_dot_product_attention
_SOFTMAX = {F.softmax, torch.softmax}
_OTHER_SOFTMAX = {F.log_softmax, torch.log_softmax, F.softmin}


def is_tensor(node: fx.Node) -> bool:
    """Whether a node holds a tensor (or a tuple of them), rather than a size or a module."""
    value = node.meta.get("value")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, tuple | list) and any(isinstance(item, torch.Tensor) for item in value)
    )


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node takes tensors from."""
    return list(filter(is_tensor, node.all_input_nodes))


def outputs_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that compute tensors from a node."""
    return list(filter(is_tensor, node.users))


def is_call_of(node: fx.Node, modules: dict[str, nn.Module], *classes: type[nn.Module]) -> bool:
    """Whether a node calls a module of one of these classes; `modules` are those of the traced module, by name."""
    return node.op == "call_module" and isinstance(modules[str(node.target)], classes)


def projection_arguments(node: fx.Node) -> dict[str, Any]:
    """What `F.linear` or a convolution function was given, by name, however it was passed; without further options."""
    return dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)


def _argument(node: fx.Node, index: int, name: str) -> fx.Node:
    value = node.args[index] if len(node.args) > index else node.kwargs.get(name)
    if not isinstance(value, fx.Node):
        raise TraceError(f"its attention call has no traced {name}")
    return value


def _is_matmul(node: fx.Node) -> bool:
    # A submodule may be called `matmul` too, so the kind of node counts.
    is_call = node.op in ("call_function", "call_method")
    return is_call and (node.target in MATRIX_PRODUCTS or node.target in _AFTER_ONE)


def takes_softmax(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node calls a softmax, as a function, a method or a module; that of logarithms and of minima too."""
    if node.op == "call_method":
        return node.target in ("softmax", "log_softmax")
    if node.op == "call_module":
        return isinstance(modules.get(str(node.target)), nn.Softmax | nn.Softmin | nn.Softmax2d | nn.LogSoftmax)
    return node.op == "call_function" and (node.target in _SOFTMAX or node.target in _OTHER_SOFTMAX)


def _takes_plain_softmax(node: fx.Node) -> bool:
    """Whether a node calls a softmax as a function or a method (a module is another matter)."""
    if node.op == "call_method":
        return node.target == "softmax"
    return node.op == "call_function" and node.target in _SOFTMAX


def _softmax_axis(node: fx.Node, modules: dict[str, nn.Module]) -> int | None:
    """The axis of a softmax node, counted from the end; None if it is something else."""
    if node.op == "call_module":
        module = modules.get(str(node.target))
        axis = module.dim if isinstance(module, nn.Softmax) else None
    elif _takes_plain_softmax(node):
        given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        # An axis that the host computes is a node, and unknown here.
        axis = given if isinstance(given, int) else None
    else:
        return None
    return axis - node.meta["value"].ndim if axis is not None and axis >= 0 else axis


def _product(softmax: fx.Node, neighbors: Callable[[fx.Node], list[fx.Node]]) -> fx.Node | None:
    """The matrix product that a softmax takes its logits from, or gives its weights to.

    Of the nearest ones that of two tensors, where there is one: a table of positions may be multiplied beside it
    (segment-anything), and heads may be mixed by a weight in between (CaiT).
    """
    nearest: fx.Node | None = None
    starts = [softmax]
    while starts:
        products: list[fx.Node] = []
        for start in starts:
            products += filter(_is_matmul, _nearest_first(start, neighbors))
        if not products:
            break
        nearest = nearest or products[0]
        for product in products:
            if not any(isinstance(operand, fx.Node) and is_weight(operand) for operand in _given(product)):
                return product
        starts = list(filter(_mixes_heads, products))
    return nearest


def is_weight(node: fx.Node) -> bool:
    """Whether a node is made of the module's own tensors alone."""
    return not any(above.op in ("placeholder", "call_module") for above in all_above(node))


def _mixes_heads(product: fx.Node) -> bool:
    """Whether a product is of `[.., H, N, N]` with a matrix of weights: `einsum("b h i j, h g -> b g i j", ..)`."""
    ranks = sorted(value_of(operand).ndim for operand in inputs_of(product))
    return product.target is torch.einsum and ranks[0] == 2 and ranks[-1] >= 4


def all_above(node: fx.Node) -> set[fx.Node]:
    """A node, and all nodes that its tensors are computed from."""
    above: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in above:
            above.add(current)
            waiting += inputs_of(current)
    return above


def _nearest_first(start: fx.Node, neighbors: Callable[[fx.Node], list[fx.Node]]) -> Iterator[fx.Node]:
    queue, seen = neighbors(start), set()
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        yield current
        # What lies behind a product belongs to another softmax, or to no attention at all.
        if not _is_matmul(current):
            queue += neighbors(current)


def _einsum_axes(node: fx.Node) -> tuple[str, str, str]:
    equation = node.args[0]
    if not isinstance(equation, str) or "->" not in equation or equation.count(",") != 1:
        raise TraceError(f"its einsum {equation!r} is not a product of two tensors with named axes")
    inputs, output = equation.replace(" ", "").split("->")
    first, second = inputs.split(",")
    ranks = [value_of(operand).ndim for operand in _operands(node)] + [node.meta["value"].ndim]
    first, second, output = map(_named_axes, (first, second, output), ranks)
    return first, second, output


def _named_axes(term: str, rank: int) -> str:
    """A term of an einsum with a letter for each axis that `...` stands for: the same ones, counted from the end."""
    left_out = rank - len(term.replace("...", ""))
    # einsum's own letters are lower case as a rule; `...` may stand for a few batch axes.
    return term.replace("...", "ZYXWVU"[len("ZYXWVU") - left_out :])


def _shared_axes(term: str, other: str, absent_from: str) -> list[str]:
    """The axes that two terms of an einsum have in common and a third lacks."""
    return [axis for axis in term if axis in other and axis not in absent_from]


def _given(product: fx.Node) -> tuple[Any, Any]:
    """The two operands of a product, whatever they are."""
    arguments = product.args[1:] if product.target in _AFTER_ONE else product.args
    # einsum also takes its operands as one list.
    given = arguments[0] if len(arguments) == 1 else arguments
    first, second = given[:2] if isinstance(given, tuple | list) and len(given) >= 2 else (None, None)
    return first, second


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    first, second = _given(node)
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        raise TraceError(f"its matrix product {node.name} has a constant operand")
    return first, second


def _product_axes(node: fx.Node) -> tuple[tuple[int, int], tuple[int, int]]:
    """(row, contracted) axis of the first operand and (column, contracted) axis of the second, counted from the end."""
    if node.target is not torch.einsum:
        return (-2, -1), (-1, -2)
    first, second, output = _einsum_axes(node)
    contracted = _shared_axes(first, second, output)
    rows = _shared_axes(first, output, second)
    columns = _shared_axes(second, output, first)
    if len(contracted) != 1 or not rows or not columns or min(len(rows), len(columns)) > 1:
        raise TraceError(f"its einsum {node.args[0]!r} is not a batched matrix product")
    # Where heads of one operand share the other, which lacks their axis, tokens come after heads.
    return (
        (first.index(rows[-1]) - len(first), first.index(contracted[0]) - len(first)),
        (second.index(columns[-1]) - len(second), second.index(contracted[0]) - len(second)),
    )


def _is_row_axis(product: fx.Node, axis: int) -> bool:
    """Whether output axis `axis` (from the end) of a product runs over its first operand's rows."""
    if product.target is not torch.einsum:
        return axis == -2
    first, second, output = _einsum_axes(product)
    letter = output[axis]
    return letter in first and letter not in second


def _softmax_core(node: fx.Node, axis: int) -> Core | None:
    """q and k from the product above a softmax, v from the product below it."""
    above = _product(node, inputs_of)
    below = _product(node, outputs_of)
    if above is None or below is None or axis not in (-1, -2):
        return None
    first, second = _operands(above)
    first_axes, second_axes = _product_axes(above)
    # The softmax runs over the keys: they are the second operand's columns, or the first one's rows.
    keys_are_rows = _is_row_axis(above, axis)
    q, k = (second, first) if keys_are_rows else (first, second)
    q_axes, k_axes = (second_axes, first_axes) if keys_are_rows else (first_axes, second_axes)
    left, right = _operands(below)
    left_axes, right_axes = _product_axes(below)
    # A host may write the weights first, or the values (`v @ attn.transpose(-2, -1)`).
    weights_left = _comes_from(left, node)
    if weights_left == _comes_from(right, node):
        return None
    v, v_axes = (right, right_axes) if weights_left else (left, left_axes)
    # In the product with V it is the tokens that are contracted.
    return Core("softmax", node, q, k, v, q_axes, k_axes, (v_axes[1], v_axes[0]))


def _comes_from(node: fx.Node, softmax: fx.Node) -> bool:
    """Whether a node is the softmax, or computed from it."""
    return softmax in all_above(node)


def find_cores(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[Core]:
    """The attention cores of a graph, in its order."""
    cores: list[Core] = []
    for node in graph.nodes:
        if node.op == "call_function" and (node.target is _SDPA or is_interface(node.target)):
            cores.append(_fused_core(node))
        elif is_tensor(node) and (axis := _softmax_axis(node, modules)) is not None:
            core = _softmax_core(node, axis)
            if core is not None:
                cores.append(core)
    return cores


def find_core(graph: fx.Graph, modules: dict[str, nn.Module]) -> Core | None:
    """The attention core of a graph; None where there is none.

    Raises:
        TraceError: there is more than one.
    """
    cores = find_cores(graph, modules)
    if len(cores) > 1:
        raise TraceError(f"its forward holds {len(cores)} attention cores")
    return cores[0] if cores else None


def _fused_core(node: fx.Node) -> Core:
    """The core that one call is; its operands are `[.., N, d]`."""
    # The interface takes the default function and the module before q, k and v.
    kind, start = ("interface", 2) if is_interface(node.target) else ("sdpa", 0)
    q = _argument(node, start, "query")
    k = _argument(node, start + 1, "key")
    v = _argument(node, start + 2, "value")
    return Core(kind, node, q, k, v, (-2, -1), (-2, -1), (-2, -1))


def result_of(core: Core) -> tuple[fx.Node, tuple[int, int]]:
    """The node that holds what the heads found, and its (token axis, channel axis), counted from the end."""
    if core.kind == "sdpa":
        return core.node, (-2, -1)
    if core.kind == "interface":
        # The attention functions of the interface hand back [B, N, H, d].
        return next(user for user in core.node.users if user.target is operator.getitem and user.args[1] == 0), (-3, -1)
    product = _product(core.node, outputs_of)
    if product is None:
        raise PostconditionError("an attention core was found without its product with the values")
    left, _ = _operands(product)
    weights_left = _comes_from(left, core.node)
    if product.target is torch.einsum:
        first, second, output = _einsum_axes(product)
        value = second if weights_left else first
        weights = first if weights_left else second
        channel = _shared_axes(output, value, weights)[0]
        token = _shared_axes(output, weights, value)[-1]
        return product, (output.index(token) - len(output), output.index(channel) - len(output))
    return product, (-2, -1) if weights_left else (-1, -2)
