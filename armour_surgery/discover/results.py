"""From the attention core forward: what happens to the heads' results until the output projection reads them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from armour_surgery.discover.layout import Flow, find_layout, follow, is_cast
from armour_surgery.discover.match import inputs_of, is_call_of, is_tensor, outputs_of, result_of
from armour_surgery.errors import TraceError
from armour_surgery.traced import Anchor, Handover, Layout, OutputProjection, Results, TracedSite

__all__ = ["find_results"]

# They act on each number for itself, whichever channel it is in, and keep positions.
_IDLE = (nn.Identity, nn.Dropout)


def find_results(traced: TracedSite, modules: dict[str, nn.Module], out: OutputProjection) -> Results:
    """The way of the heads' results to `out`, in a graph that was not rewritten yet. `modules` are the site's by name.

    Raises:
        TraceError: something else than layout, a change of type or dropout happens on it, or to a part of it; the
            message is meant for users.
    """
    graph = traced.trace.graph
    result, axes = result_of(traced.core)
    reader = _reader(graph, out)
    idle = [node for node in graph.nodes if _is_idle(node, modules)]
    flow = follow(graph, result, barriers=[reader], transparent=idle)
    _refuse_others(graph, flow, reader, out)
    source = inputs_of(reader)[0]
    if source not in flow.pure or not isinstance(flow[source], torch.Tensor):
        raise TraceError(f"{out.weight} reads something else than its heads' results; leave out rank")
    rank = _parameter(modules, out.weight).ndim
    axis = -1 if rank == 2 else 1 - rank
    line = flow[source].movedim(axis, -1).reshape(-1, flow[source].shape[axis])[0]
    atoms = _Atoms(result.meta["value"].shape, axes, len(out.channels), line)

    # Layout is written anew between nodes that have to stay: each of these starts a stretch, its readers end one.
    starts = {result: Anchor(result, atoms.layout(flow[result]))}
    handovers = []
    for node in graph.nodes:
        if node not in flow.pure or not isinstance(flow[node], torch.Tensor):
            continue
        if _acts(node, modules):
            starts[node] = Anchor(node, atoms.layout(flow[node]))
        readers = tuple(user for user in node.users if user is reader or _acts(user, modules))
        if not readers:
            continue
        start = node
        while start not in starts:
            start = inputs_of(start)[0]
        layout = atoms.layout(flow[node])
        if layout is None or starts[start].layout is None:
            raise TraceError(f"the layout of its heads' results at {node.name} cannot be followed; leave out rank")
        handovers.append(Handover(starts[start], node, layout, readers))
    return Results(tuple(handovers), out)


def _refuse_others(graph: fx.Graph, flow: Flow, reader: fx.Node, out: OutputProjection) -> None:
    """Nothing but layout may take the heads' results before the output projection: it would miss channels."""
    for node in graph.nodes:
        if node not in flow.pure:
            continue
        for user in node.users:
            if user is not reader and _reads(user) and user not in flow.pure:
                raise TraceError(
                    f"between its heads and {out.weight} stands {_name(user)}, which needs all their channels; leave "
                    "out rank"
                )


def _parameter(modules: dict[str, nn.Module], name: str) -> torch.Tensor:
    """A parameter by its name inside the site."""
    owner, _, attribute = name.rpartition(".")
    return modules[owner].get_parameter(attribute)


def _reader(graph: fx.Graph, out: OutputProjection) -> fx.Node:
    """The one node that uses the output projection."""
    readers = []
    for node in graph.nodes:
        if node.op == "call_module" and out.weight.startswith(f"{node.target}."):
            readers.append(node)
        elif node.op == "get_attr" and node.target == out.weight:
            readers += outputs_of(node)
    if len(readers) != 1:
        raise TraceError(f"its forward uses {out.weight} {len(readers)} times instead of once; leave out rank")
    reader: fx.Node = readers[0]
    return reader


def _is_idle(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    is_dropout = node.op == "call_function" and node.target is F.dropout
    return is_dropout or is_call_of(node, modules, *_IDLE)


def _acts(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node on the way has to stay, though it keeps positions."""
    return _is_idle(node, modules) or is_cast(node)


def _reads(user: fx.Node) -> bool:
    """Whether a user takes the values, not only a size or a type."""
    return user.op == "output" or is_tensor(user)


def _name(node: fx.Node) -> str:
    return "the module's output" if node.op == "output" else str(getattr(node.target, "__name__", node.target))


class _Atoms:
    """What the axes of the core's result run over: its own axes by number, heads and a head's dimensions."""

    def __init__(self, shape: torch.Size, axes: tuple[int, int], num_heads: int, line: torch.Tensor) -> None:
        """`line` are the elements that one token's channels are, as the output projection reads them."""
        self.shape, self.num_heads = shape, num_heads
        self.channel = axes[1] % len(shape)
        token = axes[0] % len(shape)
        along = torch.unravel_index(line, shape)
        leading = [axis for axis in range(len(shape)) if axis not in (self.channel, token)]
        # One token's channels lie in one image and in all heads: along them only the heads' axis varies. A batch may
        # be as long as there are heads, so the length alone does not tell them apart.
        varying = [axis for axis in leading if bool((along[axis] != along[axis][0]).any())]
        candidates = varying if num_heads > 1 else leading
        self.heads = next((axis for axis in reversed(candidates) if shape[axis] == num_heads), None)
        # Batch and heads in one axis (B * H), heads inside.
        self.merged = varying[0] if varying and self.heads is None else None

    def layout(self, numbers: torch.Tensor) -> Layout | None:
        """The axes of a tensor that holds these elements of the result."""
        sizes: dict[Any, int] = {"h": self.num_heads, "j": self.shape[self.channel]}
        for axis, size in enumerate(self.shape):
            if axis not in (self.channel, self.heads):
                sizes[axis] = size // self.num_heads if axis == self.merged else size
        return find_layout(numbers, self.coordinates, sizes)

    def coordinates(self, elements: torch.Tensor) -> dict[Any, torch.Tensor]:
        """The index of every atom at these elements of the result."""
        indices: dict[Any, torch.Tensor] = {"h": torch.zeros_like(elements)}
        for axis, values in enumerate(torch.unravel_index(elements, self.shape)):
            if axis == self.channel:
                indices["j"] = values
            elif axis == self.heads:
                indices["h"] = values
            elif axis == self.merged:
                indices[axis], indices["h"] = values // self.num_heads, values % self.num_heads
            else:
                indices[axis] = values
        return indices
