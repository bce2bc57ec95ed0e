"""Surgery on one site: prepared on a copy without weights, tried out there, and only then done on the model."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from armour_surgery.copies import meta_copy
from armour_surgery.discover import FoundSite, find_results, trace_call
from armour_surgery.discover.output import output_of
from armour_surgery.errors import ArmourError, PostconditionError, SpecializationError, TraceError
from armour_surgery.measure.cost import count_params
from armour_surgery.modes import Mode, choose, choose_rank, get_mode
from armour_surgery.records import RefusedSite, SitePlan
from armour_surgery.rewrite import (
    Rewritten,
    Variant,
    apply_edits,
    make_class,
    render,
    residual,
    rewrite,
)
from armour_surgery.surgery.refusals import refuse_bound_channels, refuse_changed, refuse_shared, try_out
from armour_surgery.traced import Call, OutputProjection, TracedSite

__all__ = ["Operation", "Outcomes", "layout_of", "operate", "prepare", "rewrite_alike"]

# What came of rewriting a site, for each mode and fingerprint: sites with the same two need it only once.
Outcomes = dict[str, tuple[Rewritten, type[nn.Module]] | TraceError]


@dataclass(frozen=True)
class Operation:
    """What is ready to be done at one site, and the class that its module becomes. `rank` None is the full one."""

    fqn: str
    mode: str
    rank: int | None
    rewritten: Rewritten
    cls: type[nn.Module]
    found: FoundSite


def prepare(
    model: nn.Module,
    found: list[FoundSite],
    requested: str | Mapping[str, str],
    ranks: int | Mapping[str, int] | None = None,
) -> tuple[list[Operation], list[RefusedSite]]:
    """Rewrite every site on a weightless copy of its module; sites that are alike share one class.

    `requested` is one mode for all, or one by site name.

    Raises:
        UsageError: a rank is none of a site's.
    """
    operations: list[Operation] = []
    refused: list[RefusedSite] = []
    done: Outcomes = {}
    for one in found:
        name, reason = choose(one.site, requested if isinstance(requested, str) else requested[one.site.fqn])
        if name is None:
            refused.append(RefusedSite(one.site.fqn, reason))
            continue
        try:
            rank = choose_rank(one.site, name, ranks)
            rewritten, cls = rewrite_alike(model, one, name, rank, done, check=True)
            refuse_shared(model, one.site.fqn, rewritten.edits)
        except TraceError as error:
            refused.append(RefusedSite(one.site.fqn, str(error)))
        else:
            operations.append(Operation(one.site.fqn, name, rank, rewritten, cls, one))
    return operations, refused


def rewrite_alike(
    model: nn.Module, one: FoundSite, mode: str, rank: int | None, done: Outcomes, *, check: bool
) -> tuple[Rewritten, type[nn.Module]]:
    """The edits and the class for one site: those in `done` if a site like it was rewritten before.

    `check` tries out with numbers whether a site may have heads of `rank` channels. That was done already where a
    recorded surgery is done again.

    Raises:
        TraceError: the site, or the one like it, cannot be rewritten.
    """
    key = f"{mode} {rank} {one.fingerprint}"
    if key not in done:
        try:
            done[key] = _rewrite_site(model.get_submodule(one.site.fqn), one, mode, rank, check)
        except TraceError as error:
            done[key] = error
    outcome = done[key]
    if isinstance(outcome, TraceError):
        raise outcome
    return outcome


def _rewrite_site(
    module: nn.Module, found: FoundSite, name: str, rank: int | None, check: bool
) -> tuple[Rewritten, type[nn.Module]]:
    """The edits and the class for one site, for eval and train mode, tried out on a weightless copy."""
    skeleton = meta_copy(module)
    mode = get_mode(name)
    out = output_of(skeleton, found) if rank else None
    if rank:
        refuse_bound_channels(module, found, out, check)
    results: list[Rewritten] = []
    variants: list[Variant] = []
    for training in (False, True):
        skeleton.train(training)
        traced = trace_call(skeleton, found.call, found.around)
        results.append(_rewrite_traced(traced, mode, rank, out, skeleton))
        variants.append(render(results[-1].graph, traced.trace.signature))
    edits = results[0].edits
    if results[1].edits != edits:
        raise TraceError("its train mode and its eval mode use its projections differently")
    host = type(module)

    def specialize(converted: nn.Module, call: Call) -> Variant:
        case = meta_copy(skeleton)
        for fqn, child in case.named_modules():
            _copy_flags(converted, fqn, child)
        try:
            traced = trace_call(case, _on_meta(call), found.around)
            result = _rewrite_traced(traced, mode, rank, out, case)
        except TraceError as error:
            raise SpecializationError(
                f"{type(converted).__name__} is called in a way that it was not converted for, and cannot follow: "
                f"{error}. Convert the model with an example_input that leads to this call"
            ) from error
        if result.edits != edits:
            raise PostconditionError(f"{host.__name__} needs other weights for this call than it was converted for")
        return render(result.graph, traced.trace.signature)

    cls = make_class(host, name, variants, specialize)
    try:
        try_out(skeleton, found.call, results[0], cls)
    except (RuntimeError, ValueError, ArmourError) as error:
        if rank is None:
            raise
        raise TraceError(
            f"its forward counts on {found.site.key_dim} channels a head ({error}); leave out rank"
        ) from error
    if rank and check:
        refuse_changed(module, found, rank, results[0], cls)
    return results[0], cls


def _rewrite_traced(
    traced: TracedSite, mode: Mode, rank: int | None, out: OutputProjection | None, module: nn.Module
) -> Rewritten:
    results = find_results(traced, dict(module.named_modules()), out) if rank and out else None
    return rewrite(traced, mode, rank, results)


def _copy_flags(converted: nn.Module, fqn: str, child: nn.Module) -> None:
    """Flags that a user may have switched since the conversion, such as `training` or `fused_attn`."""
    try:
        current = converted.get_submodule(fqn)
    except AttributeError:
        return
    for name, value in vars(current).items():
        if isinstance(value, bool) and isinstance(vars(child).get(name), bool):
            object.__setattr__(child, name, value)


def _on_meta(call: Call) -> Call:
    def move(leaf: Any) -> Any:
        return torch.empty_like(leaf, device="meta") if isinstance(leaf, torch.Tensor) else leaf

    return Call(pytree.tree_map(move, call.args), pytree.tree_map(move, call.kwargs))


def operate(model: nn.Module, operation: Operation, init: str) -> SitePlan:
    """Do one site's surgery on the model itself."""
    module = model.get_submodule(operation.fqn)
    params = count_params(module)
    # With fewer channels no old row has a new one in its place.
    lost = residual(module, operation.rewritten.shares) if operation.rank is None else None
    apply_edits(module, operation.rewritten.edits)
    object.__setattr__(module, "__class__", operation.cls)
    layout = layout_of(operation.rewritten)
    return SitePlan(
        operation.fqn, operation.mode, init, params, count_params(module), 0, 0, lost, layout, rank=operation.rank
    )


def layout_of(rewritten: Rewritten) -> str:
    """A digest of which rows stay, in which order."""
    return hashlib.sha256(repr(rewritten.edits).encode()).hexdigest()[:16]
