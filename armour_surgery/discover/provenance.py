"""From the attention core back to the projections: which channel of which projection is which head and dimension."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from armour_surgery.discover.gates import judge_softmax
from armour_surgery.discover.layout import OTHER, Flow, find_layout, follow
from armour_surgery.discover.match import find_core, inputs_of
from armour_surgery.discover.producers import TraceInside, find_producers
from armour_surgery.discover.record import is_builtin
from armour_surgery.errors import TraceError
from armour_surgery.traced import Anchor, Core, Layout, Producer, Role, Trace, TracedSite

__all__ = ["understand"]

_NAMES = {"q": "queries", "k": "keys", "v": "values"}


def _ancestors(node: fx.Node) -> set[fx.Node]:
    ancestors: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current not in ancestors:
            ancestors.add(current)
            queue += inputs_of(current)
    return ancestors


def _heads(
    numbers: torch.Tensor, axes: tuple[int, int], producer: Producer, letter: str
) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Channels of each head in order of appearance, and for each leading position of the core which head it is."""
    channel = _channel_of(producer)(numbers).movedim(axes, (-2, -1))
    first = _own_token(channel, producer, letter)
    # A dimension of a head must be the same channel at every token; in cross-covariance attention (XCiT) it is not.
    if bool(((channel != first) & (channel != OTHER)).any()):
        raise TraceError(f"its {_NAMES[letter]} attend over channels, not over tokens")
    lines = first.reshape(-1, channel.shape[-1])
    order: dict[tuple[int, ...], int] = {}
    places = [order.setdefault(tuple(line), len(order)) for line in lines.tolist()]
    used = list(itertools.chain.from_iterable(order))
    if len(set(used)) != len(used):
        raise TraceError(f"its {_NAMES[letter]} use a channel in more than one place")
    return list(order), torch.tensor(places).reshape(channel.shape[:-2])


def _own_token(channel: torch.Tensor, producer: Producer, letter: str) -> torch.Tensor:
    """For every head the channels of a token that is the producer's, as `[.., 1, d]`.

    Others may stand beside these (registers, a learned bias): they stay what they are.
    """
    other = channel == OTHER
    if not bool(other.any()):
        return channel[..., :1, :]
    foreign = other.all(-1)
    if bool((foreign != other.any(-1)).any()) or bool(foreign.all(-1).any()):
        raise TraceError(f"only some channels of its {_NAMES[letter]} are made by {producer.fqn}")
    place = (~foreign).int().argmax(-1)[..., None, None]
    return channel.take_along_dim(place, -2)


def _channel_of(producer: Producer) -> Callable[[torch.Tensor], torch.Tensor]:
    """What tells the channels of elements, which are numbered row by row: division and remainder."""
    inner, channels = _inner(producer), producer.channels
    return lambda numbers: torch.where(numbers == OTHER, OTHER, (numbers // inner) % channels)


def _inner(producer: Producer) -> int:
    """How many elements of a producer's output lie between one channel and the next."""
    shape: torch.Size = producer.node.meta["value"].shape
    return shape[producer.axis % len(shape) + 1 :].numel()


def _layout(numbers: torch.Tensor, producer: Producer, heads: list[tuple[int, ...]]) -> Layout | None:
    """The layout of an anchor: its axes in terms of the producer's other axes, heads and dimensions."""
    shape = producer.node.meta["value"].shape
    axis = producer.axis % len(shape)
    head = torch.full((producer.channels,), -1)
    place = torch.full((producer.channels,), -1)
    for index, channels in enumerate(heads):
        head[list(channels)] = index
        place[list(channels)] = torch.arange(len(channels))

    def coordinates(elements: torch.Tensor) -> dict[Any, torch.Tensor]:
        indices: dict[Any, torch.Tensor] = dict(enumerate(torch.unravel_index(elements, shape)))
        channel = indices.pop(axis)
        return indices | {"h": head[channel], "j": place[channel]}

    sizes: dict[Any, int] = dict(enumerate(shape))
    del sizes[axis]
    return find_layout(numbers, coordinates, sizes | {"h": len(heads), "j": len(heads[0])})


def _counting(flow: Flow, producer: Producer) -> Callable[[fx.Node], torch.Tensor | None]:
    """Tells of a node how many elements of each of a producer's channels it holds; None where it is no tensor."""
    channel_of = _channel_of(producer)
    # Going over millions of numbers takes longer than all the rest, and most nodes only put them elsewhere.
    of_each = producer.node.meta["value"].numel() // producer.channels
    counts = {producer.node: torch.full((producer.channels,), of_each)}

    def count(node: fx.Node) -> torch.Tensor | None:
        numbers = flow[node]
        if not isinstance(numbers, torch.Tensor):
            return None
        first = flow.first_with[node]
        if first not in counts:
            counts[first] = torch.bincount(channel_of(numbers).flatten(), minlength=producer.channels)
        return counts[first]

    return count


def _holding(
    counted: Callable[[fx.Node], torch.Tensor | None], producer: Producer, heads: list[tuple[int, ...]]
) -> Callable[[fx.Node], tuple[bool, bool]]:
    """Tells of a node whether it holds some of this role's channels, and whether it holds exactly those."""
    channels = list(itertools.chain.from_iterable(heads))
    full = len(channels) * (producer.node.meta["value"].numel() // producer.channels)

    def holds(node: fx.Node) -> tuple[bool, bool]:
        counts = counted(node)
        if counts is None:
            return False, False
        own = int(counts[channels].sum())
        return own > 0, own == int(counts.sum()) == full

    return holds


def _anchors(
    flow: Flow, producer: Producer, heads: list[tuple[int, ...]], holds: Callable[[fx.Node], tuple[bool, bool]]
) -> tuple[tuple[Anchor, ...], bool]:
    """The first nodes that hold this role's channels and nothing else, and whether all its uses go through them."""
    anchors: list[fx.Node] = []
    below: set[fx.Node] = set()
    whole = True
    for node in producer.node.graph.nodes:
        if node not in flow.pure:
            continue
        if not below.isdisjoint(inputs_of(node)):
            below.add(node)
            continue
        some, exactly = holds(node)
        if exactly:
            anchors.append(node)
            below.add(node)
        elif some and node.users.keys() - flow.pure:
            # Something reads the packed tensor, or its size, before the roles part.
            whole = False
    placed = tuple(Anchor(node, _layout(flow[node], producer, heads)) for node in anchors)
    return placed, whole and bool(placed)


def _ends(
    flow: Flow, producer: Producer, heads: list[tuple[int, ...]], holds: Callable[[fx.Node], tuple[bool, bool]]
) -> tuple[Anchor, ...]:
    """The last nodes that layout alone leads to: what reads them is no layout. None where only a part gets so far."""
    ends: list[Anchor] = []
    for node in producer.node.graph.nodes:
        if node not in flow.pure:
            continue
        some, exactly = holds(node)
        if some and any(map(flow.leaves_layout, node.users)):
            if not exactly:
                return ()
            ends.append(Anchor(node, _layout(flow[node], producer, heads)))
    return tuple(ends)


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
        if core is None:
            # A module of the host's own may hold the softmax, or a product.
            hidden = _written_by_others(modules, set(trace.graph.nodes)) - inlined
            if not hidden:
                raise judge_softmax(trace.graph, modules)
            inlined |= hidden
            try:
                trace = retrace(inlined)
            except TraceError:
                raise judge_softmax(trace.graph, modules) from None
            continue
        above = _ancestors(core.q) | _ancestors(core.k) | _ancestors(core.v)
        producers, opaque = find_producers(trace, modules, above, trace_inside)
        # A module that stays opaque though it was looked into has nothing more to show.
        hidden = set(opaque) - inlined
        if not hidden:
            found: TracedSite | TraceError
            try:
                found = _assign(trace, core, producers)
            except TraceError as error:
                found = error
            # What stands in the way may be a module without layers: a rearrangement, a Linear of the host's own.
            if isinstance(found, TraceError) or found.unprojected:
                hidden = _written_by_others(modules, above) - inlined
            if not hidden:
                if isinstance(found, TraceError):
                    raise found
                return found
        inlined |= hidden
        trace = retrace(inlined)


def _written_by_others(modules: dict[str, nn.Module], nodes: set[fx.Node]) -> set[str]:
    """The modules called among some nodes that are none of torch's own."""
    names = {str(node.target) for node in nodes if node.op == "call_module"}
    return {name for name in names if not is_builtin(modules[name])}


def _assign(trace: Trace, core: Core, producers: list[Producer]) -> TracedSite:
    barriers: set[fx.Node] = set()
    for producer in producers:
        barriers |= {producer.node, *producer.chain}
    flows: dict[fx.Node, Flow] = {}
    counted: dict[fx.Node, Callable[[fx.Node], torch.Tensor | None]] = {}
    for producer in producers:
        flows[producer.node] = follow(trace.graph, producer.node, barriers, channel_of=_channel_of(producer))
        counted[producer.node] = _counting(flows[producer.node], producer)
    roles: dict[str, Role] = {}
    places: dict[str, torch.Tensor] = {}
    unprojected: TraceError | None = None
    for letter in ("q", "k", "v"):
        try:
            producer = _maker_of(getattr(core, letter), flows, producers, _NAMES[letter])
            flow, count = flows[producer.node], counted[producer.node]
            roles[letter], places[letter] = _role(flow, count, producer, core, letter)
        except TraceError as error:
            # Modes that leave queries alone need not know where they come from; what keys are made of they do.
            if letter != "q":
                raise unprojected or error from None
            unprojected = error
    if unprojected is not None:
        roles["q"], places["q"] = _unprojected(core, roles["k"].num_heads), places["k"]
    # The core takes leading axes position by position: head 3 of Q meets whatever stands there in K and V. Roles with
    # different numbers of heads share nothing, so their order does not matter; the modes refuse them by themselves.
    for letter in ("k", "v"):
        same = places[letter].shape == places["q"].shape and torch.equal(places[letter], places["q"])
        if not same and roles[letter].num_heads == roles["q"].num_heads:
            raise TraceError(f"heads of its queries and {_NAMES[letter]} are not in the same order")
    if places["k"].shape == places["v"].shape and not torch.equal(places["k"], places["v"]):
        raise TraceError("heads of its keys and values are not in the same order")
    return TracedSite(trace, core, roles["q"], roles["k"], roles["v"], str(unprojected or ""))


def _role(
    flow: Flow,
    counted: Callable[[fx.Node], torch.Tensor | None],
    producer: Producer,
    core: Core,
    letter: str,
) -> tuple[Role, torch.Tensor]:
    """q, k or v as its projection makes it, and for each leading position of the core which head it is."""
    numbers = flow[getattr(core, letter)]
    heads, places = _heads(numbers, getattr(core, f"{letter}_axes"), producer, letter)
    holds = _holding(counted, producer, heads)
    anchors, whole = _anchors(flow, producer, heads, holds)
    value = producer.node.meta["value"]
    tokens = value.numel() // producer.channels // value.shape[0]
    return Role(producer, tuple(heads), anchors, whole, tokens, _ends(flow, producer, heads, holds)), places


def _unprojected(core: Core, num_heads: int) -> Role:
    """Queries that are nobody's output channels: they stay what they are."""
    value = core.q.meta["value"]
    size, tokens = value.shape[core.q_axes[1]], value.shape[core.q_axes[0]]
    producer = Producer(
        node=core.q,
        fqn="",
        reads=core.q.name,
        axis=core.q_axes[1],
        channels=num_heads * size,
        rows=(),
        sizes=(),
        bias=(),
        weight="",
        plain=False,
    )
    heads = tuple(tuple(range(head * size, (head + 1) * size)) for head in range(num_heads))
    return Role(producer, heads, (), False, tokens)


def _maker_of(target: fx.Node, flows: dict[fx.Node, Flow], producers: list[Producer], name: str) -> Producer:
    """The one projection whose numbers reach an operand of the core."""
    makers = [producer for producer in producers if isinstance(flows[producer.node].get(target), torch.Tensor)]
    if not makers:
        raise TraceError(f"no Linear or convolution was found behind its {name}")
    if len(makers) > 1:
        names = ", ".join(maker.fqn for maker in makers)
        raise TraceError(f"its {name} are made by several projections ({names})")
    return makers[0]
