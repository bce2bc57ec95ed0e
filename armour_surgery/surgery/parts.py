"""A model of which parts were converted by themselves: one plan for the whole, in the whole's names."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from armour_surgery.measure.cost import count_params
from armour_surgery.records import ConvertedPart, Source, SurgeryPlan

__all__ = ["converted_parts", "name_in_whole", "plan_of_whole"]


def name_in_whole(part: str, fqn: str) -> str:
    """What a module of a part is called in the whole; either may be the other itself, and its name is empty then."""
    return ".".join(filter(None, (part, fqn)))


def converted_parts(model: nn.Module) -> dict[str, SurgeryPlan]:
    """The plans of the modules inside of a model that were converted by themselves, by name."""
    parts: dict[str, SurgeryPlan] = {}
    for fqn, module in model.named_modules():
        plan = vars(module).get("surgery")
        if fqn and isinstance(plan, SurgeryPlan):
            parts[fqn] = plan
    return parts


def plan_of_whole(model: nn.Module, parts: Mapping[str, SurgeryPlan], source: Source | None = None) -> SurgeryPlan:
    """What was done to a model, or with `plan` would be, where this was done to these modules in it.

    MACs are those of the parts alone. Of several parts, `mode` and `init` are what they have in common: `auto`, and
    `wq` where one of them needs training.
    """
    sites, mlps, refused, sensitivities = [], [], [], []
    original: dict[str, str] = {}
    for fqn, plan in parts.items():
        original |= {name_in_whole(fqn, name): digest for name, digest in plan.original.items()}
        sites += [replace(site, fqn=name_in_whole(fqn, site.fqn)) for site in plan.sites]
        mlps += [replace(mlp, fqn=name_in_whole(fqn, mlp.fqn)) for mlp in plan.mlps]
        refused += [replace(site, fqn=name_in_whole(fqn, site.fqn)) for site in plan.refused]
        sensitivities += [replace(option, fqn=name_in_whole(fqn, option.fqn)) for option in plan.sensitivities]
    plans = list(parts.values())
    modes, inits = {plan.mode for plan in plans}, {plan.init for plan in plans}
    first = plans[0]
    saved = sum(plan.params_before - plan.params_after for plan in plans)
    # Of parts that were not changed yet (a plan says what would be done) the parameters are still those before.
    converted = bool(converted_parts(model))
    params = count_params(model)
    before, after = (params + saved, params) if converted else (params, params - saved)
    frontier = []
    for point in first.frontier if len(plans) == 1 else ():
        (fqn,) = parts
        chosen = tuple((name_in_whole(fqn, site), mode, rank) for site, mode, rank in point.sites)
        frontier.append(replace(point, params=point.params + before - first.params_before, sites=chosen))
    return SurgeryPlan(
        mode=first.mode if len(modes) == 1 else "auto",
        init=first.init if len(inits) == 1 else "wq",
        sites=tuple(sites),
        refused=tuple(refused),
        params_before=before,
        params_after=after,
        macs_before=sum(plan.macs_before for plan in plans),
        macs_after=sum(plan.macs_after for plan in plans),
        source=source,
        fidelity=first.fidelity if len(plans) == 1 else None,
        max_loss=first.max_loss if len(plans) == 1 else None,
        sensitivities=tuple(sensitivities),
        frontier=tuple(frontier),
        parts=tuple(ConvertedPart(fqn, plan.example, plan.example_values) for fqn, plan in parts.items()),
        original=original,
        mlps=tuple(mlps),
        params_goal=first.params_goal if len(plans) == 1 else None,
    )
