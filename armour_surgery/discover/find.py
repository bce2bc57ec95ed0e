"""Find every attention of a model by dataflow: run it once, follow q, k and v back to their projections.

Nothing here knows a class or an attribute of any model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from armour_surgery.altered import names_below, why_computed, why_stuck
from armour_surgery.discover.gates import Gate, MadeOutside
from armour_surgery.discover.nodes import value_of
from armour_surgery.discover.output import output_of
from armour_surgery.discover.provenance import understand
from armour_surgery.discover.record import Recording, record
from armour_surgery.discover.trace import trace
from armour_surgery.errors import NoAttentionError, TraceError
from armour_surgery.hosts.attention_interface import attention_of_chunks
from armour_surgery.modes import judge
from armour_surgery.records import AttentionSite, Projection, RefusedSite
from armour_surgery.traced import Call, FoundSite, Inside, OutputProjection, Role, SeenSite, Trace, TracedSite

__all__ = ["describe_site", "find_sites", "trace_call"]


def trace_call(module: nn.Module, call: Call, inside: Inside) -> TracedSite:
    """Follow one call of an attention module in its present state (train or eval).

    Raises:
        TraceError: it cannot be followed; the message says why, in a user's words.
    """
    modules = dict(module.named_modules())

    def trace_inside(name: str, node: fx.Node) -> Trace:
        inner = Call(tuple(value_of(node.args)), dict(value_of(node.kwargs)))
        return trace(modules[name], inner, lambda child, _: not _holds_layers(modules[name].get_submodule(child)))

    def retrace(inlined: set[str]) -> Trace:
        return trace(module, call, lambda name, _: name not in inside.around and name not in inlined)

    return understand(retrace(set()), modules, trace_inside, retrace, inside.others)


def _holds_layers(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d) for child in module.modules())


def _projection(role: Role, prefix: str) -> Projection:
    name, first = role.producer.fqn, role.producer.first_row
    channels = role.channels
    if first:  # a slice of a parameter: told by its rows
        channels = tuple(tuple(first + channel for channel in head) for head in channels)
    return Projection(f"{prefix}.{name}" if prefix else name, channels, role.tokens)


def _kind(traced: TracedSite) -> str:
    """How the tokens that ask relate to the tokens that are asked."""
    q, k = traced.q, traced.k
    if q.producer.reads == k.producer.reads:
        return "self-attention"
    asked, asking = _sources(traced, k), _sources(traced, q)
    if q.tokens < k.tokens and asked[0] in asking:
        return "downsampling"
    if q.tokens > k.tokens and asking[0] in asked:
        return "reduced keys"
    return "cross-attention"


def describe_site(fqn: str, traced: TracedSite) -> AttentionSite:
    """What was understood of one call, as users see it: sizes, projections, and the modes that fit.

    Where a graph holds several attentions, these are the first one's, with the modes that fit all of them.
    """
    first, *others = (_describe(fqn, member) for member in traced.members)
    for other in others:
        first = _fitting_both(first, other, "it holds several attentions, and for one of them")
    if traced.is_single:
        return first
    heads = sum(member.q.num_heads for member in traced.members)
    reason = "it attends in several places, and this mode adds a projection to one"
    alone = {mode: reason for mode in first.modes if mode.startswith("grouped")}
    return _without(replace(first, num_heads=heads), alone)


def _describe(fqn: str, traced: TracedSite) -> AttentionSite:
    q, k, v = traced.q, traced.k, traced.v
    site = AttentionSite(
        fqn=fqn,
        kind=_kind(traced),
        num_heads=q.num_heads,
        key_dim=q.head_dim,
        value_dim=v.head_dim,
        q=_projection(q, fqn) if not traced.unprojected else None,
        k=_projection(k, fqn),
        v=_projection(v, fqn),
        reads={"q": q.producer.reads, "k": k.producer.reads, "v": v.producer.reads},
        plain_value_projection=v.producer.plain,
        unprojected=traced.unprojected,
    )
    modes, refused = judge(site)
    site = replace(site, modes=modes, refused=refused)
    for core in traced.cores:
        asking = core.q.meta["value"].shape[core.q_axes[0]]
        asked = core.k.meta["value"].shape[core.k_axes[0]]
        if asking != asked:
            reason = (
                f"{asking} tokens ask {asked} keys (some of either are pooled, or added to them), so there is no "
                "diagonal to take out; use qk"
            )
            site = _without(site, {"qk-diag": reason})
        elif core.node.target is attention_of_chunks:
            reason = (
                "its attention takes images packed into one sequence, and no mask that the diagonal could be taken out "
                "with; use qk"
            )
            site = _without(site, {"qk-diag": reason})
    return site


def _sources(traced: TracedSite, role: Role) -> list[str]:
    """The tensor that a role is projected from, and all it is computed from, nearest first."""
    first = role.producer.reads.partition(" ")[0]
    waiting = [node for node in traced.trace.graph.nodes if node.name == first]
    names: list[str] = []
    for node in waiting:  # it grows on the way: breadth first, so that the nearest come first
        names.append(node.name)
        for source in node.all_input_nodes:
            if source not in waiting:
                waiting.append(source)
    return names


def _inside(recording: Recording, place: str, fqn: str, gates: Sequence[str]) -> Inside:
    """What is inside of `place`, where the attention of module `fqn` is looked for."""
    around = set(recording.innermost[fqn])
    others = set()
    for name, running in recording.innermost.items():
        if name in gates:
            around |= running  # it may weigh what becomes a query
        elif name != fqn:
            others.add(name)
    return Inside(_relative(around, place), _relative(others, place))


def _relative(names: set[str], fqn: str) -> frozenset[str]:
    prefix = f"{fqn}." if fqn else ""
    return frozenset(name[len(prefix) :] for name in names if name.startswith(prefix) and name != fqn)


# What every nn.Module has: how it is stored, and nothing that its forward depends on.
_BOOKKEEPING = set(vars(nn.Module()))


def _fingerprint(module: nn.Module, call: Call, inside: Inside) -> str:
    """All that can make the traces of two modules differ: classes, plain attributes, shapes, and the call."""
    lines = [str(sorted(inside.around)), str(sorted(inside.others))]
    # Where arguments are one tensor they are one input of the graph: `a(x, x, x)` is another call than `a(q, q, x)`.
    places: dict[int, int] = {}
    for place, leaf in enumerate(pytree.tree_leaves((call.args, call.kwargs))):
        same = places.setdefault(id(leaf), place) if isinstance(leaf, torch.Tensor) else place
        lines.append(f"{same} {_plain(leaf)}")
    for name, child in module.named_modules():
        lines.append(f"{name} {type(child).__module__}.{type(child).__qualname__}")
        values = {key: value for key, value in vars(child).items() if key not in _BOOKKEEPING}
        values.update(child._parameters)
        values.update(child._buffers)
        for key, value in sorted(values.items()):
            lines.append(f"{key}={_plain(value)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """What of a value a trace can depend on."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    if value is None or isinstance(value, bool | int | float | str | tuple | list):
        return repr(value)
    # Caches fill while a model runs. Functions are one object for all instances; other objects count by identity.
    return "" if isinstance(value, dict) else f"{type(value).__qualname__} {id(value)}"


@dataclass(frozen=True)
class _Followed:
    """What sites that are alike share: their graph, and where their heads' results go, found when it is asked for."""

    traced: TracedSite
    find_output: Callable[[], OutputProjection | None]


def _follow_once(module: nn.Module, call: Call, inside: Inside) -> _Followed | TraceError:
    try:
        traced = trace_call(module, call, inside)
    except TraceError as error:
        return error
    return _Followed(traced, cache(partial(output_of, module, call, traced.v)))


def _follow(
    recording: Recording, fqn: str, gates: Sequence[str], known: dict[str, _Followed | TraceError]
) -> SeenSite | None:
    """Follow the attention seen in module `fqn`, from the module around it where its projections are not inside.

    None where it is no attention but a gate, as those in `gates` are.
    """
    modules = dict(recording.model.named_modules())
    reason: str | None = None
    place = fqn
    while True:
        calls, inside = recording.calls[place], _inside(recording, place, fqn, gates)
        # A module that is called several times in one run, in different ways, has to be followed in each of them.
        kinds: dict[str, _Followed | TraceError] = {}
        for call in calls:
            key = _fingerprint(modules[place], call, inside)
            if key not in known:
                known[key] = _follow_once(modules[place], call, inside)
            kinds.setdefault(key, known[key])
        followed, *others = kinds.values()
        if isinstance(followed, _Followed):
            site = describe_site(place, followed.traced)
            for other in others:
                if isinstance(other, TraceError):
                    return RefusedSite(
                        place, f"it is called in several ways, and one of them cannot be followed: {other}"
                    )
                described = describe_site(place, other.traced)
                site = _fitting_both(site, described, "it is called in several ways, and in one of them")
            return FoundSite(site, calls[0], inside, followed.traced, "\n\n".join(kinds), followed.find_output)
        if isinstance(followed, Gate):
            return None
        # What the innermost module says is what a user can act on, whatever the modules around it say; but not where
        # it says no more than that it is a part.
        outside = isinstance(followed, MadeOutside)
        reason = reason or (None if outside and place else str(followed))
        if reason is not None and (not place or "was found behind" not in reason):
            return RefusedSite(fqn, reason)
        place = place.rpartition(".")[0]
        while place not in recording.calls:  # a ModuleList or ModuleDict is never called
            place = place.rpartition(".")[0]
        # Where other modules attend too, it is no part of one attention any more, but of a model.
        if any(other != fqn and _lies_in(other, place) for other in recording.innermost):
            return RefusedSite(fqn, reason or str(followed))


def _lies_in(name: str, place: str) -> bool:
    return not place or name == place or name.startswith(f"{place}.")


def _fitting_both(site: AttentionSite, other: AttentionSite, why: str) -> AttentionSite:
    """A site with the modes that fit another attention, too, that is converted with it."""
    return _without(site, {mode: f"{why} {reason}" for mode, reason in other.refused.items()})


def _without(site: AttentionSite, refused: dict[str, str]) -> AttentionSite:
    """A site with some modes refused, besides those that are."""
    together = refused | site.refused
    return replace(site, modes=tuple(mode for mode in site.modes if mode not in together), refused=together)


def _unaltered(model: nn.Module, site: SeenSite) -> SeenSite:
    """The site, refused if something was done to its modules from outside; the copy that ran may not have shown it."""
    reason = why_stuck(model, site.fqn)
    if reason is None and isinstance(site, RefusedSite):
        reason = why_computed(model, names_below(model, site.fqn))
    elif reason is None and isinstance(site, FoundSite):
        reason = why_computed(model, _projections(site))
    return site if reason is None else RefusedSite(site.fqn, reason)


def _projections(found: FoundSite) -> list[str]:
    """The modules that hold the weights of q, k and v."""
    names: dict[str, None] = {}
    for role in found.traced.roles:
        for tensor in role.producer.rows:
            names[".".join(filter(None, (found.fqn, tensor.rpartition(".")[0])))] = None
    return list(names)


def find_sites(model: nn.Module, example: dict[str, Any]) -> list[SeenSite]:
    """All attention of a model, in the order it runs. The model itself is not run and not changed.

    What could not be followed is there with the reason. `example` are keyword arguments for the model's forward; only
    their shapes and types matter.

    Raises:
        ExampleInputError: the model does not run on the example.
        NoAttentionError: it runs, and no attention happened.
    """
    with torch.no_grad():
        recording = record(model, example)
        gates: list[str] = []
        followed: dict[str, SeenSite] = {}
        known: dict[str, _Followed | TraceError] = {}
        # What lies inside of others comes first: whether it is attention of its own decides what is a part of theirs.
        for fqn in sorted(recording.innermost, key=_depth, reverse=True):
            found = _follow(recording, fqn, gates, known)
            unknown = recording.unknown.get(fqn)
            if unknown is not None and not isinstance(found, FoundSite):
                found = RefusedSite(fqn, unknown)
            if found is None:
                gates.append(fqn)
            else:
                followed[fqn] = found
        sites: dict[str, SeenSite] = {}
        for fqn in recording.innermost:
            if fqn not in followed:
                continue
            site = _unaltered(model, followed[fqn])
            # Two modules inside one attention may lead to the same module around them.
            sites.setdefault(site.fqn, site)
    if not sites:
        raise _no_attention(model, gates)
    return list(sites.values())


def _depth(fqn: str) -> int:
    return len(fqn.split(".")) if fqn else 0


def _no_attention(model: nn.Module, gates: list[str]) -> NoAttentionError:
    seen = "no softmax between two matrix products, no scaled_dot_product_attention"
    if gates:
        seen = (
            f"a softmax in {gates[0] or 'the model itself'}"
            + (f" and {len(gates) - 1} more" if len(gates) > 1 else "")
            + " weighs what one layer made, which is a gate: there is no softmax of a product of queries and keys"
        )
    return NoAttentionError(
        f"{type(model).__name__} ran and computed no attention ({seen}): there is nothing to convert. Name a Vision "
        "Transformer"
    )
