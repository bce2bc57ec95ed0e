"""K's bias adds the same number to all logits of a query, and the softmax takes it out again."""

from torch import nn

from armour_surgery.deployment.attention import CHANGED, NOTHING_TO_DO, AttentionGraph, Outcome
from armour_surgery.deployment.fold_scale_pass import free_keys
from armour_surgery.rewrite.edits import owner_of

__all__ = ["drop_key_bias"]


def drop_key_bias(state: AttentionGraph) -> Outcome:
    """`softmax(q (k + b)^T) = softmax(q k^T)`: the bias goes where K has a projection of its own.

    In a packed projection Q's bias needs the addition anyway, so nothing would be saved.
    """
    traced = state.traced
    producer = traced.k.producer
    name = next((row for row in producer.rows if row != producer.weight), None)
    if name is None:
        return NOTHING_TO_DO
    if producer.node in (traced.q.producer.node, traced.v.producer.node):
        return Outcome(reason=f"{producer.fqn} makes more than K, and its bias is added in one go")
    reason = free_keys(traced)
    if reason is not None:
        return Outcome(reason=reason)

    def drop(module: nn.Module) -> None:
        owner, attribute = owner_of(module, name)
        owner.register_parameter(attribute, None)

    # `changed` stays as it is: the graph calls the same module, which now adds nothing.
    state.edits.append(drop)
    return CHANGED
