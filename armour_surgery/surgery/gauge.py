"""Fix the gauge of converted sites: choose the block, change the basis of what has its weights, and store the rest."""

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from armour_surgery.copies import floating_type, has_weights
from armour_surgery.errors import SchemaError
from armour_surgery.initialize.gauge import LARGEST_CONDITION, Heads, best_block, changed, relative_error
from armour_surgery.initialize.weights import locate, read, read_output, write, write_output
from armour_surgery.modes import get_mode
from armour_surgery.notes import ArmourWarning
from armour_surgery.records import GaugePlan, SitePlan
from armour_surgery.rewrite import AddFixed
from armour_surgery.rewrite.fixed import FixedProjection
from armour_surgery.surgery.operation import Operation, fix
from armour_surgery.surgery.problems import kept_rows

__all__ = ["fix_gauges", "fixed_as", "params_of_gauge"]

# Types in which rounding is too coarse for a basis that is not the one of the training.
_COARSE = (torch.bfloat16, torch.float16)


def fix_gauges(model: nn.Module, operations: list[Operation]) -> tuple[list[Operation], dict[str, GaugePlan]]:
    """Fix the gauge of every site that is to have it, in place; its weights have been chosen before.

    What the model computes stays the same within rounding. Returns the operations with their blocks, and what came of
    each site.

    Warns (ArmourWarning): the model computes in bfloat16 or float16, where rounding counts for more in such a basis; or
    no block of some site is conditioned well enough, and its gauge stays as it was.
    """
    done: list[Operation] = []
    plans: dict[str, GaugePlan] = {}
    for operation in operations:
        if operation.fixing is not None:
            plan = _fix(model.get_submodule(operation.fqn), operation)
            plans[operation.fqn] = plan
            operation = _started(operation, plan)
        done.append(operation)
    _warn(plans, floating_type(model))
    return done, plans


def fixed_as(operation: Operation, record: SitePlan, model: nn.Module) -> Operation:
    """The operation with the block that a plan says, or without one.

    Raises:
        SchemaError: the site has no such block.
    """
    gauge = record.gauge
    if operation.fixing is None or gauge is None or gauge.start is None:
        return replace(operation, fixing=None)
    edit = _new_projection(operation)
    inputs = model.get_submodule(operation.fqn).get_parameter(edit.weight).shape[1]
    if not 0 <= gauge.start <= inputs - edit.width:
        raise SchemaError(
            f"the plan fixes the gauge of {operation.fqn!r} by {edit.width} channels from {gauge.start} on, and it "
            f"reads {inputs}"
        )
    return _started(operation, gauge)


def params_of_gauge(operation: Operation, rank: int | None) -> int:
    """How many parameters a fixed gauge saves at a site whose heads have so many channels (None: all)."""
    width = rank or operation.found.site.key_dim
    return operation.found.site.num_heads * width * width if operation.fixing is not None else 0


def _started(operation: Operation, plan: GaugePlan) -> Operation:
    if operation.fixing is None or plan.start is None:
        return replace(operation, fixing=None)
    return replace(operation, fixing=replace(operation.fixing, start=plan.start))


def _new_projection(operation: Operation) -> AddFixed:
    assert operation.fixing is not None
    return next(edit for edit in operation.fixing.edits if isinstance(edit, AddFixed))


def _fix(site: nn.Module, operation: Operation) -> GaugePlan:
    letter = get_mode(operation.mode).gauge
    if not has_weights(site):
        # Any block has the same shapes.
        fix(site, _started(operation, GaugePlan(0)))
        return GaugePlan(0)
    before = _read(site, operation)
    start, condition = best_block(before.roles[letter])
    if not condition <= LARGEST_CONDITION:
        return GaugePlan(None, condition if math.isfinite(condition) else None)
    dtype = floating_type(site)
    after = changed(before, letter, start)
    errors = relative_error(after, before, dtype, (letter, start)), relative_error(before, before, dtype)
    operation = _started(operation, GaugePlan(start))
    fix(site, operation)
    _write(site, operation, after, letter)
    return GaugePlan(start, condition, *errors)


def _read(site: nn.Module, operation: Operation) -> Heads:
    """The matrices of a site that is converted, its gauge as it was."""
    rewritten, traced, out = operation.rewritten, operation.found.traced, operation.found.output
    assert out is not None
    kept = kept_rows(rewritten.edits)
    sources = {"q": traced.q, "k": traced.k, "v": traced.v}
    key, *_ = rewritten.key
    roles: dict[str, Tensor] = {}
    value: list[tuple[str, int, int]] = []
    # Q is always its own, and as wide as K is; of V, only what is left of it is there.
    roles["q"] = read(site, locate(site, traced.q, kept, 0, key.stop))
    roles[key.letter] = read(site, locate(site, sources[key.letter], kept, 0, key.stop))
    for part in rewritten.value:
        if part.letter == "v":
            roles["v"] = read(site, locate(site, traced.v, kept, part.start, part.stop))
        elif part.letter in sources and part.letter not in roles:
            roles[part.letter] = read(site, locate(site, sources[part.letter], kept, 0, key.stop))
        first = part.start if part.letter in ("q", "k") else 0
        value.append((part.letter, first, first + part.size))
    return Heads(roles, key.letter, tuple(value), read_output(site, out.narrowed(operation.rank))[0])


def _write(site: nn.Module, operation: Operation, heads: Heads, letter: str) -> None:
    """Store matrices in a site whose shapes are those of a fixed gauge; biases of the output stay."""
    traced, out, edit = operation.found.traced, operation.found.output, _new_projection(operation)
    assert out is not None
    kept = kept_rows(operation.edits)
    partner = {"q": traced.k, "k": traced.q}.get(letter)
    if partner is not None:
        matrix = heads.roles["k" if letter == "q" else "q"]
        write(site, locate(site, partner, kept, 0, matrix.shape[-1]), matrix, torch.empty(0))
    narrow = out.narrowed(operation.rank)
    write_output(site, narrow, heads.out, read_output(site, narrow)[1], torch.empty(0))
    projection = site.get_submodule(edit.name)
    assert isinstance(projection, FixedProjection)
    rest, flat = projection.rest, heads.roles[letter].mT.flatten(0, 1)
    with torch.no_grad():
        rest.weight.copy_(flat[:, projection.other_channels()])
        if rest.bias is not None:
            rest.bias.copy_(flat[:, -1])


def _warn(plans: dict[str, GaugePlan], dtype: torch.dtype) -> None:
    left = {fqn: plan for fqn, plan in plans.items() if plan.start is None}
    for fqn, plan in left.items():
        number = "no inverse" if plan.condition is None else f"condition number {plan.condition:.2g}"
        warnings.warn(
            f"{fqn} keeps its gauge: the best of its blocks of channels has {number}, and {LARGEST_CONDITION:.0g} is "
            "the most that rounding allows; its parameters are those of a conversion without gauge",
            ArmourWarning,
            stacklevel=6,
        )
    errors = {fqn: plan for fqn, plan in plans.items() if plan.error is not None}
    if dtype in _COARSE and errors:
        fqn, worst = max(errors.items(), key=lambda item: item[1].error or 0.0)
        warnings.warn(
            f"a fixed gauge makes rounding in {str(dtype).removeprefix('torch.')} count for more: logits and values of "
            f"{fqn} have a relative error of {worst.error:.2g} now, and {worst.error_before:.2g} without it. Leave out "
            "gauge, or compute in float32",
            ArmourWarning,
            stacklevel=6,
        )
