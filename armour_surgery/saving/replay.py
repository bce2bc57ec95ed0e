"""Do a recorded surgery again."""

from contextlib import suppress
from dataclasses import replace

from torch import Tensor, nn

from armour_surgery import hosts
from armour_surgery.copies import floating_type
from armour_surgery.discover import find_sites
from armour_surgery.errors import ExampleInputError, SchemaError
from armour_surgery.examples import Example, rebuilt
from armour_surgery.measure.cost import count_params
from armour_surgery.modes import MODES, choose_rank
from armour_surgery.records import MlpPlan, RefusedSite, SitePlan, SurgeryPlan
from armour_surgery.surgery.gauge import fixed_as
from armour_surgery.surgery.mlps import Narrowing, narrow_without_images, narrowings_of
from armour_surgery.surgery.operation import Operation, SharedRewrites, operate
from armour_surgery.surgery.perform import keep_plan
from armour_surgery.traced import FoundSite, SeenSite

__all__ = ["mlps_of", "operations_of", "replay"]


def replay(host: nn.Module, surgery: SurgeryPlan) -> nn.Module:
    """Do a recorded surgery again on a freshly built host, in place; its weights come afterwards.

    Raises:
        SchemaError: the plan names a site that the host does not have, or a mode that does not fit there.
        UsageError: the plan gives a site a rank that it cannot have.
    """
    mlps = mlps_of(host, surgery)
    for fqn, operations in operations_of(host, surgery).items():
        part = host.get_submodule(fqn)
        for operation in operations:
            operate(part, operation)
        narrow_without_images(part, mlps[fqn])
        if fqn:
            hosts.mark_converted(part)
    return keep_plan(host, surgery)


def operations_of(host: nn.Module, surgery: SurgeryPlan) -> dict[str, list[Operation]]:
    """What a recorded surgery does to a freshly built host, by the modules that were converted: "", or parts of it.

    Raises:
        SchemaError, UsageError: see `replay`.
    """
    parts = _parts(host, surgery)
    return {fqn: _operations(host.get_submodule(fqn), part) for fqn, part in parts.items()}


def mlps_of(host: nn.Module, surgery: SurgeryPlan) -> dict[str, list[Narrowing]]:
    """Which MLPs of a freshly built host get fewer hidden channels, by the modules that were converted.

    Raises:
        SchemaError: see `narrowings_of`.
    """
    found: dict[str, list[Narrowing]] = {}
    for fqn, plan in _parts(host, surgery).items():
        part = host.get_submodule(fqn)
        found[fqn] = narrowings_of(part, _example_of(part, plan), plan)
    return found


def _parts(host: nn.Module, surgery: SurgeryPlan) -> dict[str, SurgeryPlan]:
    """The plan by the modules that were converted, the model itself ("") or parts of it, in the names of each."""
    if not surgery.parts:
        return {"": surgery}
    parts: dict[str, SurgeryPlan] = {}
    left: list[SitePlan | MlpPlan] = [*surgery.sites, *surgery.mlps]
    modules = dict(host.named_modules())
    for part in surgery.parts:
        if part.fqn not in modules:
            raise SchemaError(f"the plan converts {part.fqn!r}, and {type(host).__name__} has no such module")
        below = [site for site in left if f"{site.fqn}.".startswith(f"{part.fqn}.")]
        left = [site for site in left if site not in below]
        # A part may be an attention itself, whose own name is empty.
        named = [replace(site, fqn=site.fqn[len(part.fqn) + 1 :]) for site in below]
        parts[part.fqn] = replace(
            surgery,
            sites=tuple(site for site in named if isinstance(site, SitePlan)),
            mlps=tuple(mlp for mlp in named if isinstance(mlp, MlpPlan)),
            parts=(),
            example=part.example,
            example_values=part.example_values,
        )
    if left:
        raise SchemaError(f"the plan converts {left[0].fqn!r}, which is in none of its parts")
    return parts


def _operations(host: nn.Module, surgery: SurgeryPlan) -> list[Operation]:
    sites = {site.fqn: site for site in find_sites(host, _example_of(host, surgery))}
    # Whether a rank loses nothing was tried out with numbers when the surgery was recorded; here there are none yet.
    rewrites = SharedRewrites(host, check=False)
    operations = []
    for record in surgery.sites:
        site = sites.get(record.fqn)
        reason = _why_not(site, record.mode)
        if not isinstance(site, FoundSite) or reason is not None:
            raise SchemaError(
                f"the plan converts {record.fqn!r} to {record.mode!r}, but in {type(host).__name__} {reason}"
            )
        fixed = record.gauge is not None and record.gauge.start is not None
        rank = choose_rank(site.site, record.mode, record.rank)
        operation = fixed_as(rewrites.operation(site, record.mode, rank, gauge=fixed), record, host)
        params = count_params(host.get_submodule(record.fqn))
        if operation.layout != record.layout and params != record.params_before:
            raise SchemaError(
                f"{record.fqn} had {record.params_before:,} parameters before its conversion, and has {params:,} in a "
                f"new {type(host).__name__} (were heads pruned?)"
            )
        if operation.layout != record.layout:
            raise SchemaError(
                f"the plan keeps the channels of {record.fqn!r} in an order that this version of armour-surgery does "
                "not produce; load the folder with the version that saved it"
            )
        operations.append(operation)
    return operations


def _why_not(site: SeenSite | None, mode: str) -> str | None:
    """Why a site cannot be converted to a mode; None where it can."""
    if site is None:
        return "it has no such attention"
    if isinstance(site, RefusedSite):
        return site.reason if mode in MODES else "there is no such mode"
    return None if mode in site.site.modes else site.site.refused.get(mode, "there is no such mode")


def _example_of(host: nn.Module, surgery: SurgeryPlan) -> Example:
    """What the surgery was done with; on the meta device but for whole numbers, and for what a library knows of it."""
    # A fresh build is in float32, whatever the converted model was cast to.
    example = rebuilt(surgery.example, surgery.example_values, floating_type(host))
    if hosts.library_of(host) is None:
        return example
    # Patches may begin with their place (Pix2Struct), and no plan keeps floating-point numbers.
    with suppress(ExampleInputError):
        for name, known in hosts.example_input(host).items():
            value = example.get(name)
            if isinstance(value, Tensor) and value.is_meta and not known.is_meta and known.shape == value.shape:
                example[name] = known
    return example
