"""Do the operations that were prepared, choose the new weights, and keep the plan on the model."""

from dataclasses import replace

import torch
from torch import nn

from armour_surgery import hosts
from armour_surgery.copies import full_copy
from armour_surgery.errors import UsageError
from armour_surgery.measure.cost import CostReport, count_macs, count_params
from armour_surgery.records import RefusedSite, SitePlan, SurgeryPlan
from armour_surgery.surgery.new_weights import choose_weights
from armour_surgery.surgery.operation import Operation, operate
from armour_surgery.surgery.order import Order

__all__ = ["perform", "surgery_of"]


def perform(
    model: nn.Module, operations: list[Operation], refused: list[RefusedSite], order: Order, *, inplace: bool
) -> nn.Module:
    """Convert a model, or with `inplace` the model itself; what was done is on `.surgery`."""
    example = order.example
    before, params_before = count_macs(model, example), count_params(model)
    with torch.inference_mode(False):  # tensors made in inference mode could never be trained
        # `wq` takes rows as they are, unless fewer than a head has are to stay.
        solved = [one for one in operations if order.init != "wq" or one.rank is not None]
        original = full_copy(model) if inplace and solved else model
        result = model if inplace else full_copy(model)
        sites = [operate(result, operation, order.init) for operation in operations]
        fidelity = None
        if solved and not any(parameter.is_meta for parameter in model.parameters()):
            chosen, fidelity = choose_weights(
                original, result, solved, order.init, example, order.images, order.progress, order.steps
            )
            by_name = {one.fqn: one for one in chosen}
            sites = [
                replace(site, residual=by_name[site.fqn].residual, steps=by_name[site.fqn].steps)
                if site.fqn in by_name
                else site
                for site in sites
            ]
    after = count_macs(result, example)
    result.surgery = SurgeryPlan(  # type: ignore[assignment]
        mode=order.mode,
        init=order.init,
        sites=tuple(_with_macs(site, before, after) for site in sites),
        refused=tuple(refused),
        params_before=params_before,
        params_after=count_params(result),
        macs_before=before.macs,
        macs_after=after.macs,
        example=tuple((name, tuple(value.shape), str(value.dtype)[6:]) for name, value in example.items()),
        source=order.source,
        fidelity=fidelity,
    )
    hosts.mark_converted(result)
    return result


def surgery_of(model: nn.Module) -> SurgeryPlan:
    """What was done to a converted model.

    Raises:
        UsageError: the model is not converted.
    """
    surgery = getattr(model, "surgery", None)
    if not isinstance(surgery, SurgeryPlan):
        raise UsageError(f"this {type(model).__name__} is not converted; pass what convert() returned")
    return surgery


def _with_macs(site: SitePlan, before: CostReport, after: CostReport) -> SitePlan:
    return replace(site, macs_before=before.by_module.get(site.fqn, 0), macs_after=after.by_module.get(site.fqn, 0))
