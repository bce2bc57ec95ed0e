"""LayerScale is a factor per channel on what a projection makes: it goes into the projection."""

from torch import Tensor, nn

from armour_surgery.deployment.findings import Findings
from armour_surgery.deployment.folding import (
    Weights,
    fold_into_maker,
    weights_of,
)
from armour_surgery.deployment.removals import Removal, do_removals, survivors
from armour_surgery.discover.dataflow import Dataflow, FunctionCall, follow_model, numbers_after
from armour_surgery.rewrite.edits import tensor_named

__all__ = ["fold_layer_scale"]

_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__"}


def fold_layer_scale(model: nn.Module, example: dict[str, Tensor], findings: Findings) -> None:
    """`gamma * (W x + b)` is one projection, for a parameter `gamma` with one number per channel.

    A module that does nothing but this product becomes an Identity. Where it is written out in a block (BEiT), the
    parameter becomes None, if the host's code then leaves the product out.
    """
    flow = follow_model(model, example)
    folds: dict[Removal, Weights] = {}
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
                # A reshape of the parameter is a call of its own, inside the same module.
                module = flow.passes_through(call) if views else flow.alone(call)
                folds[Removal(name, module)] = outcome
    kept = survivors(model, example, list(folds))
    for removal, weights in folds.items():
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


def _maker_of(flow: Dataflow, tensor: Tensor, parameter: Tensor, views: list[FunctionCall]) -> Weights | str:
    """The projection whose channels the factor multiplies one by one; or why there is none."""
    made = flow.back(tensor)
    if made is None or not made[0].is_linear:
        return "what it multiplies is not made by one projection alone"
    maker, steps = made
    weights = weights_of(flow, maker)
    if isinstance(weights, str):
        return weights
    numbers = numbers_after(maker.outputs[0], weights.axis, steps)
    channels = maker.outputs[0].shape[weights.axis]
    # Where the parameter itself has axes of one around its channels (`[C, 1, 1]`, for images), they are on that axis.
    axis = next((axis for axis in range(-1, -1 - parameter.ndim, -1) if parameter.shape[axis] == channels), -1)
    factors = numbers_after(parameter, axis, views)
    if parameter.numel() != channels or not bool((factors.expand(numbers.shape) == numbers).all()):
        return f"its factors do not belong to the channels of {weights.weight} one by one"
    return weights
