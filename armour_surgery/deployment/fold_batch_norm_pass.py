"""BatchNorm at rest is a scale and a shift per channel: they go into the projection before it, or after it."""

import torch
from torch import Tensor, nn

from armour_surgery.deployment.dataflow import Dataflow, FunctionCall, follow_model
from armour_surgery.deployment.findings import Findings
from armour_surgery.deployment.folding import (
    fold_into_maker,
    fold_into_readers,
    numbers_after,
    readers_of,
    runs_along,
    tensor_named,
    weights_of,
)

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
            parent, _, name = call.module.rpartition(".")
            left = [model.get_submodule(child) for child in rest]
            kept = nn.Sequential(*left) if len(left) > 1 else left[0] if left else nn.Identity()
            setattr(model.get_submodule(parent), name, kept)
            findings.did(call.module)
        else:
            findings.left(call.module, str(reason))


def _rest_of(flow: Dataflow, call: FunctionCall) -> list[str] | None:
    """The children that act after the norm in its module, in order; None where it does something else too."""
    taken, given = flow.inputs.get(call.module, []), flow.outputs.get(call.module, [])
    inside = [other for other in flow.calls if other.module == call.module]
    if not call.module or not len(inside) == len(taken) == len(given) == 1 or taken[0] is not call.source:
        return None
    tensor, used = call.outputs[0], []
    for name, _ in flow.model.get_submodule(call.module).named_children():
        child = f"{call.module}.{name}"
        if len(flow.inputs.get(child, [])) == 1 and flow.inputs[child][0] is tensor:
            tensor = flow.outputs[child][0]
            used.append(child)
    return used if tensor is given[0] else None


def _fold(model: nn.Module, flow: Dataflow, call: FunctionCall) -> str | None:
    """Fold one norm into a neighbor; or why not."""
    mean, variance = (flow.own_name(call.argument(index, name)) for index, name in enumerate(_STATISTICS, start=1))
    weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
    names = [None if tensor is None else flow.own_name(tensor) for tensor in (weight, bias)]
    if mean is None or variance is None or (weight is not None and names[0] is None):
        return "it has no statistics of its own, or shares them"
    if bias is not None and names[1] is None:
        return "its bias is shared"
    gamma, beta = (None if name is None else tensor_named(model, name).detach().double() for name in names)
    center, spread = (tensor_named(model, name).double() for name in (mean, variance))
    scale = torch.rsqrt(spread + float(call.argument(7, "eps"))) * (1.0 if gamma is None else gamma)
    shift = -center * scale + (0.0 if beta is None else beta)
    channels = len(center)
    made = flow.back(call.source)
    if made is not None and made[0].is_linear:
        maker, steps = made
        found = weights_of(flow, maker)
        if isinstance(found, str):
            return found
        if not runs_along(numbers_after(maker.outputs[0], found.axis, steps), 1, channels):
            return f"its channels are not those of {found.weight}"
        fold_into_maker(model, found, scale, shift)
        return None
    readers = readers_of(flow, call.outputs[0], 1)
    if isinstance(readers, str):
        return f"no projection alone comes before it, and after it {readers}"
    fold_into_readers(model, readers, scale, shift)
    return None


_STATISTICS = ("running_mean", "running_var")
