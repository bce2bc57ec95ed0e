"""Do the operations that were prepared, choose the new weights, and keep the plan on the model."""

from dataclasses import replace

import torch
from torch import nn

from armour_surgery import hosts
from armour_surgery.copies import full_copy, has_weights, own_memory, sharing_copy
from armour_surgery.errors import UsageError
from armour_surgery.examples import recorded
from armour_surgery.initialize import SiteResult
from armour_surgery.measure.cost import CostReport, count_macs, count_params
from armour_surgery.records import Fidelity, SitePlan, SurgeryPlan
from armour_surgery.surgery.gauge import fix_gauges
from armour_surgery.surgery.mlps import mlp_plans
from armour_surgery.surgery.new_weights import choose_weights
from armour_surgery.surgery.operation import Change, Operation, Prepared, operate
from armour_surgery.surgery.order import Order
from armour_surgery.surgery.parts import converted_parts, plan_of_whole

__all__ = ["keep_plan", "perform", "surgery_of"]


def perform(model: nn.Module, prepared: Prepared, order: Order, *, inplace: bool) -> nn.Module:
    """Convert a model, or with `inplace` the model itself; what was done is on `.surgery`."""
    before, params_before = count_macs(model, order.example), count_params(model)
    results: list[SiteResult] = []
    fidelity: Fidelity | None = None
    with torch.inference_mode(False):  # tensors made in inference mode could never be trained
        # `wq` takes rows as they are, unless fewer than a head has are to stay.
        solved = [step for step in prepared.operations if order.init != "wq" or step.rank is not None]
        chosen = bool(solved or prepared.mlps) and has_weights(model)
        # A calibration goes block by block, and needs of the original one at a time.
        shared = inplace and chosen and order.init == "calibrated"
        original = model
        if inplace and chosen:
            original = sharing_copy(model) if shared else full_copy(model)
        converted = model if inplace else full_copy(model)
        # Other weights than `wq`'s are told of by those who choose them.
        compares = order.init == "wq"
        # What two models share until one of them gets other numbers, it may share in part.
        changes = [operate(converted, one, compares=compares, views=shared) for one in prepared.operations]
        if chosen:
            asked = replace(prepared, operations=solved)
            results, fidelity = choose_weights(original, converted, asked, order, shared=shared)
        if shared:
            for operation in solved:
                own_memory(converted.get_submodule(operation.fqn))
        mlps = mlp_plans(original, prepared.mlps, results)
        operations, gauges = fix_gauges(converted, prepared.operations)
    after = count_macs(converted, order.example)
    by_name = {result.fqn: result for result in results}
    sites = []
    for operation, change in zip(operations, changes, strict=True):
        # A fixed gauge has made it smaller still.
        change = replace(change, params_after=count_params(converted.get_submodule(operation.fqn)))
        site = _site_plan(operation, change, by_name.get(operation.fqn), order, before, after)
        sites.append(replace(site, gauge=gauges.get(operation.fqn)))
    shapes, values = recorded(order.example)
    plan = SurgeryPlan(
        mode=order.mode,
        init=order.init,
        sites=tuple(sites),
        refused=tuple(prepared.refused),
        params_before=params_before,
        params_after=count_params(converted),
        macs_before=before.macs,
        macs_after=after.macs,
        example=shapes,
        example_values=values,
        source=order.source,
        fidelity=fidelity,
        original=order.original,
        mlps=mlps,
    )
    return keep_plan(converted, plan)


def keep_plan(converted: nn.Module, plan: SurgeryPlan) -> nn.Module:
    """Write on a converted model what was done to it, and keep its library from taking it for an unconverted one."""
    converted.surgery = plan  # type: ignore[assignment]
    hosts.mark_converted(converted, plan)
    return converted


def surgery_of(model: nn.Module) -> SurgeryPlan:
    """What was done to a converted model, or to modules inside of it that were converted by themselves.

    Raises:
        UsageError: the model is not converted.
    """
    surgery = getattr(model, "surgery", None)
    if surgery is None and (parts := converted_parts(model)):
        return plan_of_whole(model, parts)
    if not isinstance(surgery, SurgeryPlan):
        raise UsageError(f"this {type(model).__name__} is not converted; pass what convert() returned")
    return surgery


def _site_plan(
    operation: Operation,
    change: Change,
    result: SiteResult | None,
    order: Order,
    before: CostReport,
    after: CostReport,
) -> SitePlan:
    """What was done at one site; `result` is there where its weights were chosen and not just taken over."""
    return SitePlan(
        fqn=operation.fqn,
        mode=operation.mode,
        init=order.init,
        params_before=change.params_before,
        params_after=change.params_after,
        macs_before=before.by_module.get(operation.fqn, 0),
        macs_after=after.by_module.get(operation.fqn, 0),
        residual=change.residual if result is None else result.residual,
        layout=operation.layout,
        steps=() if result is None else result.steps,
        rank=operation.rank,
    )
