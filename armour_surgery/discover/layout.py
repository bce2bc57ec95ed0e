"""Where channels go: push indices through layout operations in place of activations.

Every element of a producer's output gets its own number; views, permutations, splits and slices then say by
themselves which of them end up where.
"""

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from armour_surgery.discover.channels import Channels
from armour_surgery.discover.match import inputs_of, is_tensor
from armour_surgery.discover.nodes import Changes, name_of, value_of
from armour_surgery.discover.separable import Separable, are_separable, line_along
from armour_surgery.traced import Layout

__all__ = ["OTHER", "Flow", "find_layout", "first_alike", "follow", "is_cast"]

# Copies (`contiguous`, `clone`) count: they change where numbers lie in memory, not which channel they are.
_METHODS = {
    "view", "reshape", "permute", "transpose", "contiguous", "chunk", "split", "unbind", "flatten", "unflatten",
    "squeeze", "unsqueeze", "select", "narrow", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "clone", "view_as",
    "reshape_as", "__getitem__", "tensor_split", "detach", "expand", "expand_as", "repeat", "repeat_interleave", "roll",
}  # fmt: skip
# Of these, some leave elements out, or hold one several times; all others only put them elsewhere.
_NOT_ALL_ONCE = {
    "chunk", "split", "unbind", "select", "narrow", "__getitem__", "getitem", "tensor_split", "expand", "expand_as",
    "repeat", "repeat_interleave",
}  # fmt: skip
# These change a number's format but not where it is.
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_FUNCTIONS = {
    operator.getitem, torch.reshape, torch.permute, torch.transpose, torch.chunk, torch.split, torch.unbind,
    torch.flatten, torch.squeeze, torch.unsqueeze, torch.select, torch.narrow, torch.movedim, torch.moveaxis,
    torch.swapaxes, torch.swapdims, torch.t, torch.clone, torch.tensor_split, torch.repeat_interleave, torch.roll,
}  # fmt: skip
_JOINS: set[Any] = {torch.cat, torch.concat, torch.stack}
_PAIRS = {torch.view_as_complex, torch.view_as_real}
# In place of an element's number: what stands there comes from elsewhere.
OTHER = -1
_VIEWS = {"T", "mT", "H", "mH"}


class Flow(dict[fx.Node, Any]):
    """Node -> the numbers of the producer's elements that it holds, in place.

    `pure` are the nodes that layout alone leads to. At the others something acted on the values (a norm, a rotation, a
    scale), element by element as far as positions go. `others` are the numbers of further elements that went into the
    same positions: `a * cos - b * sin` holds those of a, and b's are others. `start` are the producer's own numbers.
    """

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.separable = Separable(start)
        self.pure: set[fx.Node] = set()
        # The first node that holds the same elements, each as often, in whatever order.
        self.first_with: dict[fx.Node, fx.Node] = {}
        self.others: dict[fx.Node, list[torch.Tensor]] = {}

    def choices(self, node: fx.Node) -> list[torch.Tensor]:
        """All numbers that may stand for what a node holds; none for a node without, or with several tensors."""
        numbers = self.get(node)
        return [numbers, *self.others.get(node, ())] if isinstance(numbers, torch.Tensor) else []

    def leaves_layout(self, user: fx.Node) -> bool:
        """Whether a reader takes the values and does something else to them than layout."""
        # A cast keeps positions too, but it is no view that could be written anew: it stays where it is, and reads.
        return is_tensor(user) and (user not in self.pure or is_cast(user))


def is_cast(node: fx.Node) -> bool:
    """Whether a node changes the format of numbers and nothing else."""
    return node.op == "call_method" and node.target in _CASTS


def _is_layout(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METHODS
    if node.op == "call_function":
        return node.target in _FUNCTIONS or (node.target is getattr and node.args[1] in _VIEWS)
    return False


def first_alike(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every node the first one of which is known that it holds the same: the same layout of the same tensor."""
    first: dict[Any, fx.Node] = {}
    alike: dict[fx.Node, fx.Node] = {}
    changes = Changes()
    for node in graph.nodes:
        changes.note(node)
        alike[node] = node
        # A size or an item that is read twice is the same too, as an argument of such an operation.
        if _is_layout(node) or is_cast(node) or node.target is getattr:
            arguments = fx.map_arg((node.args, node.kwargs), lambda source: alike[source])
            when = tuple(map(changes.last, node.all_input_nodes))
            alike[node] = first.setdefault((node.op, node.target, repr(arguments), when), node)
    return alike


def _apply(node: fx.Node, flow: Flow) -> Any:
    """Do a layout operation on the numbers."""

    def pick(argument: Any) -> Any:
        return flow[argument] if argument in flow else value_of(argument)

    args = [pick(node.args[0]), *value_of(tuple(node.args[1:]))]
    # The numbers need not have the strides that the activations had, and `view` would refuse; `reshape` is the same
    # rearrangement.
    if node.target in ("view_as", "reshape_as"):
        return args[0].reshape(args[1].shape)
    if node.target == "expand_as":
        return args[0].expand(args[1].shape)
    target: Any = "reshape" if node.target == "view" else node.target
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **value_of(node.kwargs))
    return target(*args, **value_of(node.kwargs))


def _same_shape_inputs(node: fx.Node, flow: Flow) -> list[torch.Tensor]:
    """The numbers of the inputs whose positions an operation keeps, those with the output's own shape; each once."""
    shape = getattr(node.meta["value"], "shape", None)
    if shape is not None and node.meta["value"].is_complex():
        shape = (*shape, 2)
    found: list[torch.Tensor] = []
    for source in inputs_of(node):
        for numbers in flow.choices(source):
            if numbers.shape == shape and not any(_are_equal(numbers, known) for known in found):
                found.append(numbers)
    return found


def follow(
    graph: fx.Graph,
    producer: fx.Node,
    barriers: Collection[fx.Node] = (),
    transparent: Collection[fx.Node] = (),
    channels: Channels | None = None,
) -> Flow:
    """Number the producer's output elements and follow them through the graph.

    `barriers` are other producers: what passes through them is no longer this one's output. `transparent` nodes count
    as layout: they act on each channel for itself, and whoever moves the channels takes care of them. With `channels`
    they are followed through what makes other tokens of a channel's tokens, too, and through a concatenation with
    something else: what stands there then is any number of the channel, or `OTHER` where nothing of the producer is.
    """
    shape = producer.meta["value"].shape
    # There may be tens of millions, and every pass over them costs: the small type halves it.
    small = shape.numel() < torch.iinfo(torch.int32).max
    start = torch.arange(shape.numel(), dtype=torch.int32 if small else torch.int64).reshape(shape)
    flow = Flow(start)
    flow[producer] = start
    flow.pure.add(producer)
    flow.first_with[producer] = producer
    started = False
    for node in graph.nodes:
        if node is producer:
            started = True
            continue
        if not started or not is_tensor(node) or node in barriers or node.op == "output":
            continue
        if flow.keys().isdisjoint(inputs_of(node)):
            continue
        first: Any = node.args[0] if node.args else None
        is_layout = _is_layout(node)
        if first not in flow and is_cast(node):
            continue  # `queries.type_as(values)` holds queries
        if first in flow and (is_layout or node in transparent or is_cast(node)):
            flow[node] = _apply(node, flow) if is_layout else flow[first]
            if first in flow.pure:
                flow.pure.add(node)
                all_once = not is_layout or name_of(node) not in _NOT_ALL_ONCE
                flow.first_with[node] = flow.first_with[first] if all_once else node
        elif first in flow and node.target in _PAIRS:
            # A complex number has the two numbers of its parts, along an axis that the node itself does not have.
            flow[node] = flow[first]
        elif (joined := _joined(node, flow, others=channels is not None)) is not None:
            flow[node] = joined
        elif choices := _same_shape_inputs(node, flow):
            flow[node], *flow.others[node] = choices
        elif channels is not None and (made := channels.after(node, flow)) is not None:
            flow[node] = made
    return flow


def _joined(node: fx.Node, flow: Flow, others: bool) -> torch.Tensor | None:
    """The numbers that a concatenation holds; None for anything else.

    A rotation in two halves, `cat(a * cos - b * sin, a * sin + b * cos)`, has both parts of one channel in each half:
    each half gets the numbers that no other has. Also None where a part has no numbers, but with `others` these are
    `OTHER` then.
    """
    if node.op != "call_function" or node.target not in _JOINS:
        return None
    parts = node.args[0]
    if not isinstance(parts, tuple | list):
        return None
    numbers: list[torch.Tensor] = []
    for part in parts:
        choices = flow.choices(part) if isinstance(part, fx.Node) else []
        if not choices:
            value = value_of(part)
            if not others or not isinstance(value, torch.Tensor):
                return None
            choices = [torch.full(value.shape, OTHER, dtype=torch.int32)]
        chosen = choices[0]
        if len(choices) > 1:
            new = (choice for choice in choices if not any(_overlap(choice, known) for known in numbers))
            chosen = next(new, chosen)
        numbers.append(chosen)
    join: Any = node.target
    joined: torch.Tensor = join(numbers, *value_of(node.args[1:]), **value_of(node.kwargs))
    return joined


def _are_equal(numbers: torch.Tensor, others: torch.Tensor) -> bool:
    # Mostly they are the same tensor, and there are millions.
    return numbers is others or torch.equal(numbers, others)


def _overlap(numbers: torch.Tensor, others: torch.Tensor) -> bool:
    # Marked one by one: `torch.isin` would sort them. The last place is that of `OTHER`, which counts for nothing.
    known = torch.zeros(int(max(numbers.max(), others.max())) + 2, dtype=torch.bool)
    known[others] = True
    known[OTHER] = False
    return bool(known[numbers].any())


def find_layout(
    numbers: torch.Tensor,
    coordinates: Callable[[torch.Tensor], dict[Any, torch.Tensor]],
    sizes: dict[Any, int],
    separable: Callable[[torch.Tensor], bool] = are_separable,
) -> Layout | None:
    """Read off which atoms each axis of a tensor runs over, in order; None if its axes do not split that way.

    `numbers` are the elements that the tensor holds; `coordinates` tells each atom's index for elements; `sizes` is
    how far each atom runs. `separable` tells whether axes do not depend on each other; a flow's own one knows of views.
    """
    layout: list[tuple[Any, ...]] = []
    used: set[Any] = set()
    for axis, size in enumerate(numbers.shape):
        along = line_along(numbers, axis)
        atoms = _atoms_of_line(coordinates(along), sizes, size)
        if atoms is None or not used.isdisjoint(atoms):
            return None
        used.update(atoms)
        layout.append(atoms)
    # Only then do single lines speak for the whole tensor.
    if not separable(numbers):
        return None
    return _with_atoms_of_one(layout, [atom for atom in sizes if atom not in used], sizes)


def _atoms_of_line(line: dict[Any, torch.Tensor], sizes: dict[Any, int], length: int) -> tuple[Any, ...] | None:
    """The atoms that an axis of this length runs over, the slowest first; None if not through all, in order."""
    varying = [atom for atom, values in line.items() if bool((values != values[0]).any())]
    # The atom that changes most rarely comes first in a merged axis.
    varying.sort(key=lambda atom: -int((line[atom] != line[atom][0]).nonzero()[0]))
    expected = torch.zeros(length, dtype=torch.long)
    for atom in varying:
        expected = expected * sizes[atom] + line[atom]
    return tuple(varying) if torch.equal(expected, torch.arange(length)) else None


def _with_atoms_of_one(layout: list[tuple[Any, ...]], missing: list[Any], sizes: dict[Any, int]) -> Layout | None:
    """Give atoms that vary nowhere, since they have one value, their place; None where it cannot be told."""
    if any(sizes[atom] > 1 for atom in missing):
        return None
    empty = [axis for axis, atoms in enumerate(layout) if not atoms]
    if missing == ["h"] and not empty:
        # A single head has no axis of its own where the host merges heads and dimensions.
        return tuple(("h", *atoms) if "j" in atoms else atoms for atoms in layout)
    if missing:
        # Axes of size one cannot be told apart; one of each is no riddle.
        if len(missing) != 1 or len(empty) != 1:
            return None
        layout[empty[0]] = (missing[0],)
    return tuple(layout)
