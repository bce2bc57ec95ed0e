"""q, k and v of an attention core: which channel of which projection is which head and dimension."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from armour_surgery.discover.channels import Channels
from armour_surgery.discover.layout import OTHER, Flow, find_layout, follow
from armour_surgery.discover.match import inputs_of
from armour_surgery.errors import TraceError
from armour_surgery.traced import Anchor, Core, Layout, Producer, Role, Trace

__all__ = ["Followed", "Operand", "follow_all", "operands_of", "role_of", "unprojected_role"]

_NAMES = {"q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True)
class Followed:
    """A projection, what becomes of its elements, and what tells their channels.

    `counted` tells of a node how many elements of each channel it holds; None where it is no tensor.
    """

    producer: Producer
    flow: Flow
    channels: Channels
    counted: Callable[[fx.Node], torch.Tensor | None]


@dataclass(frozen=True)
class Operand:
    """Q, K or V of one core: its heads' channels, and for each leading position of the core which head it is."""

    maker: Followed
    heads: list[tuple[int, ...]]
    places: torch.Tensor


def follow_all(
    trace: Trace, producers: list[Producer], modules: dict[str, nn.Module], above: set[fx.Node]
) -> list[Followed]:
    """Follow the channels of every projection; operations are tried out among the nodes `above` the cores alone."""
    barriers: set[fx.Node] = set()
    for producer in producers:
        barriers |= {producer.node, *producer.chain}
    followed = []
    for producer in producers:
        channels = Channels(_inner(producer), producer.channels, modules, above)
        flow = follow(trace.graph, producer.node, barriers, channels=channels)
        followed.append(Followed(producer, flow, channels, _counting(flow, producer, channels)))
    return followed


def operands_of(core: Core, followed: list[Followed]) -> tuple[dict[str, Operand], str]:
    """Q, K and V of a core by their letters; Q may be missing, with the reason why it is not followed.

    Raises:
        TraceError: K or V cannot be followed.
    """
    operands: dict[str, Operand] = {}
    unprojected: TraceError | None = None
    for letter in _NAMES:
        try:
            operands[letter] = _operand(core, letter, followed)
        except TraceError as error:
            # Modes that leave queries alone need not know where they come from; what keys are made of they do.
            if letter != "q":
                raise unprojected or error from None
            unprojected = error
    return operands, str(unprojected or "")


def _operand(core: Core, letter: str, followed: list[Followed]) -> Operand:
    target: fx.Node = getattr(core, letter)
    maker = _maker_of(target, followed, _NAMES[letter])
    heads, places = _heads(target, getattr(core, f"{letter}_axes"), maker, letter)
    return Operand(maker, heads, places)


def role_of(letter: str, operands: list[Operand]) -> Role:
    """The role of that letter in cores that have the same projections; heads in the order of the cores.

    Raises:
        TraceError: heads overlap, or are of different sizes.
    """
    maker = operands[0].maker
    producer, flow = maker.producer, maker.flow
    heads = list(dict.fromkeys(itertools.chain.from_iterable(operand.heads for operand in operands)))
    used = list(itertools.chain.from_iterable(heads))
    if len(set(used)) != len(used):
        raise TraceError(f"its {_NAMES[letter]} use a channel in more than one place")
    if len(set(map(len, heads))) > 1:
        raise TraceError(f"the heads of its {_NAMES[letter]} differ in their numbers of channels")
    holds = _holding(maker.counted, producer, heads)
    anchors, whole = _anchors(flow, producer, heads, holds)
    value = producer.node.meta["value"]
    tokens = value.numel() // producer.channels // value.shape[0]
    return Role(producer, tuple(heads), anchors, whole, tokens, _ends(flow, producer, heads, holds))


def unprojected_role(core: Core, num_heads: int) -> Role:
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


def _maker_of(target: fx.Node, followed: list[Followed], name: str) -> Followed:
    """The one projection whose numbers reach an operand of the core."""
    makers = [maker for maker in followed if isinstance(maker.flow.get(target), torch.Tensor)]
    if not makers:
        raise TraceError(f"no Linear or convolution was found behind its {name}")
    if len(makers) > 1:
        names = ", ".join(maker.producer.fqn for maker in makers)
        raise TraceError(f"its {name} are made by several projections ({names})")
    return makers[0]


def _heads(
    target: fx.Node, axes: tuple[int, int], followed: Followed, letter: str
) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Channels of each head in order of appearance, and for each leading position of the core which head it is."""
    numbers, channels = followed.flow[target], followed.channels
    shape = numbers.movedim(axes, (-2, -1)).shape
    fewer = followed.flow.separable.one_of_each(numbers, channels.inner, channels.count)
    channel = channels.of(fewer).movedim(axes, (-2, -1))
    channel = channel.expand(*channel.shape[:-1], shape[-1])
    # Tokens that were padded, or that stand beside these (registers, a learned bias), have none and stay what they are.
    line = channel.amax(-2, keepdim=True)
    # A dimension of a head must be the same channel at every token; in cross-covariance attention (XCiT) it is not.
    if bool(((channel != line) & (channel != OTHER)).any()):
        raise TraceError(f"its {_NAMES[letter]} attend over channels, not over tokens")
    if bool((line == OTHER).any()):
        raise TraceError(f"only some channels of its {_NAMES[letter]} are made by {followed.producer.fqn}")
    lines = line.reshape(-1, channel.shape[-1])
    order: dict[tuple[int, ...], int] = {}
    places = [order.setdefault(tuple(line), len(order)) for line in lines.tolist()]
    return list(order), torch.tensor(places).reshape(channel.shape[:-2]).expand(shape[:-2])


def _inner(producer: Producer) -> int:
    """How many elements of a producer's output lie between one channel and the next."""
    shape: torch.Size = producer.node.meta["value"].shape
    return shape[producer.axis % len(shape) + 1 :].numel()


def _layout(node: fx.Node, flow: Flow, producer: Producer, heads: list[tuple[int, ...]]) -> Layout | None:
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
    sizes |= {"h": len(heads), "j": len(heads[0])}
    return find_layout(flow[node], coordinates, sizes, flow.separable)


def _counting(flow: Flow, producer: Producer, channels: Channels) -> Callable[[fx.Node], torch.Tensor | None]:
    """Tells of a node how many elements of each of a producer's channels it holds; None where it is no tensor."""
    # Going over millions of numbers takes longer than all the rest, and most nodes only put them elsewhere.
    of_each = producer.node.meta["value"].numel() // producer.channels
    counts = {producer.node: torch.full((producer.channels,), of_each)}

    def count(node: fx.Node) -> torch.Tensor | None:
        numbers = flow[node]
        if not isinstance(numbers, torch.Tensor):
            return None
        first = flow.first_with[node]
        if first not in counts:
            fewer = flow.separable.one_of_each(numbers, channels.inner, channels.count)
            held = torch.bincount(channels.of(fewer).flatten(), minlength=producer.channels)
            counts[first] = held * (numbers.numel() // max(fewer.numel(), 1))
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
    placed = tuple(Anchor(node, _layout(node, flow, producer, heads)) for node in anchors)
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
            ends.append(Anchor(node, _layout(node, flow, producer, heads)))
    return tuple(ends)
