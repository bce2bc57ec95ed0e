"""From the attention core back to the projections: which of them make the heads of which attention."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx, nn

from armour_surgery.discover.gates import judge_softmax
from armour_surgery.discover.match import all_above, find_cores
from armour_surgery.discover.producers import TraceInside, find_producers
from armour_surgery.discover.products import take_biases_apart, write_as_linear
from armour_surgery.discover.record import is_builtin
from armour_surgery.discover.roles import Followed, Operand, follow_all, operands_of, role_of, unprojected_role
from armour_surgery.errors import TraceError
from armour_surgery.traced import Core, Role, Trace, TracedSite

__all__ = ["understand"]


def understand(
    trace: Trace,
    modules: dict[str, nn.Module],
    trace_inside: TraceInside,
    retrace: Callable[[set[str]], Trace],
    others: frozenset[str],
) -> TracedSite:
    """Name the projections behind q, k and v of a traced attention module, channel by channel.

    `modules` are the site's modules by name. `trace_inside(name, node)` traces one of them for the call that `node`
    makes; `retrace(names)` traces the site again and looks into the named modules, which are none of `others`.

    Raises:
        TraceError: the core or a projection was not found; the message is meant for users.
    """
    closed = set(others)  # and what was looked into already: it has nothing more to show
    # Products with parameters are projections where there are no others: a product may also rotate queries.
    as_linear = False
    fallback: TracedSite | None = None
    while True:
        cores = find_cores(trace.graph, modules)
        if not cores:
            # A module of the host's own may hold the softmax, or a product.
            hidden = _written_by_others(modules, set(trace.graph.nodes)) - closed
            if not hidden:
                raise judge_softmax(trace.graph, modules)
            closed |= hidden
            try:
                trace = retrace(closed - others)
            except TraceError:
                raise judge_softmax(trace.graph, modules) from None
            continue
        take_biases_apart(trace.graph)
        above: set[fx.Node] = set()
        for core in cores:
            above |= all_above(core.q) | all_above(core.k) | all_above(core.v)
        producers, opaque = find_producers(trace, modules, above, trace_inside)
        hidden = set(opaque) - closed
        if not hidden:
            found: TracedSite | TraceError
            try:
                found = _assign(trace, cores, follow_all(trace, producers, modules, above))
            except TraceError as error:
                found = error
            if isinstance(found, TracedSite) and not any(member.unprojected for member in found.members):
                return found
            # What stands in the way may be a module without layers: a rearrangement, a Linear of the host's own.
            hidden = _written_by_others(modules, above) - closed
            if not hidden and as_linear:
                if isinstance(found, TraceError) and fallback is None:
                    raise found
                return fallback or found  # type: ignore[return-value]
            if not hidden:
                as_linear = True
                fallback = found if isinstance(found, TracedSite) else None
        closed |= hidden
        trace = retrace(closed - others)
        if as_linear:
            write_as_linear(trace.graph)


def _written_by_others(modules: dict[str, nn.Module], nodes: set[fx.Node]) -> set[str]:
    """The modules called among some nodes that are none of torch's own."""
    names = {str(node.target) for node in nodes if node.op == "call_module"}
    return {name for name in names if not is_builtin(modules[name])}


def _assign(trace: Trace, cores: list[Core], followed: list[Followed]) -> TracedSite:
    """The attentions of a graph: cores that share their projections are the heads of one.

    What cannot be followed is left alone where others can, and has projections of its own.
    """
    groups: dict[tuple[fx.Node, ...], list[tuple[Core, dict[str, Operand], str]]] = {}
    failed: list[tuple[Core, TraceError]] = []
    for core in cores:
        try:
            operands, unprojected = operands_of(core, followed)
        except TraceError as error:
            failed.append((core, error))
            continue
        # Queries that are nobody's channels are those of this core alone.
        asking = operands["q"].maker.producer.node if "q" in operands else core.node
        key = (asking, operands["k"].maker.producer.node, operands["v"].maker.producer.node)
        groups.setdefault(key, []).append((core, operands, unprojected))
    if not groups:
        raise failed[0][1]
    members = []
    for group in groups.values():
        own = tuple(core for core, _, _ in group)
        several = [operands for _, operands, _ in group]
        roles = {letter: role_of(letter, [operands[letter] for operands in several]) for letter in several[0]}
        _check_order(several, roles)
        if len(group) > 1:
            _refuse_overlap(several, roles)
        asking_role = roles.get("q") or unprojected_role(own[0], roles["k"].num_heads)
        members.append(TracedSite(trace, own, asking_role, roles["k"], roles["v"], unprojected=group[0][2]))
    _refuse_shared(members)
    for core, reason in failed:
        _refuse_read(core, reason, members, followed)
    return replace(members[0], others=tuple(members[1:]))


def _check_order(cores: list[dict[str, Operand]], roles: dict[str, Role]) -> None:
    """The core takes leading axes position by position: head 3 of Q meets whatever stands there in K and V.

    Roles with different numbers of heads share nothing, so their order does not matter; modes refuse them themselves.

    Raises:
        TraceError: heads that meet are not of the same number.
    """
    for operands in cores:
        places = {letter: _numbered(operand, roles[letter]) for letter, operand in operands.items()}
        for letter, name in (("k", "keys"), ("v", "values")):
            if "q" not in roles or roles[letter].num_heads != roles["q"].num_heads:
                continue
            if places["q"].shape != places[letter].shape or not torch.equal(places["q"], places[letter]):
                raise TraceError(f"heads of its queries and {name} are not in the same order")
        if places["k"].shape == places["v"].shape and not torch.equal(places["k"], places["v"]):
            raise TraceError("heads of its keys and values are not in the same order")


def _refuse_overlap(cores: list[dict[str, Operand]], roles: dict[str, Role]) -> None:
    """Several cores are the heads of one attention if each has its own queries, and those are nobody's keys or values.

    Raises:
        TraceError: they are attentions of their own, with the same projection.
    """
    taken: list[tuple[fx.Node, int]] = []
    for operands in cores:
        operand = operands["q"]
        taken += [(operand.maker.producer.node, channel) for head in operand.heads for channel in head]
    for letter in ("k", "v"):
        role = roles[letter]
        taken += [(role.producer.node, channel) for head in role.channels for channel in head]
    if len(set(taken)) != len(taken):
        name = roles["q"].producer.fqn
        raise TraceError(f"its forward holds several attentions that share {name}, so that none can give it up")


def _numbered(operand: Operand, role: Role) -> torch.Tensor:
    """For each leading position of one core: which of the role's heads stands there."""
    return torch.tensor([role.channels.index(head) for head in operand.heads])[operand.places]


def _refuse_shared(members: list[TracedSite]) -> None:
    """Attentions of one graph must not share weights: each gives up its own.

    Raises:
        TraceError: they do.
    """
    taken: set[str] = set()
    for member in members:
        names = {role.producer.fqn for role in (member.q, member.k, member.v)} - {""}
        shared = sorted(taken & names)
        if shared:
            raise TraceError(
                f"its forward holds several attentions that share {shared[0]}, so that none can give it up"
            )
        taken |= names


def _refuse_read(core: Core, reason: TraceError, members: list[TracedSite], followed: list[Followed]) -> None:
    """Refuse a graph in which a core that could not be followed takes something of what is going to be shared.

    Raises:
        TraceError: the reason why the core could not be followed.
    """
    makers = {role.producer.node for member in members for role in (member.q, member.k, member.v)}
    for maker in followed:
        if maker.producer.node in makers and not maker.flow.keys().isdisjoint((core.q, core.k, core.v)):
            raise reason
