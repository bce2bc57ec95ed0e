"""BatchNorm at rest is a scale and a shift per channel: they go into the projection before it, or after it."""

import torch
from torch import Tensor, nn

from armour_surgery.deployment.findings import Findings
from armour_surgery.deployment.folding import (
    fold_into_maker,
    fold_into_readers,
    readers_of,
    weights_of,
)
from armour_surgery.discover.dataflow import Dataflow, FunctionCall, follow_model, numbers_after, runs_along
from armour_surgery.rewrite.edits import owner_of, tensor_named

__all__ = ["fold_batch_norm"]


def fold_batch_norm(model: nn.Module, example: dict[str, Tensor], findings: Findings) -> None:
    """`gamma (y - mean) / sqrt(var + eps) + beta` of `y = W x + b` is one projection; the norm becomes an Identity.

    Where no projection comes before it alone, it goes into the ones that read it, if all that read it are such and
    none pads with zeros. What the norm's module does afterwards (timm's `BatchNormAct2d`) stays.
    """
    flow = follow_model(model, example)
    for call in flow.calls:
        if call.name != "batch_norm":
            continue
        rest = _rest_of(flow, call)
        reason = "its module does more than this norm" if rest is None else _fold(model, flow, call)
        if reason is None and rest is not None:
            owner, name = owner_of(model, call.module)
            setattr(owner, name, _without_norm(model, rest))
            findings.did(call.module)
        else:
            findings.left(call.module, str(reason))


def _without_norm(model: nn.Module, rest: list[str]) -> nn.Module:
    """What takes the place of a norm's module: the children that act after the norm."""
    children = list(map(model.get_submodule, rest))
    if not children:
        return nn.Identity()
    return children[0] if len(children) == 1 else nn.Sequential(*children)


def _rest_of(flow: Dataflow, call: FunctionCall) -> list[str] | None:
    """The children that act after the norm in its module, in order; None where it does something else too."""
    taken, given = flow.inputs.get(call.module, []), flow.outputs.get(call.module, [])
    calls = sum(other.module == call.module for other in flow.calls)
    if not call.module or not calls == len(taken) == len(given) == 1 or taken[0] is not call.source:
        return None
    # Each child must take what the one before it gave, and the last one give what the module gives.
    tensor, used = call.outputs[0], []
    for name, _ in flow.model.get_submodule(call.module).named_children():
        child = f"{call.module}.{name}"
        if len(flow.inputs.get(child, [])) == 1 and flow.inputs[child][0] is tensor:
            tensor = flow.outputs[child][0]
            used.append(child)
    return used if tensor is given[0] else None


def _fold(model: nn.Module, flow: Dataflow, call: FunctionCall) -> str | None:
    """Fold one norm into a neighbor; or why not."""
    mean = flow.own_name(call.argument(1, "running_mean"))
    variance = flow.own_name(call.argument(2, "running_var"))
    weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
    weight_name, bias_name = flow.own_name(weight), flow.own_name(bias)
    if mean is None or variance is None or (weight is not None and weight_name is None):
        return "it has no statistics of its own, or shares them"
    if bias is not None and bias_name is None:
        return "its bias is shared"
    # In float64: the result is rounded once, to the type of the weights.
    center, spread = tensor_named(model, mean).double(), tensor_named(model, variance).double()
    gamma = 1.0 if weight_name is None else tensor_named(model, weight_name).detach().double()
    beta = 0.0 if bias_name is None else tensor_named(model, bias_name).detach().double()
    scale = torch.rsqrt(spread + float(call.argument(7, "eps"))) * gamma
    shift = -center * scale + beta
    channels = len(center)
    made = flow.back(call.source)
    if made is not None and made[0].is_linear:
        maker, steps = made
        weights = weights_of(flow, maker)
        if isinstance(weights, str):
            return weights
        if not runs_along(numbers_after(maker.outputs[0], weights.axis, steps), 1, channels):
            return f"its channels are not those of {weights.weight}"
        fold_into_maker(model, weights, scale, shift)
        return None
    readers = readers_of(flow, call.outputs[0], 1)
    if isinstance(readers, str):
        return f"no projection alone comes before it, and after it {readers}"
    fold_into_readers(model, readers, scale, shift)
    return None
