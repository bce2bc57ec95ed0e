"""From the attention core back to the projections: which channel of which projection is which head and dimension."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from armour_surgery.discover.layout import Flow, find_layout, follow, is_cast
from armour_surgery.discover.match import find_core, inputs_of, is_tensor
from armour_surgery.discover.producers import TraceInside, find_producers
from armour_surgery.errors import TraceError
from armour_surgery.traced import Anchor, Core, Layout, Producer, Role, Trace, TracedSite

__all__ = ["understand"]

_NAMES = {"q": "queries", "k": "keys", "v": "values"}


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current not in found:
            found.add(current)
            queue += inputs_of(current)
    return found


def _heads(
    numbers: torch.Tensor, axes: tuple[int, int], producer: Producer, letter: str
) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Channels of each head in order of appearance, and for each leading position of the core which head it is."""
    shape = producer.node.meta["value"].shape
    axis = producer.axis % len(shape)
    inner = shape[axis + 1 :].numel()
    channel = (numbers // inner) % producer.channels
    channel = channel.movedim(axes, (-2, -1))
    if bool((channel != channel[..., :1, :]).any()):
        raise TraceError(f"its {_NAMES[letter]} attend over channels, not over tokens")
    lines = channel[..., 0, :].reshape(-1, channel.shape[-1])
    order: dict[tuple[int, ...], int] = {}
    places = [order.setdefault(tuple(line), len(order)) for line in lines.tolist()]
    used = [index for head in order for index in head]
    if len(set(used)) != len(used):
        raise TraceError(f"its {_NAMES[letter]} use a channel in more than one place")
    return list(order), torch.tensor(places).reshape(channel.shape[:-2])


def _layout(numbers: torch.Tensor, producer: Producer, heads: list[tuple[int, ...]]) -> Layout | None:
    """The layout of an anchor: its axes in terms of the producer's other axes, heads and dimensions."""
    shape = producer.node.meta["value"].shape
    axis = producer.axis % len(shape)
    head = torch.full((producer.channels,), -1)
    place = torch.full((producer.channels,), -1)
    for index, channels in enumerate(heads):
        head[list(channels)] = index
        place[list(channels)] = torch.arange(len(channels))
    others = [number for number in range(len(shape)) if number != axis]

    def coordinates(elements: torch.Tensor) -> dict[Any, torch.Tensor]:
        unraveled = torch.unravel_index(elements, shape)
        found: dict[Any, torch.Tensor] = {number: unraveled[number] for number in others}
        return found | {"h": head[unraveled[axis]], "j": place[unraveled[axis]]}

    sizes: dict[Any, int] = {number: shape[number] for number in others}
    return find_layout(numbers, coordinates, sizes | {"h": len(heads), "j": len(heads[0])})


def _holding(flow: Flow, producer: Producer, heads: list[tuple[int, ...]]) -> Callable[[fx.Node], tuple[bool, bool]]:
    """Tells of a node whether it holds some of this role's channels, and whether it holds exactly those."""
    shape = producer.node.meta["value"].shape
    inner = shape[producer.axis % len(shape) + 1 :].numel()
    own = torch.zeros(producer.channels, dtype=torch.bool)
    own[[index for head in heads for index in head]] = True
    # Looked up by the number of an element: dividing millions of numbers took longer than all the rest.
    by_element = own.repeat_interleave(inner).repeat(shape.numel() // (producer.channels * inner))
    full = int(by_element.sum())

    @cache
    def holds(node: fx.Node) -> tuple[bool, bool]:
        numbers = flow[node]
        if not isinstance(numbers, torch.Tensor):
            return False, False
        count = int(by_element[numbers].sum())
        return count > 0, count == numbers.numel() == full

    return holds


def _anchors(
    flow: Flow, producer: Producer, heads: list[tuple[int, ...]], holds: Callable[[fx.Node], tuple[bool, bool]]
) -> tuple[tuple[Anchor, ...], bool]:
    """The first nodes that hold this role's channels and nothing else, and whether all its uses go through them."""
    anchors: list[fx.Node] = []
    below: set[fx.Node] = set()
    whole = True
    for node in (n for n in producer.node.graph.nodes if n in flow.pure):
        if any(source in below for source in inputs_of(node)):
            below.add(node)
            continue
        some, exactly = holds(node)
        if exactly:
            anchors.append(node)
            below.add(node)
        elif some and any(user not in flow.pure for user in node.users):
            # Something reads the packed tensor, or its size, before the roles part.
            whole = False
    found = tuple(Anchor(node, _layout(flow[node], producer, heads)) for node in anchors)
    return found, whole and bool(found)


def _ends(
    flow: Flow, producer: Producer, heads: list[tuple[int, ...]], holds: Callable[[fx.Node], tuple[bool, bool]]
) -> tuple[Anchor, ...]:
    """The last nodes that layout alone leads to: what reads them is no layout. None where only a part gets so far."""
    found: list[Anchor] = []
    for node in (n for n in producer.node.graph.nodes if n in flow.pure):
        some, exactly = holds(node)
        if some and any(is_tensor(user) and (user not in flow.pure or is_cast(user)) for user in node.users):
            if not exactly:
                return ()
            found.append(Anchor(node, _layout(flow[node], producer, heads)))
    return tuple(found)


def understand(
    trace: Trace,
    modules: dict[str, nn.Module],
    trace_inside: TraceInside,
    retrace: Callable[[set[str]], Trace],
) -> TracedSite:
    """Name the projections behind q, k and v of a traced attention module, channel by channel.

    `modules` are the site's modules by name. `trace_inside(name, node)` traces one of them for the call that `node`
    makes; `retrace(names)` traces the site again and looks into the named modules.

    Raises:
        TraceError: the core or a projection was not found; the message is meant for users.
    """
    inlined: set[str] = set()
    while True:
        core = find_core(trace.graph, modules)
        above = _ancestors(core.q) | _ancestors(core.k) | _ancestors(core.v)
        producers, opaque = find_producers(trace, modules, above, trace_inside)
        if not set(opaque) - inlined:
            break
        inlined |= set(opaque)
        trace = retrace(inlined)
    return _assign(trace, core, producers)


def _assign(trace: Trace, core: Core, producers: list[Producer]) -> TracedSite:
    barriers = {producer.node for producer in producers} | {node for producer in producers for node in producer.chain}
    flows = {producer.node: follow(trace.graph, producer.node, barriers) for producer in producers}
    roles: dict[str, Role] = {}
    places: dict[str, torch.Tensor] = {}
    for letter in ("q", "k", "v"):
        target: fx.Node = getattr(core, letter)
        makers = [producer for producer in producers if isinstance(flows[producer.node].get(target), torch.Tensor)]
        if not makers:
            raise TraceError(f"no Linear or convolution was found behind its {_NAMES[letter]}")
        if len(makers) > 1:
            names = ", ".join(maker.fqn for maker in makers)
            raise TraceError(f"its {_NAMES[letter]} are made by several projections ({names})")
        producer, flow = makers[0], flows[makers[0].node]
        heads, places[letter] = _heads(flow[target], getattr(core, f"{letter}_axes"), producer, letter)
        holds = _holding(flow, producer, heads)
        anchors, whole = _anchors(flow, producer, heads, holds)
        value = producer.node.meta["value"]
        tokens = value.numel() // producer.channels // value.shape[0]
        roles[letter] = Role(producer, tuple(heads), anchors, whole, tokens, _ends(flow, producer, heads, holds))
    for letter in ("k", "v"):
        same = places[letter].shape == places["q"].shape and torch.equal(places[letter], places["q"])
        if not same and roles[letter].num_heads == roles["q"].num_heads:
            raise TraceError(f"heads of its queries and {_NAMES[letter]} are not in the same order")
    return TracedSite(trace, core, roles["q"], roles["k"], roles["v"])
