"""Between the spine and the initializers: which images, in which precision, and what came of it."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from armour_surgery.calls import run
from armour_surgery.copies import alias, copy_weights, full_copy, hand_over, has_weights
from armour_surgery.examples import Example, on_meta, with_numbers
from armour_surgery.initialize import Problem, SiteResult, calibrate, from_weights, reconstruct
from armour_surgery.initialize.batches import Batches
from armour_surgery.initialize.placement import EXACT, Placement
from armour_surgery.initialize.processes import Processes
from armour_surgery.initialize.walk import units_of
from armour_surgery.measure.fidelity import compare_outputs
from armour_surgery.records import Fidelity
from armour_surgery.surgery.calibration_images import CalibrationData
from armour_surgery.surgery.mlps import narrow_without_images, parameters_of, params_per_channel, problems_of_mlps
from armour_surgery.surgery.operation import Prepared
from armour_surgery.surgery.order import Images, Order
from armour_surgery.surgery.problems import problems_of

__all__ = ["Effect", "choose_weights", "measure_alone", "to_read_again"]


@dataclass(frozen=True)
class Effect:
    """What one site does to the model when it alone is converted: `loss` as in `Sensitivity`.

    `per_channel` is how many parameters each shared channel of all heads costs; 0 where their number is not free.
    """

    result: SiteResult
    loss: float
    per_channel: int


def choose_weights(
    original: nn.Module, converted: nn.Module, prepared: Prepared, order: Order, *, shared: bool = False
) -> tuple[list[SiteResult], Fidelity | None]:
    """Give a converted model its weights, in place; with images, also say how near it is to the original then.

    Its MLPs, which have all their hidden channels until now, get fewer.

    Both models keep their types, modes and devices. What they compute with meanwhile is at least float32. With
    `order.steps` every site goes on by gradient for so many. With `shared` the models' tensors hold the same memory,
    and the original's blocks have no numbers afterwards where a calibration needs them no more.
    """
    if order.init != "calibrated":
        with _precise(original, converted) as (before, after):
            inputs = _as_precise(order.example, before)

            def call(model: nn.Module) -> Any:
                # Without weights if that will do, and else with the model's own (`from_weights`).
                moved = with_numbers(inputs, _device(model)) if has_weights(model) else on_meta(inputs)
                return run(model, moved)

            problems = problems_of(before, prepared.operations)
            return from_weights(before, after, problems, order.init, call), None
    with _calibration(original, converted, prepared, order, order.images, shared=shared) as work:
        done = work.data.counter("calibrating", work.count)
        results, batches = work.calibrate(done, alone=False, forgets=shared and not order.steps)
        reported, wanted = batches.kept, batches.wanted
        if order.steps:
            judged, reported = _halves(batches.kept)
            wanted = [work.data.answer(work.before, batch) for batch in reported]
            if _reconstruct(work, batches, judged, order.steps):
                results = [replace(result, steps=(*result.steps, "reconstruction")) for result in results]
        fidelity = compare_outputs(wanted, work.after, reported, work.data.features, work.data.source)
        # What is chosen by it has to be the same in all processes.
        fidelity = work.processes.first(fidelity)
    if work.after is not converted:
        narrow_without_images(converted, prepared.mlps)
        hand_over(work.after, converted)
    return results, fidelity


def _as_precise(example: Example, model: nn.Module) -> Example:
    """The example in the type that a model computes with."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    inputs: Example = pytree.tree_map_only(Tensor, cast, example)
    return inputs


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@dataclass(frozen=True)
class _Calibration:
    """Both models as they are run, what is to be found for them, and the images that it is found with.

    `units` names the part of the model that each site, and each MLP, is in.
    """

    before: nn.Module
    after: nn.Module
    problems: list[Problem]
    prepared: Prepared
    units: dict[str, str]
    data: CalibrationData
    placement: Placement
    processes: Processes

    @property
    def count(self) -> int:
        """How many sites and MLPs there are."""
        return len(self.problems) + len(self.prepared.mlps)

    def calibrate(
        self, done: Callable[[str], None], *, alone: bool, forgets: bool = False
    ) -> tuple[list[SiteResult], Batches]:
        """Calibrate what was prepared, on the images once.

        What features notice of drawn images is not what they notice of photos (docs/calibration.md).
        """
        return calibrate(
            self.before,
            self.after,
            self.problems,
            problems_of_mlps(self.prepared.mlps),
            self.units,
            self.data.batches(),
            self.data.call,
            self.data.features,
            done,
            self.placement,
            self.processes,
            alone=alone,
            forgets=forgets,
            by_features=not self.data.drawn,
        )


@contextmanager
def _calibration(
    original: nn.Module, converted: nn.Module, prepared: Prepared, order: Order, images: Images, *, shared: bool
) -> Iterator[_Calibration]:
    """Everything for a calibration. Both models are in eval mode.

    Where they have to compute somewhere else than they are, or in another type, or hold the same memory, their parts
    come and go one by one, and `after` is an alias of the converted model.
    """
    at_home = _device(original)
    # "cuda" is the present one of several.
    device = at_home if order.device is None else torch.empty(0, device=order.device).device
    inexact = any(p.dtype not in EXACT for p in original.parameters() if p.is_floating_point())
    placement = Placement(device, moves=shared or inexact or device != at_home)
    before = alias(original)
    # Caches that a host keeps in its modules are of where and in which type it ran: another's, if it moves.
    after = alias(converted) if placement.moves else converted
    with _evaluating(before, after):
        problems = problems_of(before, prepared.operations)
        units = prepared.units or _units(before, problems)
        blocks = list(dict.fromkeys(units.values()))
        data = CalibrationData(before, order.example, images, order.progress, placement)
        with placement.attached(before, blocks), placement.attached(after, blocks):
            yield _Calibration(before, after, problems, prepared, units, data, placement, order.processes)


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside, models are in eval mode."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        # Module by module: `train()` would set all of them alike, and some hosts override it.
        for module, training in modes:
            module.training = training


def _units(model: nn.Module, problems: list[Problem]) -> dict[str, str]:
    """The part of the model that each site is in."""
    fqns = [problem.fqn for problem in problems]
    return dict(zip(fqns, units_of(model, fqns), strict=True))


def _reconstruct(work: _Calibration, batches: Batches, judged: list[Tensor], steps: int) -> bool:
    """Go on by gradient from the closed forms, with the weights of sites and narrowed MLPs alone; whether it helped."""
    before, after, data = work.before, work.after, work.data
    changed = {problem.fqn for problem in work.problems} | {mlp.found.fqn for mlp in work.prepared.mlps}
    blocks = list(dict.fromkeys(unit for fqn, unit in work.units.items() if fqn in changed))
    with ExitStack() as stack:
        # All blocks learn at once.
        for block in blocks:
            stack.enter_context(work.placement.held(before.get_submodule(block), written=False))
            stack.enter_context(work.placement.held(after.get_submodule(block), written=True))
        weights = []
        for problem in work.problems:
            weights += [
                weight for weight in after.get_submodule(problem.fqn).parameters() if weight.is_floating_point()
            ]
        for mlp in work.prepared.mlps:
            weights += parameters_of(after, mlp.found)
        first, least = reconstruct(
            before,
            after,
            blocks,
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

    The same for MLPs; of a block that holds both, one of them. The converted model's tensors may hold the original's
    memory (`copies.sharing_copy`).
    """
    with _calibration(original, converted, prepared, order, images, shared=True) as work:
        data, before = work.data, work.before
        # Every site counts twice: it is calibrated, and then measured.
        done = data.counter("measuring MLPs" if prepared.mlps else "measuring sites", 2 * work.count)
        per_channel = {problem.fqn: _per_channel(before, problem) for problem in work.problems}
        per_channel |= {mlp.found.fqn: params_per_channel(before, mlp.found) for mlp in prepared.mlps}
        results, batches = work.calibrate(done, alone=True)
        losses: dict[str, float] = {}
        for number, result in enumerate(results):
            if work.processes.has(number):
                losses[result.fqn] = _loss_alone(work, work.units[result.fqn], batches)
            done(result.fqn)
        losses = work.processes.union(losses)
        effects = []
        for result in results:
            each = per_channel[result.fqn] if result.ranks else 0
            effects.append(Effect(result, losses[result.fqn], each))
        return effects


def _loss_alone(work: _Calibration, unit: str, batches: Batches) -> float:
    """What the original loses with that part of it converted."""
    hybrid = alias(work.before)
    hybrid.set_submodule(unit, work.after.get_submodule(unit))
    with work.placement.attached(hybrid, set(work.units.values())):
        return 1 - compare_outputs(batches.wanted, hybrid, batches.kept, work.data.features, work.data.source).cosine


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
    low = any(p.dtype not in EXACT for p in original.parameters() if p.is_floating_point())
    before = full_copy(original).float() if low else alias(original)
    after = full_copy(converted).float() if low else converted
    with _evaluating(before, after):
        try:
            yield before, after
        finally:
            if low:
                copy_weights(after, converted)
