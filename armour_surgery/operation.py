"""Surgery on one site: prepared on a copy without weights, tried out there, and only then done on the model."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from armour_surgery.discover import FoundSite, find_output, trace_call
from armour_surgery.errors import PostconditionError, SpecializationError, TraceError
from armour_surgery.initialize.gauge import Freedom, probe
from armour_surgery.initialize.problem import Problem
from armour_surgery.measure.cost import count_params
from armour_surgery.meta import meta_copy
from armour_surgery.modes import choose, get_mode
from armour_surgery.rewrite import (
    AddGrouped,
    Edit,
    KeepRows,
    Rewritten,
    Variant,
    apply_edits,
    edited_names,
    make_class,
    removed_name,
    render,
    residual,
    rewrite,
)
from armour_surgery.sites import RefusedSite, SitePlan
from armour_surgery.traced import Call, OutputProjection

__all__ = ["Operation", "Outcomes", "layout_of", "operate", "prepare", "problems_of", "rewrite_alike"]

# What came of rewriting a site, for each mode and fingerprint: sites with the same two need it only once.
Outcomes = dict[str, tuple[Rewritten, type[nn.Module]] | TraceError]


@dataclass(frozen=True)
class Operation:
    """What is ready to be done at one site, and the class that its module becomes."""

    fqn: str
    mode: str
    rewritten: Rewritten
    cls: type[nn.Module]
    found: FoundSite


def prepare(model: nn.Module, found: list[FoundSite], requested: str) -> tuple[list[Operation], list[RefusedSite]]:
    """Rewrite every site on a weightless copy of its module; sites that are alike share one class."""
    operations: list[Operation] = []
    refused: list[RefusedSite] = []
    done: Outcomes = {}
    for one in found:
        name, reason = choose(one.site, requested)
        if name is None:
            refused.append(RefusedSite(one.site.fqn, reason))
            continue
        try:
            rewritten, cls = rewrite_alike(model, one, name, done)
            _refuse_shared(model, one.site.fqn, rewritten.edits)
        except TraceError as error:
            refused.append(RefusedSite(one.site.fqn, str(error)))
        else:
            operations.append(Operation(one.site.fqn, name, rewritten, cls, one))
    return operations, refused


def rewrite_alike(model: nn.Module, one: FoundSite, mode: str, done: Outcomes) -> tuple[Rewritten, type[nn.Module]]:
    """The edits and the class for one site: those in `done` if a site like it was rewritten before.

    Raises:
        TraceError: the site, or the one like it, cannot be rewritten.
    """
    key = f"{mode} {one.fingerprint}"
    if key not in done:
        try:
            done[key] = _rewrite_site(model.get_submodule(one.site.fqn), one, mode)
        except TraceError as error:
            done[key] = error
    outcome = done[key]
    if isinstance(outcome, TraceError):
        raise outcome
    return outcome


def _refuse_shared(model: nn.Module, fqn: str, edits: list[Edit]) -> None:
    """Refuse a site whose projections must stay as they are, because something outside the site has them too."""
    site = model.get_submodule(fqn)
    own = [name for name, module in model.named_modules(remove_duplicate=False) if module is site]
    tensors = {
        id(tensor): name
        for name, tensor in [*site.named_parameters(), *site.named_buffers()]
        if any(name in edited_names(edit) or name.startswith(f"{removed_name(edit)}.") for edit in edits)
    }
    everywhere = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in everywhere:
        if id(tensor) in tensors and not any(name.startswith(f"{prefix}.") or not prefix for prefix in own):
            raise TraceError(f"its {tensors[id(tensor)]} is shared with {name}, outside this attention")


def _rewrite_site(module: nn.Module, found: FoundSite, name: str) -> tuple[Rewritten, type[nn.Module]]:
    """The edits and the class for one site, for eval and train mode, tried out on a weightless copy."""
    skeleton = meta_copy(module)
    mode = get_mode(name)
    results: list[Rewritten] = []
    variants: list[Variant] = []
    for training in (False, True):
        skeleton.train(training)
        traced = trace_call(skeleton, found.call, found.around)
        results.append(rewrite(traced, mode))
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
            result = rewrite(traced, mode)
        except TraceError as error:
            raise SpecializationError(
                f"{type(converted).__name__} is called in a way that it was not converted for, and cannot follow: "
                f"{error}. Convert the model with an example_input that leads to this call"
            ) from error
        if result.edits != edits:
            raise PostconditionError(f"{host.__name__} needs other weights for this call than it was converted for")
        return render(result.graph, traced.trace.signature)

    cls = make_class(host, name, variants, specialize)
    _try_out(skeleton, found.call, results[0], cls)
    return results[0], cls


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


def _try_out(skeleton: nn.Module, call: Call, rewritten: Rewritten, cls: type[nn.Module]) -> None:
    """Run the rewritten module once, without weights: its output must have the original's shapes."""
    original, converted = meta_copy(skeleton), meta_copy(skeleton)
    apply_edits(converted, rewritten.edits)
    object.__setattr__(converted, "__class__", cls)
    with torch.no_grad():
        wanted, got = (
            [
                tuple(leaf.shape)
                for leaf in pytree.tree_leaves(module(*call.args, **call.kwargs))
                if hasattr(leaf, "shape")
            ]
            for module in (original, converted)
        )
    if wanted != got:
        raise PostconditionError(f"{cls.__name__} returns {got}, and its original {wanted}")


def operate(model: nn.Module, operation: Operation, init: str) -> SitePlan:
    """Do one site's surgery on the model itself."""
    module = model.get_submodule(operation.fqn)
    params = count_params(module)
    lost = residual(module, operation.rewritten.shares)
    apply_edits(module, operation.rewritten.edits)
    object.__setattr__(module, "__class__", operation.cls)
    layout = layout_of(operation.rewritten)
    return SitePlan(operation.fqn, operation.mode, init, params, count_params(module), 0, 0, lost, layout)


def layout_of(rewritten: Rewritten) -> str:
    """A digest of which rows stay, in which order."""
    return hashlib.sha256(repr(rewritten.edits).encode()).hexdigest()[:16]


def problems_of(model: nn.Module, operations: list[Operation]) -> list[Problem]:
    """The operations as the initializers see them. `model` is the one that is not converted, with its weights."""
    done: dict[str, tuple[OutputProjection | None, Freedom]] = {}
    return [_problem(model, operation, done) for operation in operations]


def _problem(
    model: nn.Module, operation: Operation, done: dict[str, tuple[OutputProjection | None, Freedom]]
) -> Problem:
    found, traced = operation.found, operation.found.traced
    assert traced is not None
    module = model.get_submodule(operation.fqn)
    if found.fingerprint not in done:
        out = None
        with suppress(TraceError), torch.no_grad():
            out = find_output(meta_copy(module), found.call, traced.v)
        done[found.fingerprint] = out, probe(module, found.call, traced.q, traced.k, traced.v, out)
    edits = operation.rewritten.edits
    key, value = (
        tuple((part.letter, part.start, part.stop) for part in parts)
        for parts in (operation.rewritten.key, operation.rewritten.value)
    )
    return Problem(
        operation.fqn,
        traced.q,
        traced.k,
        traced.v,
        *done[found.fingerprint],
        key,
        value,
        {name: edit.rows for edit in edits if isinstance(edit, KeepRows) for name in edit.tensors},
        next((edit.name for edit in edits if isinstance(edit, AddGrouped)), None),
        found.site.reads["q"] == found.site.reads["k"],
    )
