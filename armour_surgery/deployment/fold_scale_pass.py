"""The factor on the logits goes into the projection that makes K."""

import functools
import itertools

import torch
from torch import fx, nn

from armour_surgery.deployment.attention import CHANGED, NOTHING_TO_DO, AttentionGraph, Outcome
from armour_surgery.deployment.written_out import read_written_out
from armour_surgery.discover import value_of
from armour_surgery.rewrite.edits import owner_of
from armour_surgery.traced import Role, TracedSite

__all__ = ["fold_scale", "free_keys"]


def fold_scale(state: AttentionGraph) -> Outcome:
    """`scale * q k^T` is `q (scale k)^T`: rows of K's weight and bias are scaled, and a pass over the logits is gone.

    Into K, since with shared projections Q may serve as V. Where K serves as V too there is nowhere to put it. A fused
    core scales by itself, at no cost.
    """
    if state.fused:
        return NOTHING_TO_DO
    written = read_written_out(state.traced.core, state.submodules())
    if isinstance(written, str):
        return Outcome(reason=written)
    if not written.scales:
        return NOTHING_TO_DO
    if any(term.factor != 1.0 for term in written.terms):
        return Outcome(reason="it scales what it adds to the logits as well")
    reason = free_keys(state.traced)
    if reason is not None:
        return Outcome(reason=reason)
    key = state.traced.k
    rows = torch.tensor(sorted(_channels(key))) + key.producer.first_row
    names = key.producer.rows
    state.edits.append(functools.partial(_scale, names=names, rows=rows, factor=written.scale))
    # The host's own forward, which another kind of call falls back on, scales by itself.
    state.undo.append(functools.partial(_scale, names=names, rows=rows, factor=1 / written.scale))
    for node in written.scales:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    state.changed = True
    return CHANGED


def _scale(module: nn.Module, *, names: tuple[str, ...], rows: torch.Tensor, factor: float) -> None:
    """Multiply rows of the parameters with these names, which become other parameters."""
    for name in names:
        owner, attribute = owner_of(module, name)
        tensor = getattr(owner, attribute)
        if tensor is None:
            continue  # a later pass dropped K's bias
        scaled = tensor.detach().clone()
        scaled[rows] *= factor
        setattr(owner, attribute, nn.Parameter(scaled, tensor.requires_grad))


def _channels(role: Role) -> set[int]:
    """The output channels of its projection that a role has."""
    return set(itertools.chain.from_iterable(role.channels))


def free_keys(traced: TracedSite) -> str | None:
    """Why K may not be changed by a linear map of each head's channels; None where only the logits would notice."""
    key: Role = traced.k
    producer = key.producer
    if not producer.plain or producer.bias:
        return f"{producer.fqn} is not one plain Linear or 1x1 convolution"
    owner = producer.weight.rpartition(".")[0]
    if any(row.rpartition(".")[0] != owner for row in producer.rows):
        return f"a norm acts on what {producer.fqn} makes; fold it first"
    for role, name in ((traced.q, "Q"), (traced.v, "V")):
        if role.producer.node is producer.node and not _channels(key).isdisjoint(_channels(role)):
            return f"K serves as {name} too"
    if not key.ends:
        return "something acts on K before the logits"
    # What makes the logits: the fused call, or the product that reads Q too.
    logits = {traced.core.node}
    if traced.core.kind == "softmax":
        logits = traced.core.k.users.keys() & traced.core.q.users.keys()
    for end in key.ends:
        if not set(filter(_takes, end.node.users)) <= logits:
            return "K is read by something else than the logits"
    return None


def _takes(user: fx.Node) -> bool:
    """Whether a user takes K's values, not only its size or type."""
    return isinstance(value_of(user) if "value" in user.meta else None, torch.Tensor | tuple)
