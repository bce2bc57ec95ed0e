"""Surgery on one site: prepared on a copy without weights, tried out there, and only then done on the model."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from armour_surgery.copies import meta_copy
from armour_surgery.discover import FoundSite, find_output, find_results, trace_call
from armour_surgery.errors import ArmourError, ConversionError, PostconditionError, SpecializationError, TraceError
from armour_surgery.initialize.freedom import Freedom, probe, works_narrow
from armour_surgery.initialize.problem import Problem
from armour_surgery.measure.cost import count_params
from armour_surgery.modes import Mode, choose, choose_rank, get_mode
from armour_surgery.records import RefusedSite, SitePlan
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
from armour_surgery.traced import Call, OutputProjection, TracedSite

__all__ = ["Operation", "Outcomes", "layout_of", "operate", "prepare", "problems_of", "rewrite_alike"]

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
            _refuse_shared(model, one.site.fqn, rewritten.edits)
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


def _rewrite_site(
    module: nn.Module, found: FoundSite, name: str, rank: int | None, check: bool
) -> tuple[Rewritten, type[nn.Module]]:
    """The edits and the class for one site, for eval and train mode, tried out on a weightless copy."""
    skeleton = meta_copy(module)
    mode = get_mode(name)
    out = _output_of(skeleton, found) if rank else None
    if rank:
        _refuse_bound_channels(module, found, out, check)
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
        _try_out(skeleton, found.call, results[0], cls)
    except (RuntimeError, ValueError, ArmourError) as error:
        if rank is None:
            raise
        raise TraceError(
            f"its forward counts on {found.site.key_dim} channels a head ({error}); leave out rank"
        ) from error
    if rank and check:
        _refuse_changed(module, found, rank, results[0], cls)
    return results[0], cls


def _rewrite_traced(
    traced: TracedSite, mode: Mode, rank: int | None, out: OutputProjection | None, module: nn.Module
) -> Rewritten:
    results = find_results(traced, dict(module.named_modules()), out) if rank and out else None
    return rewrite(traced, mode, rank, results)


def _output_of(module: nn.Module, found: FoundSite) -> OutputProjection | None:
    """The projection that reads the heads' results; None where it is not inside the module."""
    assert found.traced is not None
    copied = meta_copy(module)
    copied.eval()  # timm's LeViT attention returns nothing here
    with suppress(TraceError), torch.no_grad():
        return find_output(copied, found.call, found.traced.v)
    return None


def _refuse_bound_channels(module: nn.Module, found: FoundSite, out: OutputProjection | None, check: bool) -> None:
    """Refuse a site whose heads need all their channels, because no basis but their own is as good.

    Raises:
        TraceError: see above.
    """
    traced, size = found.traced, found.site.key_dim
    assert traced is not None
    if out is None:
        raise TraceError(
            "the projection that reads its heads' results is not inside this module (or is not a single one), and "
            "with a rank it has to become narrower too; leave out rank"
        )
    if not check:
        return
    freedom = probe(module, found.call, traced.q, traced.k, traced.v, out)
    if not freedom.logits:
        raise TraceError(
            f"its output depends on the basis of queries and keys (a norm of them, a rotary position), so they need "
            f"all {size} channels of a head; leave out rank"
        )
    if freedom.values != "linear":
        raise TraceError(
            f"between its heads and {out.weight} stands something that is not linear (an activation, a norm, a gate), "
            f"so values need all {size} channels; leave out rank"
        )


def _refuse_changed(module: nn.Module, found: FoundSite, rank: int, rewritten: Rewritten, cls: type[nn.Module]) -> None:
    """Refuse a site that computes something else with narrow heads, in a case where nothing is lost.

    Raises:
        TraceError: see above.
    """
    traced = found.traced
    assert traced is not None
    shared = traced.k if rewritten.value[0].letter == "k" else traced.q

    def narrow(copied: nn.Module) -> None:
        apply_edits(copied, rewritten.edits)
        object.__setattr__(copied, "__class__", cls)

    if not works_narrow(module, found.call, (traced.q, traced.k, traced.v), shared, rank, narrow):
        raise TraceError(
            f"its forward depends on the number of channels a head has ({found.site.key_dim}) in a way that could not "
            "be followed; leave out rank"
        )


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


def problems_of(model: nn.Module, operations: list[Operation]) -> list[Problem]:
    """The operations as the initializers see them. `model` is the one that is not converted, with its weights.

    Raises:
        ConversionError: several heads of Q share one of K, and closed forms take them head by head.
    """
    for operation in operations:
        q, k = operation.found.site.q, operation.found.site.k
        if q is not None and k is not None and q.num_heads != k.num_heads:
            raise ConversionError(
                f"{operation.fqn} has {q.num_heads} heads of Q for {k.num_heads} of K, and only init 'wq' is there for "
                f"that; use it and train, or leave the site out with exclude={operation.fqn!r}"
            )
    done: dict[str, tuple[OutputProjection | None, Freedom]] = {}
    return [_problem(model, operation, done) for operation in operations]


def _problem(
    model: nn.Module, operation: Operation, done: dict[str, tuple[OutputProjection | None, Freedom]]
) -> Problem:
    found, traced = operation.found, operation.found.traced
    assert traced is not None
    module = model.get_submodule(operation.fqn)
    if found.fingerprint not in done:
        out = _output_of(module, found)
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
        operation.rank,
    )
