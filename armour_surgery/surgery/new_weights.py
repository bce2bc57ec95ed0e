"""Between the spine and the initializers: which images, in which precision, and what came of it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from armour_surgery.calls import run
from armour_surgery.copies import alias, copy_weights, full_copy, has_weights
from armour_surgery.examples import Example, on_meta, with_numbers
from armour_surgery.initialize import Problem, SiteResult, calibrate, from_weights, reconstruct
from armour_surgery.initialize.batches import Batches
from armour_surgery.initialize.walk import units_of
from armour_surgery.measure.fidelity import compare_outputs
from armour_surgery.records import Fidelity
from armour_surgery.surgery.calibration_images import CalibrationData
from armour_surgery.surgery.mlps import params_per_channel, problems_of_mlps
from armour_surgery.surgery.operation import Prepared
from armour_surgery.surgery.order import Images, Order
from armour_surgery.surgery.problems import problems_of

__all__ = ["Effect", "choose_weights", "measure_alone", "to_read_again"]

# Types in which the closed forms' moments can be gathered without loss that matters.
_EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Effect:
    """What one site does to the model when it alone is converted: `loss` as in `Sensitivity`.

    `per_channel` is how many parameters each shared channel of all heads costs; 0 where their number is not free.
    """

    result: SiteResult
    loss: float
    per_channel: int


def choose_weights(
    original: nn.Module, converted: nn.Module, prepared: Prepared, order: Order
) -> tuple[list[SiteResult], Fidelity | None]:
    """Give a converted model its weights, in place; with images, also say how near it is to the original then.

    Its MLPs, which have all their hidden channels until now, get fewer.

    Both models keep their types, modes and devices. What they compute with meanwhile is at least float32. With
    `order.steps` every site goes on by gradient for so many.
    """
    with _precise(original, converted) as (before, after):
        problems = problems_of(before, prepared.operations)
        if order.init != "calibrated":
            inputs = _as_precise(order.example, before)

            def call(model: nn.Module) -> Any:
                # Without weights if that will do, and else with the model's own (`from_weights`).
                moved = with_numbers(inputs, _device(model)) if has_weights(model) else on_meta(inputs)
                return run(model, moved)

            return from_weights(before, after, problems, order.init, call), None
        data = CalibrationData(before, order.example, order.images, order.progress)
        done = data.counter("calibrating", len(problems) + len(prepared.mlps))
        results, batches = _calibrated(before, after, problems, prepared, data, done, alone=False)
        reported = batches.kept
        if order.steps:
            judged, reported = _halves(batches.kept)
            if _reconstruct(before, after, problems, data, batches, judged, order.steps):
                results = [replace(result, steps=(*result.steps, "reconstruction")) for result in results]
        return results, compare_outputs(before, after, reported, data.features, data.source)


def _as_precise(example: Example, model: nn.Module) -> Example:
    """The example in the type that a model computes with."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    inputs: Example = pytree.tree_map_only(Tensor, cast, example)
    return inputs


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _reconstruct(
    before: nn.Module,
    after: nn.Module,
    problems: list[Problem],
    data: CalibrationData,
    batches: Batches,
    judged: list[Tensor],
    steps: int,
) -> bool:
    """Go on by gradient from the closed forms, with the weights of the sites alone; whether it helped."""
    fqns = [problem.fqn for problem in problems]
    weights = []
    for fqn in fqns:
        weights += [weight for weight in after.get_submodule(fqn).parameters() if weight.is_floating_point()]
    first, least = reconstruct(
        before,
        after,
        units_of(before, fqns),
        weights,
        data.fresh(len(batches.sizes)),
        judged,
        lambda model, batch: data.features(model, batch)[0],
        steps,
        data.counter("reconstructing", steps),
        batches.weights,
    )
    return least < first


def measure_alone(
    original: nn.Module, converted: nn.Module, prepared: Prepared, order: Order, images: Images
) -> list[Effect]:
    """Calibrate every site as if no other were converted, and measure what the model loses by it alone.

    The same for MLPs; of a block that holds both, one of them.
    """
    with _precise(original, converted) as (before, after):
        problems = problems_of(before, prepared.operations)
        data = CalibrationData(before, order.example, images, order.progress)
        # Every site counts twice: it is calibrated, and then measured.
        what = "measuring MLPs" if prepared.mlps else "measuring sites"
        done = data.counter(what, 2 * (len(problems) + len(prepared.mlps)))
        per_channel = {problem.fqn: _per_channel(before, problem) for problem in problems}
        per_channel |= {mlp.found.fqn: params_per_channel(before, mlp.found) for mlp in prepared.mlps}
        results, batches = _calibrated(before, after, problems, prepared, data, done, alone=True)
        units = _units(before, problems, prepared)
        effects = []
        for result in results:
            unit = units[result.fqn]
            hybrid = alias(before)
            hybrid.set_submodule(unit, after.get_submodule(unit))
            fidelity = compare_outputs(before, hybrid, batches.kept, data.features, data.source)
            each = per_channel[result.fqn] if result.ranks else 0
            effects.append(Effect(result, 1 - fidelity.cosine, each))
            done(result.fqn)
        return effects


def _calibrated(
    before: nn.Module,
    after: nn.Module,
    problems: list[Problem],
    prepared: Prepared,
    data: CalibrationData,
    done: Callable[[str], None],
    *,
    alone: bool,
) -> tuple[list[SiteResult], Batches]:
    """Calibrate what was prepared, on the images once."""
    units, mlps = _units(before, problems, prepared), problems_of_mlps(prepared.mlps)

    def features(model: nn.Module, batch: Tensor) -> Tensor:
        return data.features(model, batch)[0]

    return calibrate(before, after, problems, mlps, units, data.batches(), data.call, features, done, alone=alone)


def _units(model: nn.Module, problems: list[Problem], prepared: Prepared) -> dict[str, str]:
    """The part of the model that each site, and each MLP, is in."""
    if prepared.units:
        return prepared.units
    fqns = [problem.fqn for problem in problems]
    return dict(zip(fqns, units_of(model, fqns), strict=True))


def to_read_again(model: nn.Module, example: dict[str, Tensor], images: Images) -> Images:
    """Images that can be read as often as wanted: those of a caller are read once, checked and kept.

    Raises:
        CalibrationError: see `calibration_batches`.
    """
    if isinstance(images.source, str | os.PathLike):
        return images
    return CalibrationData(model, example, images, None).once()


def _per_channel(model: nn.Module, problem: Problem) -> int:
    """How many parameters one channel of every head costs: its rows of Q and K, and what the output reads of it."""
    if problem.out is None:
        return 0
    parameters = dict(model.get_submodule(problem.fqn).named_parameters())
    a_channel = len(parameters[problem.out.weight])
    for role in (problem.q, problem.k):
        for name in role.producer.rows:
            if name in parameters:
                a_channel += parameters[name][0].numel()
    return problem.q.num_heads * a_channel


def _halves(batches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The same images in two lists: to judge by, and to report on."""
    judged, reported = [], []
    for batch in batches:
        judged.append(batch[::2])
        if len(batch) > 1:
            reported.append(batch[1::2])
    # Where every batch has one image, it has to do for both.
    return judged, reported or batches


@contextmanager
def _precise(original: nn.Module, converted: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Both models in eval mode and in float32 at least; what the second one learns goes back into it."""
    modes = [(module, module.training) for module in converted.modules()]
    low = any(p.dtype not in _EXACT for p in original.parameters() if p.is_floating_point())
    before = full_copy(original).float() if low else alias(original)
    after = full_copy(converted).float() if low else converted
    before.eval()
    after.eval()
    try:
        yield before, after
    finally:
        if low:
            copy_weights(after, converted)
        # Module by module: `train()` would set all of them alike, and some hosts override it.
        for module, training in modes:
            module.training = training
