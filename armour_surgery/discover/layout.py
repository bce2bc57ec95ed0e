"""Where channels go: push indices through layout operations in place of activations.

Every element of a producer's output gets its own number; views, permutations, splits and slices then say by
themselves which of them end up where.
"""

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from armour_surgery.discover.match import inputs_of, is_tensor
from armour_surgery.discover.trace import value_of
from armour_surgery.traced import Layout

__all__ = ["Flow", "find_layout", "follow", "is_cast"]

_METHODS = {
    "view", "reshape", "permute", "transpose", "contiguous", "chunk", "split", "unbind", "flatten", "unflatten",
    "squeeze", "unsqueeze", "select", "narrow", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "clone", "view_as",
    "reshape_as", "__getitem__", "tensor_split", "detach",
}  # fmt: skip
# These change a number's format but not where it is.
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_FUNCTIONS = {
    operator.getitem, torch.reshape, torch.permute, torch.transpose, torch.chunk, torch.split, torch.unbind,
    torch.flatten, torch.squeeze, torch.unsqueeze, torch.select, torch.narrow, torch.movedim, torch.moveaxis,
    torch.swapaxes, torch.swapdims, torch.t, torch.clone, torch.tensor_split,
}  # fmt: skip
_VIEWS = {"T", "mT", "H", "mH"}


class Flow(dict[fx.Node, Any]):
    """Node -> the numbers of the producer's elements that it holds, in place.

    `pure` are the nodes that layout alone leads to. At the others something acted on the values (a norm, a rotation, a
    scale), element by element as far as positions go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pure: set[fx.Node] = set()


def is_cast(node: fx.Node) -> bool:
    """Whether a node changes the format of numbers and nothing else."""
    return node.op == "call_method" and node.target in _CASTS


def _is_layout(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METHODS
    if node.op == "call_function":
        return node.target in _FUNCTIONS or (node.target is getattr and node.args[1] in _VIEWS)
    return False


def _apply(node: fx.Node, flow: Flow) -> Any:
    """Do a layout operation on the numbers."""

    def pick(argument: Any) -> Any:
        return flow[argument] if argument in flow else value_of(argument)

    args = [pick(node.args[0]), *value_of(tuple(node.args[1:]))]
    if node.target in ("view_as", "reshape_as"):
        return args[0].reshape(args[1].shape)
    if node.target == "view":
        node_target: Any = "reshape"
    else:
        node_target = node.target
    if node.op == "call_method":
        return getattr(args[0], node_target)(*args[1:], **value_of(node.kwargs))
    return node_target(*args, **value_of(node.kwargs))


def _same_shape_input(node: fx.Node, flow: Flow) -> fx.Node | None:
    """The input whose positions an operation keeps: the first with numbers and the output's own shape."""
    shape = getattr(node.meta["value"], "shape", None)
    for source in inputs_of(node):
        if source in flow and isinstance(flow[source], torch.Tensor) and flow[source].shape == shape:
            return source
    return None


def follow(
    graph: fx.Graph,
    producer: fx.Node,
    barriers: Collection[fx.Node] = (),
    transparent: Collection[fx.Node] = (),
) -> Flow:
    """Number the producer's output elements and follow them through the graph.

    `barriers` are other producers: what passes through them is no longer this one's output. `transparent` nodes count
    as layout: they act on each channel for itself, and whoever moves the channels takes care of them.
    """
    flow = Flow()
    shape = producer.meta["value"].shape
    flow[producer] = torch.arange(shape.numel()).reshape(shape)
    flow.pure.add(producer)
    started = False
    for node in graph.nodes:
        if node is producer:
            started = True
            continue
        if not started or not is_tensor(node) or node in barriers or node.op == "output":
            continue
        sources = [source for source in inputs_of(node) if source in flow]
        if not sources:
            continue
        first: Any = node.args[0] if node.args else None
        if _is_layout(node) and first in flow:
            flow[node] = _apply(node, flow)
            if first in flow.pure:
                flow.pure.add(node)
        elif first in flow and (node in transparent or is_cast(node)):
            flow[node] = flow[first]
            if first in flow.pure:
                flow.pure.add(node)
        elif node.op == "call_function" and node.target in (torch.cat, torch.concat) and _all_known(node, flow):
            flow[node] = torch.cat(
                [flow[part] for part in node.args[0]], *value_of(node.args[1:]), **value_of(node.kwargs)
            )
        elif (same := _same_shape_input(node, flow)) is not None:
            flow[node] = flow[same]
    return flow


def _all_known(node: fx.Node, flow: Flow) -> bool:
    parts = node.args[0]
    return isinstance(parts, tuple | list) and all(
        isinstance(part, fx.Node) and isinstance(flow.get(part), torch.Tensor) for part in parts
    )


def find_layout(
    numbers: torch.Tensor,
    coordinates: Callable[[torch.Tensor], dict[Any, torch.Tensor]],
    sizes: dict[Any, int],
) -> Layout | None:
    """Read off which atoms each axis of a tensor runs over, in order; None if its axes do not split that way.

    `numbers` are the elements that the tensor holds; `coordinates` tells each atom's index for elements; `sizes` is
    how far each atom runs.
    """
    layout: list[tuple[Any, ...]] = []
    used: set[Any] = set()
    separable = torch.zeros((), dtype=torch.long)
    for axis, size in enumerate(numbers.shape):
        along = numbers.movedim(axis, -1).reshape(-1, size)[0]
        separable = separable + (along - along[0]).reshape(
            [-1 if other == axis else 1 for other in range(numbers.ndim)]
        )
        line = coordinates(along)
        varying = [atom for atom, values in line.items() if bool((values != values[0]).any())]
        # The atom that changes most rarely comes first in a merged axis.
        varying.sort(key=lambda atom: -int((line[atom] != line[atom][0]).nonzero()[0]))
        expected = torch.zeros(size, dtype=torch.long)
        for atom in varying:
            expected = expected * sizes[atom] + line[atom]
        if not torch.equal(expected, torch.arange(size)) or used & set(varying):
            return None
        used |= set(varying)
        layout.append(tuple(varying))
    if any(atom not in used and size > 1 for atom, size in sizes.items()):
        return None
    # Axes that do not depend on each other: only then do single lines speak for the whole tensor.
    if not torch.equal(separable + numbers.flatten()[0], numbers):
        return None
    missing = [atom for atom, size in sizes.items() if atom not in used]
    empty = [axis for axis, atoms in enumerate(layout) if not atoms]
    if missing == ["h"] and not empty:
        return tuple(("h", *atoms) if "j" in atoms else atoms for atoms in layout)
    if missing:
        # Axes of size one cannot be told apart; one of each is no riddle.
        if len(missing) != 1 or len(empty) != 1:
            return None
        layout[empty[0]] = (missing[0],)
    return tuple(layout)
