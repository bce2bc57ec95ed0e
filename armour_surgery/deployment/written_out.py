"""Attention that a host writes out as products and a softmax: what it scales by, what it adds, and its operands."""

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from armour_surgery.discover import result_of, value_of
from armour_surgery.discover.match import MATRIX_PRODUCTS, is_call_of, outputs_of
from armour_surgery.discover.nodes import Changes
from armour_surgery.traced import Core

__all__ = ["Term", "WrittenOut", "read_written_out"]

_MUL = {operator.mul, torch.mul, "mul"}
_DIV = {operator.truediv, torch.div, torch.true_divide, "div"}
_ADD = {operator.add, torch.add, "add"}


@dataclass(frozen=True)
class Term:
    """Something added to the logits, `factor * node`."""

    node: fx.Node
    factor: float


@dataclass(frozen=True)
class WrittenOut:
    """`softmax(scale * q k^T + sum of terms) v`: `logits` is the product, `scales` the nodes that scale it."""

    logits: fx.Node
    scale: float
    scales: tuple[fx.Node, ...]
    terms: tuple[Term, ...]
    result: fx.Node
    transposed: bool


def read_written_out(core: Core, modules: dict[str, nn.Module]) -> WrittenOut | str:
    """Read an attention core that is written out; or say what in it is more than a scale and something added."""
    logits = next((user for user in core.q.users if user in core.k.users and user.target in MATRIX_PRODUCTS), None)
    if logits is None or list(logits.args) != [core.q, core.k]:
        return "its logits are not a plain product of queries and keys"
    if _changes_type(core.node):
        return "its softmax changes the type of the logits"
    below = _descendants(logits)
    node, factor = core.node.args[0], 1.0
    scales: list[fx.Node] = []
    terms: list[Term] = []
    # Up from the softmax to the product; what is added to the logits is scaled by the factors between here and there.
    while node is not logits:
        if not isinstance(node, fx.Node) or len(node.users) != 1 or len(node.args) != 2 or node.kwargs:
            return "its logits are used for more than their softmax, or something is done to them in between"
        # A sum or product may be written either way round; the logits are what comes from the product.
        first, second = node.args
        if second in below and first not in below:
            first, second = second, first
        number = value_of(second)
        if node.target in _MUL | _DIV and isinstance(number, int | float):
            factor *= number if node.target in _MUL else 1 / number
            scales.append(node)
        elif node.target in _ADD and isinstance(second, fx.Node) and isinstance(number, torch.Tensor):
            terms.append(Term(second, factor))
        else:
            return f"its logits go through {getattr(node.target, '__name__', node.target)}"
        node = first
    result, axes = result_of(core)
    reason = _weights_alone(core.node, result, modules)
    if reason is not None:
        return reason
    # Their sizes may be read besides. A write into a part of them is a use: it takes that part out first.
    if len(outputs_of(logits)) > 1:
        return "its logits are used for more than their softmax, or something is done to them in between"
    if _written_to([core.q, core.k, *(term.node for term in terms)], logits, result):
        return "what its logits are made of is changed in place afterwards"
    if axes not in ((-2, -1), (-1, -2)) or result.target not in MATRIX_PRODUCTS:
        return "its result is not a plain product of weights and values"
    return WrittenOut(logits, factor, tuple(scales), tuple(terms), result, axes == (-1, -2))


def _written_to(operands: list[fx.Node], logits: fx.Node, result: fx.Node) -> bool:
    """Whether something writes to an operand after the product of queries and keys, and before that with values."""
    changes = Changes()
    started = False
    for node in logits.graph.nodes:
        if node is result:
            break
        started = started or node is logits
        if started:
            changes.note(node)
    return any(changes.last(operand) for operand in operands)


def _changes_type(softmax: fx.Node) -> bool:
    """Whether a softmax is told of a type, or of anything else than its input and its axis."""
    # F.softmax hands `_stacklevel` to its own warnings, and no more.
    for name, value in softmax.kwargs.items():
        if name not in ("dim", "input", "_stacklevel") and value is not None:
            return True
    return len(softmax.args) > 2


def _descendants(node: fx.Node) -> set[fx.Node]:
    descendants, queue = set(), [node]
    while queue:
        current = queue.pop()
        if current not in descendants:
            descendants.add(current)
            queue += list(current.users)
    return descendants


def _weights_alone(node: fx.Node, result: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Whether the attention weights go to the product with V only, unchanged; why not otherwise."""
    # Down from the softmax, to see that nobody else (a host that returns attention maps) needs the weights.
    while node is not result:
        if len(node.users) != 1:
            return "its attention weights are used for more than the product with values"
        node = next(iter(node.users))
        resting = node.target is F.dropout and node.kwargs.get("training", True) is False
        idle = resting or is_call_of(node, modules, nn.Dropout, nn.Identity)
        if node is not result and not idle and node.target not in ("transpose", torch.transpose):
            return f"its attention weights go through {getattr(node.target, '__name__', node.target)}"
    return None
