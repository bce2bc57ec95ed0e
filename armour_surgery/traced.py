"""What discovery hands to rewriting: one attention module as a graph, and where its q, k and v come from.

Words: a *producer* is the node whose output channels are (some of) q, k and v: the call of a Linear, of a 1x1
convolution, of a container around one (LeViT's Linear and BatchNorm), or an `F.linear` on parameters. An *anchor* is
the first node that holds exactly one role's channels, and nothing has acted on them yet but layout. A *layout* tells,
axis by axis, what an anchor's axes run over, in *atoms*: an integer for the producer's own axis of that number, "h"
for heads, "j" for a head's dimensions. `(0,), ("h",), (1,), ("j",)` is `[B, H, N, d]`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from armour_surgery.records import AttentionSite, RefusedSite

__all__ = [
    "Anchor",
    "Atom",
    "BiasPiece",
    "Call",
    "Core",
    "FoundSite",
    "FunctionReference",
    "Handover",
    "Layout",
    "OutputProjection",
    "Producer",
    "Results",
    "Role",
    "SeenSite",
    "Signature",
    "Trace",
    "TracedSite",
    "rows_of",
]

Atom = int | str
Layout = tuple[tuple[Atom, ...], ...]


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments as the host passed them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class FunctionReference:
    """A function that is an argument of a node. It prints as its name, which is how generated code refers to it."""

    function: Callable[..., Any]

    def __repr__(self) -> str:
        return self.function.__name__


@dataclass(frozen=True)
class Signature:
    """How a module was called: what of the call is data, and what was fixed while tracing.

    `conditions` are Python expressions over the arguments (and `self`) that hold exactly for this call;
    `preamble` unpacks nested arguments, (name, expression) each; `objects` are globals that the conditions name.
    """

    header: str
    conditions: tuple[str, ...]
    preamble: tuple[tuple[str, str], ...]
    objects: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """The graph of one call. Every node carries its value in that call (on meta) in `node.meta["value"]`."""

    graph: fx.Graph
    signature: Signature


@dataclass(frozen=True)
class Core:
    """The attention core: softmax(q k^T) v. Axes are (token axis, channel axis) of each operand.

    `kind` is "sdpa", "interface" (an attention function of the library, called with q, k, v) or "softmax".
    `node` is the call itself, or the softmax.
    """

    kind: str
    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    q_axes: tuple[int, int]
    k_axes: tuple[int, int]
    v_axes: tuple[int, int]


@dataclass(frozen=True)
class BiasPiece:
    """A part of a bias that the host puts together by concatenation: rows `start` to `stop` come from `node`.

    That holds rows of the parameter or buffer `tensor`, from `first_row` on; None where it holds zeros made on the fly.
    """

    node: fx.Node
    start: int
    stop: int
    tensor: str | None = None
    first_row: int = 0


@dataclass(frozen=True)
class Producer:
    """A projection in the graph.

    `node` is the last node of which the output channels are still whole and in order (after a bias that is added
    separately). `rows` are the parameters and buffers with one row per output channel, `sizes` the module attributes
    that state their number; both by name inside the site. Channel c is row `first_row + c` of them: a host may apply a
    slice of a parameter (`nn.MultiheadAttention` where queries are not keys). `bias` lists the pieces of a concatenated
    bias. `plain` says it is one Linear or 1x1 convolution. `out_axes` are the weight's axes that together run over the
    output channels, the slowest first, where that is not the first axis alone (`x @ weight`).
    """

    node: fx.Node
    fqn: str
    reads: str
    axis: int
    channels: int
    rows: tuple[str, ...]
    sizes: tuple[tuple[str, str], ...]
    bias: tuple[BiasPiece, ...]
    weight: str
    plain: bool
    chain: tuple[fx.Node, ...] = ()
    first_row: int = 0
    out_axes: tuple[int, ...] = ()


def rows_of(tensor: torch.Tensor, out_axes: tuple[int, ...]) -> torch.Tensor:
    """A weight as `[out, ..]`, whichever axes run over its outputs (see `Producer.out_axes`)."""
    if not out_axes:
        return tensor
    front = tensor.movedim(out_axes, tuple(range(len(out_axes))))
    return front.flatten(0, len(out_axes) - 1)


@dataclass(frozen=True)
class Anchor:
    """A node that holds exactly the channels of one role, and how its axes are laid out (None: not expressible)."""

    node: fx.Node
    layout: Layout | None


@dataclass(frozen=True)
class Role:
    """q, k or v: channel `channels[h][j]` of `producer` is dimension j of head h.

    `whole` says that everything which uses these channels goes through the anchors. `ends` are the last nodes that
    layout alone leads to; everything goes through them too, if there are any.
    """

    producer: Producer
    channels: tuple[tuple[int, ...], ...]
    anchors: tuple[Anchor, ...]
    whole: bool
    tokens: int
    ends: tuple[Anchor, ...] = ()

    @property
    def num_heads(self) -> int:
        """Heads of this role."""
        return len(self.channels)

    @property
    def head_dim(self) -> int:
        """Channels per head of this role."""
        return len(self.channels[0])


@dataclass(frozen=True)
class OutputProjection:
    """The Linear or 1x1 convolution that reads the heads' results: `channels[h][j]` of its input is dimension j of h.

    `weight`, `bias` and `norm` (a BatchNorm that follows it) are names inside the site; the last two may be None.
    """

    weight: str
    bias: str | None
    norm: str | None
    channels: tuple[tuple[int, ...], ...]

    def narrowed(self, rank: int | None) -> "OutputProjection":
        """The same where only the first `rank` dimensions of every head are left, in their old order."""
        kept: list[int] = []
        for head in self.channels:
            kept += head[:rank]
        kept.sort()
        place = {channel: index for index, channel in enumerate(kept)}
        heads = []
        for head in self.channels:
            heads.append(tuple(place[channel] for channel in head[:rank]))
        return replace(self, channels=tuple(heads))


@dataclass(frozen=True)
class Handover:
    """A node on the way of the heads' results that something other than a layout operation reads (`readers`).

    Layout operations alone lead from `start` to `node`. Atoms are integers for the core result's own axes, "h" and "j".
    """

    start: Anchor
    node: fx.Node
    layout: Layout
    readers: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Results:
    """The way of the heads' results from the core to the output projection, in the order of the graph.

    On it are layout operations, changes of type, dropout and nothing else.
    """

    handovers: tuple[Handover, ...]
    projection: OutputProjection


@dataclass(frozen=True)
class TracedSite:
    """One call of an attention module, understood.

    `cores` are several where a host attends head by head: each has some of the roles' heads. `others` are attentions in
    the same graph that have projections of their own. `unprojected` says why Q is not the output of one projection (a
    learned query is none at all); the producer of `q` then has no weights, and stands for the core's operand itself. It
    is empty otherwise.
    """

    trace: Trace
    cores: tuple[Core, ...]
    q: Role
    k: Role
    v: Role
    unprojected: str = ""
    others: tuple["TracedSite", ...] = ()

    @property
    def core(self) -> Core:
        """The core, or the first of several."""
        return self.cores[0]

    @property
    def members(self) -> tuple["TracedSite", ...]:
        """This attention, and the others in its graph."""
        return (replace(self, others=()), *self.others)

    @property
    def roles(self) -> tuple[Role, ...]:
        """q, k and v of all attentions in the graph."""
        return tuple(role for member in self.members for role in (member.q, member.k, member.v))

    @property
    def is_single(self) -> bool:
        """Whether there is one core, which all heads are in."""
        return len(self.cores) == 1 and not self.others

    def copied(self) -> "TracedSite":
        """The same on a copy of the graph, which may be rewritten. The values of nodes are shared."""
        old, new = self.trace.graph, fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in old.nodes:
            copies[node] = new.node_copy(node, copies.__getitem__)
        # deepcopy goes through everything that holds nodes, and finds these by the identity of the old ones.
        memo: dict[int, Any] = {id(node): twin for node, twin in copies.items()}
        memo[id(old)] = new
        memo[id(self.trace.signature)] = self.trace.signature
        return copy.deepcopy(self, memo)


@dataclass(frozen=True)
class Inside:
    """What a run showed of a site's own submodules.

    `around` were running while its attention was computed; `others` are attention of their own, and no part of it.
    """

    around: frozenset[str]
    others: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FoundSite:
    """A site, the call it was seen in, and its graph.

    Sites with equal `fingerprint` have equal structure and were called alike; they share `traced` and `find_output`,
    which traces on to the projection that reads the heads' results when it is called for the first time.
    """

    site: AttentionSite
    call: Call
    inside: Inside
    traced: TracedSite
    fingerprint: str
    find_output: Callable[[], OutputProjection | None]

    @property
    def fqn(self) -> str:
        """The site's name inside the model."""
        return self.site.fqn

    @property
    def output(self) -> OutputProjection | None:
        """The projection that reads the heads' results; None where it is not inside the module."""
        return self.find_output()


# What came of one attention that was seen: it was followed, or the reason why not.
SeenSite = FoundSite | RefusedSite


@dataclass(frozen=True)
class HiddenRows:
    """The channels of a projection in front of an MLP's hidden ones.

    `tensors` have a row per channel: its weight, bias and a BatchNorm after it. `sizes` are (module, attribute) that
    state their number. Each of `pieces` has one channel for every hidden one: gated units read two of them.
    """

    weight: str
    tensors: tuple[str, ...]
    sizes: tuple[tuple[str, str], ...]
    pieces: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class FoundMlp:
    """Projections `firsts`, something that acts on each of `hidden` channels alone, and the projection `second`.

    Names are those in the model; `fqn` is the innermost module that holds all of it.
    """

    fqn: str
    hidden: int
    firsts: tuple[HiddenRows, ...]
    second: str

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights that get narrower."""
        return (*(first.weight for first in self.firsts), f"{self.second}.weight")
