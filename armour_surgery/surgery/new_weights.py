"""Between the spine and the initializers: which images, in which precision, and what came of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from armour_surgery.copies import alias, copy_weights, full_copy
from armour_surgery.initialize import Problem, SiteResult, calibrate, from_weights, reconstruct
from armour_surgery.initialize.walk import units_of
from armour_surgery.measure.fidelity import compare_outputs
from armour_surgery.records import Fidelity, Progress
from armour_surgery.surgery.calibration_images import CalibrationData
from armour_surgery.surgery.operation import Operation
from armour_surgery.surgery.order import Images
from armour_surgery.surgery.problems import problems_of

__all__ = ["Effect", "choose_weights", "measure_alone", "to_read_again"]

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
    original: nn.Module,
    converted: nn.Module,
    operations: list[Operation],
    init: str,
    example: dict[str, Tensor],
    images: Images | None,
    progress: Progress | None,
    steps: int = 0,
) -> tuple[list[SiteResult], Fidelity | None]:
    """Give a converted model its weights, in place; with `images`, also say how near it is to the original then.

    Both models keep their types, modes and devices. What they compute with meanwhile is at least float32. With
    `steps` every site goes on by gradient for so many.
    """
    with _precise(original, converted) as (before, after):
        problems = problems_of(before, operations)
        if images is None:
            dtype = next(p.dtype for p in before.parameters() if p.is_floating_point())
            given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in example.items()}
            return from_weights(before, after, problems, init, lambda model: model(**given)), None
        data = CalibrationData(before, example, images, progress)
        results, batches = calibrate(
            before, after, problems, data.batches(), data.call, data.counter("calibrating", len(problems))
        )
        judged, reported = _halves(batches.kept) if steps else ([], batches.kept)
        if steps:
            sites = [after.get_submodule(problem.fqn) for problem in problems]
            weights = [one for site in sites for one in site.parameters() if one.is_floating_point()]
            first, least = reconstruct(
                before,
                after,
                units_of(before, [problem.fqn for problem in problems]),
                weights,
                data.fresh(len(batches.sizes)),
                judged,
                lambda model, batch: data.features(model, batch)[0],
                steps,
                data.counter("reconstructing", steps),
                batches.weights,
            )
            if least < first:
                results = [replace(one, steps=(*one.steps, "reconstruction")) for one in results]
        return results, compare_outputs(before, after, reported, data.features, data.source)


def measure_alone(
    original: nn.Module,
    converted: nn.Module,
    operations: list[Operation],
    example: dict[str, Tensor],
    images: Images,
    progress: Progress | None,
) -> list[Effect]:
    """Calibrate every site as if no other were converted, and measure what the model loses by it alone."""
    with _precise(original, converted) as (before, after):
        problems = problems_of(before, operations)
        data = CalibrationData(before, example, images, progress)
        done = data.counter("measuring sites", 2 * len(problems))
        results, batches = calibrate(before, after, problems, data.batches(), data.call, done, alone=True)
        effects = []
        for problem, unit, result in zip(
            problems, units_of(before, [problem.fqn for problem in problems]), results, strict=True
        ):
            hybrid = alias(before)
            hybrid.set_submodule(unit, after.get_submodule(unit))
            found = compare_outputs(before, hybrid, batches.kept, data.features, data.source)
            effects.append(Effect(result, 1 - found.cosine, _per_channel(before, problem) if result.ranks else 0))
            done(problem.fqn)
        return effects


def to_read_again(model: nn.Module, example: dict[str, Tensor], images: Images) -> Images:
    """Images that can be read as often as wanted: those of a caller are read once, checked and kept.

    Raises:
        CalibrationError: see `calibration_batches`.
    """
    return (
        images if isinstance(images.source, str | os.PathLike) else CalibrationData(model, example, images, None).once()
    )


def _per_channel(model: nn.Module, problem: Problem) -> int:
    site = model.get_submodule(problem.fqn)
    parameters = dict(site.named_parameters())
    rows = sum(
        parameters[name][0].numel()
        for role in (problem.q, problem.k)
        for name in role.producer.rows
        if name in parameters
    )
    assert problem.out is not None
    return problem.q.num_heads * (rows + len(parameters[problem.out.weight]))


def _halves(batches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The same images in two lists: to judge by, and to report on."""
    return [batch[::2] for batch in batches], [batch[1::2] for batch in batches if len(batch) > 1] or batches


@contextmanager
def _precise(original: nn.Module, converted: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Both models in eval mode and in float32 at least; what the second one learns goes back into it."""
    modes = {name: module.training for name, module in converted.named_modules()}
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
        for name, module in converted.named_modules():
            module.training = modes[name]
