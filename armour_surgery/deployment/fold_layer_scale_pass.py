"""LayerScale is a factor per channel on what a projection makes: it goes into the projection."""

from torch import Tensor, nn

from armour_surgery.deployment.dataflow import Dataflow, FunctionCall, follow_model
from armour_surgery.deployment.findings import Findings
from armour_surgery.deployment.folding import (
    Weights,
    fold_into_maker,
    numbers_after,
    tensor_named,
    weights_of,
)
from armour_surgery.deployment.removals import Removal, do_removals, survivors

__all__ = ["fold_layer_scale"]

_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__"}


def fold_layer_scale(model: nn.Module, example: dict[str, Tensor], findings: Findings) -> None:
    """`gamma * (W x + b)` is one projection, for a parameter `gamma` with one number per channel.

    A module that does nothing but this product becomes an Identity. Where it is written out in a block (BEiT), the
    parameter becomes None, if the host's code then leaves the product out.
    """
    flow = follow_model(model, example)
    found: list[tuple[Removal, Weights]] = []
    for call in flow.calls:
        if call.name not in _PRODUCTS or len(call.args) != 2:
            continue
        for tensor, factor in (call.args, call.args[::-1]):
            steps = _from_parameter(flow, factor)
            if steps is None or flow.maker(tensor) is None:
                continue
            parameter, name, views = steps
            outcome = _maker_of(flow, tensor, parameter, views)
            if isinstance(outcome, str):
                findings.left(name, outcome)
            else:
                found.append((Removal(name, flow.alone(call) if not views else _around(flow, call)), outcome))
    kept = survivors(model, example, [removal for removal, _ in found])
    for removal, weights in found:
        if removal in kept:
            findings.left(removal.parameter, "its host cannot do without it")
            continue
        fold_into_maker(model, weights, tensor_named(model, removal.parameter).detach().flatten(), None)
        do_removals(model, [removal])
        findings.did(removal.parameter)


def _from_parameter(flow: Dataflow, tensor: object) -> tuple[Tensor, str, list[FunctionCall]] | None:
    """The parameter that a factor is, by itself or reshaped."""
    views: list[FunctionCall] = []
    while (maker := flow.maker(tensor)) is not None and maker.is_layout:
        views.insert(0, maker)
        tensor = maker.source
    name = flow.own_name(tensor)
    if name is None or not isinstance(tensor, nn.Parameter) or tensor.numel() != max(tensor.shape, default=0):
        return None
    return tensor, name, views


def _around(flow: Dataflow, call: FunctionCall) -> str | None:
    """As `Dataflow.alone`, for a product with a reshaped parameter."""
    taken, given = flow.inputs.get(call.module, []), flow.outputs.get(call.module, [])
    whole = call.module and len(taken) == len(given) == 1
    return call.module if whole and taken[0] is call.source and given[0] is call.outputs[0] else None


def _maker_of(flow: Dataflow, tensor: Tensor, parameter: Tensor, views: list[FunctionCall]) -> Weights | str:
    """The projection whose channels the factor multiplies one by one; or why there is none."""
    made = flow.back(tensor)
    if made is None or not made[0].is_linear:
        return "what it multiplies is not made by one projection alone"
    weights = weights_of(flow, made[0])
    if isinstance(weights, str):
        return weights
    numbers = numbers_after(made[0].outputs[0], weights.axis, made[1])
    channels = made[0].outputs[0].shape[weights.axis]
    axis = next((axis for axis in range(-1, -1 - parameter.ndim, -1) if parameter.shape[axis] == channels), -1)
    factors = numbers_after(parameter, axis, views)
    if parameter.numel() != channels or not bool((factors.expand(numbers.shape) == numbers).all()):
        return f"its factors do not belong to the channels of {weights.weight} one by one"
    return weights
