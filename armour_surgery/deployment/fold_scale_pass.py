"""The factor on the logits goes into the projection that makes K."""

import torch
from torch import fx, nn

from armour_surgery.deployment.attention import AttentionGraph
from armour_surgery.deployment.written_out import read_written_out
from armour_surgery.discover import value_of
from armour_surgery.traced import Role, TracedSite

__all__ = ["fold_scale", "free_keys"]


def fold_scale(state: AttentionGraph) -> bool | str:
    """`scale * q k^T` is `q (scale k)^T`: rows of K's weight and bias are scaled, and a pass over the logits is gone.

    Into K, since with shared projections Q may serve as V. Where K serves as V too there is nowhere to put it. A fused
    core scales by itself, at no cost.
    """
    if state.fused:
        return False
    found = read_written_out(state.traced.core, state.submodules())
    if isinstance(found, str):
        return found
    if not found.scales:
        return False
    if any(term.factor != 1.0 for term in found.terms):
        return "it scales what it adds to the logits as well"
    reason = free_keys(state.traced)
    if reason is not None:
        return reason
    key = state.traced.k
    rows = torch.tensor(sorted(channel for head in key.channels for channel in head))
    names, factor = key.producer.rows, found.scale

    def scale_rows(module: nn.Module) -> None:
        for name in names:
            owner, _, attribute = name.rpartition(".")
            tensor = getattr(module.get_submodule(owner), attribute)
            scaled = tensor.detach().clone()
            scaled[rows] *= factor
            setattr(module.get_submodule(owner), attribute, nn.Parameter(scaled, tensor.requires_grad))

    state.edits.append(scale_rows)
    for node in found.scales:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    state.changed = state.bound = True
    return True


def free_keys(traced: TracedSite) -> str | None:
    """Why K may not be changed by a linear map of each head's channels; None where only the logits would notice."""
    key: Role = traced.k
    producer = key.producer
    if not producer.plain or producer.bias:
        return f"{producer.fqn} is not one plain Linear or 1x1 convolution"
    if {row.rpartition(".")[0] for row in producer.rows} != {producer.weight.rpartition(".")[0]}:
        return f"a norm acts on what {producer.fqn} makes; fold it first"
    own = {channel for head in key.channels for channel in head}
    for role, name in ((traced.q, "Q"), (traced.v, "V")):
        if role.producer.node is producer.node and own & {channel for head in role.channels for channel in head}:
            return f"K serves as {name} too"
    if not key.ends:
        return "something acts on K before the logits"
    readers = {user for end in key.ends for user in end.node.users if _takes(user)}
    target = traced.core.node if traced.core.kind != "softmax" else None
    product = {user for user in traced.core.k.users if user in traced.core.q.users}
    if not readers <= ({target} if target else product):
        return "K is read by something else than the logits"
    return None


def _takes(user: fx.Node) -> bool:
    return isinstance(value_of(user) if "value" in user.meta else None, torch.Tensor | tuple)
