"""K's bias adds the same number to all logits of a query, and the softmax takes it out again."""

from torch import nn

from armour_surgery.deployment.attention import AttentionGraph
from armour_surgery.deployment.fold_scale_pass import free_keys

__all__ = ["drop_key_bias"]


def drop_key_bias(state: AttentionGraph) -> bool | str:
    """`softmax(q (k + b)^T) = softmax(q k^T)`: the bias goes where K has a projection of its own.

    In a packed projection Q's bias needs the addition anyway, so nothing would be saved.
    """
    traced = state.traced
    producer = traced.k.producer
    name = next((row for row in producer.rows if row != producer.weight), None)
    if name is None:
        return False
    if any(role.producer.node is producer.node for role in (traced.q, traced.v)):
        return f"{producer.fqn} makes more than K, and its bias is added in one go"
    reason = free_keys(traced)
    if reason is not None:
        return reason

    def drop(module: nn.Module) -> None:
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner).register_parameter(attribute, None)

    state.edits.append(drop)
    return True
