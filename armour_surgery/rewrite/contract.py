"""The state that the passes work on, and the contract they keep."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import fx

from armour_surgery.errors import PostconditionError
from armour_surgery.modes import Mode
from armour_surgery.rewrite.edits import Edit
from armour_surgery.traced import Producer, Results, Role, TracedSite

__all__ = ["Block", "Part", "Pass", "Surgery", "parts_of", "run_passes", "width_of"]


@dataclass(frozen=True)
class Part:
    """Dimensions `start` to `stop` of a role's every head ("q", "k", "v"), or of a new grouped projection."""

    letter: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Channels per head."""
        return self.stop - self.start


@dataclass(frozen=True)
class Block:
    """Where a part's channels are in the output of `node` (channels at `axis`).

    With `stride` 0 they are one block from `offset` on, heads outermost. Otherwise the output is packed head by head,
    `stride` channels each, and the part starts at `offset` inside every head.
    """

    node: fx.Node
    axis: int
    offset: int
    stride: int = 0

    def channel(self, head: int, dimension: int, size: int) -> int:
        """Output channel of a head's dimension, for a part of `size` channels a head."""
        return self.offset + dimension + head * (self.stride or size)


@dataclass
class Surgery:
    """One site under rewriting. Passes change `graph`, and list in `edits` what has to happen to the module.

    `results` is there where heads get fewer channels than they had: the way of what they find. `fixed` is the part
    that gets a projection with a fixed gauge, if one does. `kept` has, for each projection that lost output channels,
    those that it still has, in their new order.
    """

    traced: TracedSite
    mode: Mode
    graph: fx.Graph
    query: Part
    key: tuple[Part, ...]
    value: tuple[Part, ...]
    results: Results | None = None
    fixed: Part | None = None
    edits: list[Edit] = field(default_factory=list)
    blocks: dict[Part, Block] = field(default_factory=dict)
    kept: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)

    def role(self, letter: str) -> Role:
        """The role of that letter, as discovered; a grouped part stands in for channels of v.

        Where heads get fewer channels, its anchors are its ends: views before them may count on the old number.
        """
        # What is grouped has another letter ("grouped"), and V's heads and axes.
        role: Role = getattr(self.traced, letter if letter in ("q", "k") else "v")
        if self.results is None:
            return role
        return replace(role, anchors=role.ends, whole=role.whole and bool(role.ends))

    def parts(self) -> list[Part]:
        """Everything that is still needed, in the order q, k, v, new."""
        needed = {self.query, *self.key, *self.value}
        # `find` gives -1 for a new part: it comes after v, its channels are made by a projection of its own.
        return sorted(needed, key=lambda part: ("qkv".find(part.letter[0]) % 4, part.start))

    def producers(self) -> list[Producer]:
        """The projections of the site, each once."""
        by_node: dict[fx.Node, Producer] = {}
        for role in (self.traced.q, self.traced.k, self.traced.v):
            if role.producer.rows:  # not where Q is nobody's output
                by_node[role.producer.node] = role.producer
        return list(by_node.values())

    def channels(self, part: Part) -> list[int]:
        """Old output channels of a part in its producer, heads outermost."""
        channels: list[int] = []
        for head in self.role(part.letter).channels:
            channels += head[part.start : part.stop]
        return channels

    def rows(self, part: Part) -> tuple[int, ...]:
        """Where the channels of a part are in the tensors of its producer, heads outermost."""
        first = self.role(part.letter).producer.first_row
        return tuple(first + channel for channel in self.channels(part))

    def parts_in(self, node: fx.Node) -> dict[Part, Block]:
        """The parts whose channels are in the output of a node, and where."""
        return {part: block for part, block in self.blocks.items() if block.node is node}


class Pass(Protocol):
    """One rewrite. `requires` and `ensures` raise `PostconditionError`; `__call__` says whether it changed anything."""

    def requires(self, surgery: Surgery) -> None:
        """Check what the pass builds on."""

    def __call__(self, surgery: Surgery) -> bool:
        """Do the rewrite."""

    def ensures(self, surgery: Surgery) -> None:
        """Check what the pass promises."""


def parts_of(names: tuple[str, ...], own: str, sizes: dict[str, int]) -> tuple[Part, ...]:
    """Resolve a mode's role, such as ("q", "v"), into parts that fill `sizes[own]` dimensions one after the other."""
    filled, parts = 0, []
    for name in names:
        if filled < sizes[own]:
            # A role's own channels stay where they were; others bring theirs from the first on.
            start = filled if name == own or name not in sizes else 0
            stop = sizes[own] if name == own or name not in sizes else min(sizes[name], sizes[own] - filled)
            parts.append(Part(name, start, stop))
            filled += stop - start
    if filled < sizes[own]:
        parts.append(Part(own, filled, sizes[own]))
    return tuple(parts)


def width_of(parts: Iterable[Part]) -> int:
    """Channels per head of some parts together."""
    return sum(part.size for part in parts)


def run_passes(surgery: Surgery, passes: Iterable[Pass]) -> None:
    """Run the passes in order, each with its checks.

    Raises:
        PostconditionError: a check failed; nothing has happened to any module yet.
    """
    # Checks change nothing, so what one pass left is what the next one finds.
    before = str(surgery.graph)
    for graph_pass in passes:
        graph_pass.requires(surgery)
        modified = graph_pass(surgery)
        after = str(surgery.graph)
        # A pass that says nothing happened, and is wrong, has done something that its `ensures` does not know of.
        if modified != (after != before):
            raise PostconditionError(f"{type(graph_pass).__name__} misreported whether it changed the graph")
        graph_pass.ensures(surgery)
        before = after
