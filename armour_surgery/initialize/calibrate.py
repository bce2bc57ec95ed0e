"""Choose weights site by site on the converted model's own activations, against what the original computes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.errors import CalibrationError
from armour_surgery.initialize.batches import HELD_OUT, Batches
from armour_surgery.initialize.block import Block
from armour_surgery.initialize.gram import Gram
from armour_surgery.initialize.hidden import MlpProblem, narrow
from armour_surgery.initialize.output_metric import IMAGES, ErrorMoment, error_moments, in_groups
from armour_surgery.initialize.placement import Placement
from armour_surgery.initialize.problem import Problem
from armour_surgery.initialize.processes import Processes
from armour_surgery.initialize.site import Site, SiteResult
from armour_surgery.initialize.stream import learned_tokens
from armour_surgery.initialize.walk import Store, Walk
from armour_surgery.measure.fidelity import Features

__all__ = ["calibrate"]

# Bytes of output metrics that wait in memory: those of a large model's sites are more than a block's whole work takes.
_METRICS = 2**26
# Held-out images that are kept for a report.
_REPORTED = 64


def calibrate(
    original: nn.Module,
    converted: nn.Module,
    problems: Sequence[Problem],
    mlps: Sequence[MlpProblem],
    units: Mapping[str, str],
    batches: Iterable[Tensor],
    call: Callable[[nn.Module, Tensor], Any],
    features: Features,
    done: Callable[[str], None],
    placement: Placement,
    processes: Processes,
    *,
    alone: bool,
    forgets: bool,
    by_features: bool,
) -> tuple[list[SiteResult], Batches]:
    """Give every site of `converted` the weights that do best on the images of `batches`; in place.

    Both models must be in eval mode, and in float32 or float64 where `placement` has them run. `problems` are the
    sites; `mlps` get fewer hidden channels, chosen in the stream as it then is; `units` names the part of the model
    that each of all these is in, in the order in which they run. `call(model, batch)` runs a model, `features` does so
    to its end, `done(fqn)` is told of every finished site. Labels play no part. With `alone` every site gets what it
    gets in the original, as if no other were converted. With `forgets` the original's blocks are let go one by one:
    afterwards it has no weights there. With `by_features` errors of a site's output count by what they do to the final
    features (`output_metric.py`), and all alike without. Of `processes` every one calls this, with the same arguments;
    then each keeps and runs its share of the batches, and all end with the same weights.

    Returns the sites' results, those of MLPs among them, and the batches; these have kept some of the held-out images,
    at most 64, and what the original makes of them, for a report.

    Raises:
        CalibrationError: fewer than two batches, or fewer tokens than channels.
    """
    parts: dict[str, tuple[list[Problem], list[MlpProblem]]] = {}
    for fqn, unit in units.items():
        here = parts.setdefault(unit, ([], []))
        here[0].extend(problem for problem in problems if problem.fqn == fqn)
        here[1].extend(mlp for mlp in mlps if mlp.fqn == fqn)
    parts = {unit: here for unit, here in parts.items() if any(here)}
    before, after = Walk(original, list(parts), call), Walk(converted, list(parts), call)
    store, metrics = Store(), Store(_METRICS)
    try:
        data, first = _first_pass(before, after, batches, store, processes)
        with torch.no_grad():
            data.wanted = [features(original, batch) for batch in data.kept]
        if by_features:
            with placement.differentiable():
                _note_errors(original, problems, first, features, data, metrics)
        results: list[SiteResult] = []
        for number, (attention, hidden) in enumerate(parts.values()):
            with placement.held(before.unit(number), written=False), placement.held(after.unit(number), written=True):
                block = Block(before, after, number, attention[0] if attention else None, data, store, placement)
                solved = _solved(block, attention, metrics, hidden, alone)
                processes.share(after.unit(number))
            results += solved
            for result in solved:
                done(result.fqn)
            if forgets and before.is_past(number):
                placement.forget(before.unit(number), map(before.unit, range(number + 1, len(parts))))
        return results, data
    finally:
        store.close()
        metrics.close()


def _solved(
    block: Block,
    attention: list[Problem],
    metrics: Store,
    hidden: list[MlpProblem],
    alone: bool,
) -> list[SiteResult]:
    """What became of all that is in a block, which has its weights then."""
    block.find_branches()
    block.run_original()
    solved = []
    for problem in attention:
        rows, count = metrics.pop(problem.fqn, ([], 0))
        site = Site(block, problem, ErrorMoment(Gram(rows), count))
        solved.append(site.solve(alone))
    solved += [narrow(block, mlp, alone) for mlp in hidden]
    if block.finish(alone):
        solved = [replace(result, steps=(*result.steps, "last layer")) for result in solved]
    return solved


def _note_errors(
    original: nn.Module,
    problems: Sequence[Problem],
    images: list[Tensor],
    features: Features,
    data: Batches,
    metrics: Store,
) -> None:
    """Store how much errors of each site's output count, where that can be told."""
    for group in in_groups(_outputs(original, problems)):
        found = error_moments(
            original, group, images, lambda model, batch: features(model, batch)[0], data.weights, data.processes
        )
        while found:  # they are let go here, since the next group takes as much memory
            fqn, errors = found.popitem()
            metrics[fqn] = errors.total.rows, errors.count


def _outputs(original: nn.Module, problems: Sequence[Problem]) -> dict[str, Tensor]:
    """The weights of the sites' output projections, where they have one."""
    return {
        problem.fqn: original.get_submodule(problem.fqn).get_parameter(problem.out.weight)
        for problem in problems
        if problem.out is not None
    }


def _first_pass(
    before: Walk, after: Walk, batches: Iterable[Tensor], store: Store, processes: Processes
) -> tuple[Batches, list[Tensor]]:
    """Store what the first unit gets; returns the batches, and the first images of those that are fitted to."""
    first: list[tuple[int, Tensor]] = []
    sizes: list[int] = []
    images: dict[int, Tensor] = {}
    kept: list[Tensor] = []
    for index, batch in enumerate(batches):
        if index % HELD_OUT == HELD_OUT - 1 and sum(map(len, kept)) < _REPORTED:
            kept.append(batch)
        room = IMAGES - sum(len(some) for _, some in first)
        if index % HELD_OUT != HELD_OUT - 1 and room > 0:
            first.append((index, batch[:room]))
        last = batch
        if len(batch) not in images:
            images[len(batch)] = batch
            after.start(batch)
        if processes.has(index):
            # Up to the first site both models are one.
            store["original", index] = store["converted", index] = before.begin(batch)
        sizes.append(len(batch))
    if len(sizes) < processes.world:
        raise CalibrationError(
            f"calibration got {len(sizes)} batches for {processes.world} processes, and each needs one; give more "
            "images, smaller batches, or start fewer processes"
        )
    if len(sizes) < 2:
        raise CalibrationError(
            f"calibration got {sum(sizes)} images in {len(sizes)} batch, and needs two batches at least: one to fit "
            "and one to check on; give more images, or smaller batches"
        )
    data = Batches(sizes, images, processes)
    data.kept = kept or [last]
    own = images[sizes[data.first]]
    data.learned = processes.first(learned_tokens(before, own, store["original", data.first]))
    return data, [some for index, some in first if not data.held_out[index]]
