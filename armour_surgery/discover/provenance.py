"""From the attention core back to the projections: which channel of which projection is which head and dimension."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from armour_surgery.discover.channels import Channels
from armour_surgery.discover.layout import Flow, find_layout, follow
from armour_surgery.discover.match import find_cores, inputs_of
from armour_surgery.discover.producers import TraceInside, find_producers
from armour_surgery.discover.products import write_as_linear
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
    numbers: torch.Tensor, axes: tuple[int, int], channels: Channels, letter: str
) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Channels of each head in order of appearance, and for each leading position of the core which head it is."""
    channel = channels.of(numbers).movedim(axes, (-2, -1))
    # A dimension of a head must be the same channel at every token; in cross-covariance attention (XCiT) it is not.
    # Tokens that were padded, or learned, have none.
    line = channel.amax(-2, keepdim=True)
    if bool(((channel != line) & (channel >= 0)).any()):
        raise TraceError(f"its {_NAMES[letter]} attend over channels, not over tokens")
    if bool((line < 0).any()):
        raise TraceError(f"its {_NAMES[letter]} are not projected as a whole: some of a head's numbers are constants")
    lines = line.reshape(-1, channel.shape[-1])
    order: dict[tuple[int, ...], int] = {}
    places = [order.setdefault(tuple(line), len(order)) for line in lines.tolist()]
    return list(order), torch.tensor(places).reshape(channel.shape[:-2])


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


def _holding(flow: Flow, producer: Producer, heads: list[tuple[int, ...]]) -> Callable[[fx.Node], tuple[bool, bool]]:
    """Tells of a node whether it holds some of this role's channels, and whether it holds exactly those."""
    inner, elements = _inner(producer), producer.node.meta["value"].numel()
    own = torch.zeros(producer.channels, dtype=torch.bool)
    own[list(itertools.chain.from_iterable(heads))] = True
    # Looked up by the number of an element: dividing millions of numbers took longer than all the rest.
    by_element = own.repeat_interleave(inner).repeat(elements // (producer.channels * inner))
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
    as_linear = False
    while True:
        cores = find_cores(trace.graph, modules)
        above: set[fx.Node] = set()
        for core in cores:
            above |= _ancestors(core.q) | _ancestors(core.k) | _ancestors(core.v)
        producers, opaque = find_producers(trace, modules, above, trace_inside)
        # A module that stays opaque though it was looked into has nothing more to show.
        hidden = set(opaque) - inlined
        if not hidden:
            try:
                return _assign(trace, cores, _follow_all(trace, producers, modules, above))
            except TraceError:
                # What stands in the way may be a module without layers: a rearrangement, a Linear of the host's own.
                hidden = _written_by_others(modules, above) - inlined
                if not hidden and as_linear:
                    raise
                # Products with parameters are projections where there are no others: a product may also rotate queries.
                as_linear = as_linear or not hidden
        inlined |= hidden
        trace = retrace(inlined)
        if as_linear:
            write_as_linear(trace.graph)


def _written_by_others(modules: dict[str, nn.Module], nodes: set[fx.Node]) -> set[str]:
    """The modules called among some nodes that are none of torch's own."""
    names = {str(node.target) for node in nodes if node.op == "call_module"}
    return {name for name in names if not is_builtin(modules[name])}


@dataclass(frozen=True)
class _Followed:
    """A projection, what becomes of its elements, and what tells their channels."""

    producer: Producer
    flow: Flow
    channels: Channels


def _follow_all(
    trace: Trace, producers: list[Producer], modules: dict[str, nn.Module], above: set[fx.Node]
) -> list[_Followed]:
    barriers: set[fx.Node] = set()
    for producer in producers:
        barriers |= {producer.node, *producer.chain}
    followed = []
    for producer in producers:
        channels = Channels(_inner(producer), producer.channels, modules, above)
        flow = follow(trace.graph, producer.node, barriers, channels=channels)
        followed.append(_Followed(producer, flow, channels))
    return followed


@dataclass(frozen=True)
class _Operand:
    """Q, K or V of one core: its heads' channels, and for each leading position of the core which head it is."""

    maker: _Followed
    heads: list[tuple[int, ...]]
    places: torch.Tensor


def _assign(trace: Trace, cores: list[Core], followed: list[_Followed]) -> TracedSite:
    """The attentions of a graph: cores that share their projections are the heads of one.

    What cannot be followed is left alone where others can, and has projections of its own.
    """
    groups: dict[tuple[fx.Node, ...], list[tuple[Core, dict[str, _Operand]]]] = {}
    failed: list[tuple[Core, TraceError]] = []
    for core in cores:
        try:
            operands = {letter: _operand(core, letter, followed) for letter in _NAMES}
        except TraceError as error:
            failed.append((core, error))
            continue
        key = tuple(operand.maker.producer.node for operand in operands.values())
        groups.setdefault(key, []).append((core, operands))
    if not groups:
        raise failed[0][1]
    members = []
    for group in groups.values():
        roles = {letter: _role(letter, [operands[letter] for _, operands in group]) for letter in _NAMES}
        _check_order([operands for _, operands in group], roles)
        if len(group) > 1:
            _refuse_overlap([operands["q"] for _, operands in group], roles)
        members.append(TracedSite(trace, tuple(core for core, _ in group), roles["q"], roles["k"], roles["v"]))
    _refuse_shared(members)
    for core, reason in failed:
        _refuse_read(core, reason, members, followed)
    return replace(members[0], others=tuple(members[1:]))


def _operand(core: Core, letter: str, followed: list[_Followed]) -> _Operand:
    target: fx.Node = getattr(core, letter)
    maker = _maker_of(target, followed, _NAMES[letter])
    heads, places = _heads(maker.flow[target], getattr(core, f"{letter}_axes"), maker.channels, letter)
    return _Operand(maker, heads, places)


def _role(letter: str, operands: list[_Operand]) -> Role:
    """The role of that letter in cores that have the same projections; heads in the order of the cores."""
    maker = operands[0].maker
    producer, flow = maker.producer, maker.flow
    heads = list(dict.fromkeys(itertools.chain.from_iterable(operand.heads for operand in operands)))
    used = list(itertools.chain.from_iterable(heads))
    if len(set(used)) != len(used):
        raise TraceError(f"its {_NAMES[letter]} use a channel in more than one place")
    if len(set(map(len, heads))) > 1:
        raise TraceError(f"the heads of its {_NAMES[letter]} differ in their numbers of channels")
    holds = _holding(flow, producer, heads)
    anchors, whole = _anchors(flow, producer, heads, holds)
    value = producer.node.meta["value"]
    tokens = value.numel() // producer.channels // value.shape[0]
    return Role(producer, tuple(heads), anchors, whole, tokens, _ends(flow, producer, heads, holds))


def _check_order(cores: list[dict[str, _Operand]], roles: dict[str, Role]) -> None:
    """The core takes leading axes position by position: head 3 of Q meets whatever stands there in K and V.

    Roles with different numbers of heads share nothing, so their order does not matter; modes refuse them themselves.

    Raises:
        TraceError: heads that meet are not of the same number.
    """
    for letter in ("k", "v"):
        if roles[letter].num_heads != roles["q"].num_heads:
            continue
        for operands in cores:
            first, second = (_numbered(operands[name], roles[name]) for name in ("q", letter))
            if first.shape != second.shape or not torch.equal(first, second):
                raise TraceError(f"heads of its queries and {_NAMES[letter]} are not in the same order")


def _refuse_overlap(queries: list[_Operand], roles: dict[str, Role]) -> None:
    """Several cores are the heads of one attention if each has its own queries, and those are nobody's keys or values.

    Raises:
        TraceError: they are attentions of their own, with the same projection.
    """
    taken: list[tuple[fx.Node, int]] = []
    for operand in queries:
        taken += [(operand.maker.producer.node, channel) for head in operand.heads for channel in head]
    for letter in ("k", "v"):
        role = roles[letter]
        taken += [(role.producer.node, channel) for head in role.channels for channel in head]
    if len(set(taken)) != len(taken):
        name = roles["q"].producer.fqn
        raise TraceError(f"its forward holds several attentions that share {name}, so that none can give it up")


def _numbered(operand: _Operand, role: Role) -> torch.Tensor:
    """For each leading position of one core: which of the role's heads stands there."""
    return torch.tensor([role.channels.index(head) for head in operand.heads])[operand.places]


def _refuse_shared(members: list[TracedSite]) -> None:
    """Attentions of one graph must not share weights: each gives up its own.

    Raises:
        TraceError: they do.
    """
    taken: set[str] = set()
    for member in members:
        names = {role.producer.fqn for role in (member.q, member.k, member.v)}
        shared = sorted(taken & names)
        if shared:
            raise TraceError(
                f"its forward holds several attentions that share {shared[0]}, so that none can give it up"
            )
        taken |= names


def _refuse_read(core: Core, reason: TraceError, members: list[TracedSite], followed: list[_Followed]) -> None:
    """Refuse a graph in which a core that could not be followed takes something of what is going to be shared.

    Raises:
        TraceError: the reason why the core could not be followed.
    """
    makers = {role.producer.node for member in members for role in (member.q, member.k, member.v)}
    for maker in followed:
        if maker.producer.node in makers and not maker.flow.keys().isdisjoint((core.q, core.k, core.v)):
            raise reason


def _maker_of(target: fx.Node, followed: list[_Followed], name: str) -> _Followed:
    """The one projection whose numbers reach an operand of the core."""
    makers = [maker for maker in followed if isinstance(maker.flow.get(target), torch.Tensor)]
    if not makers:
        raise TraceError(f"no Linear or convolution was found behind its {name}")
    if len(makers) > 1:
        names = ", ".join(maker.producer.fqn for maker in makers)
        raise TraceError(f"its {name} are made by several projections ({names})")
    return makers[0]
