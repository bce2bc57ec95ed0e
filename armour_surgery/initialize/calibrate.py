"""Choose weights site by site on the converted model's own activations, against what the original computes."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from armour_surgery.errors import CalibrationError
from armour_surgery.initialize.batches import HELD_OUT, Batches
from armour_surgery.initialize.problem import Problem
from armour_surgery.initialize.site import Site, SiteResult
from armour_surgery.initialize.stream import learned_tokens
from armour_surgery.initialize.walk import Store, Walk, units_of

__all__ = ["calibrate"]

# Held-out images that are kept for a report.
_REPORTED = 64


def calibrate(
    original: nn.Module,
    converted: nn.Module,
    problems: list[Problem],
    batches: Iterable[Tensor],
    call: Callable[[nn.Module, Tensor], Any],
    done: Callable[[str], None] = lambda fqn: None,
    alone: bool = False,
) -> tuple[list[SiteResult], Batches]:
    """Give every site of `converted` the weights that do best on the images of `batches`; in place.

    Both models must be in eval mode and in float32 or float64. `problems` are the sites in the order they run,
    `call(model, batch)` runs a model, `done(fqn)` is told of every finished site. Labels play no part. With
    `alone` every site gets what it gets in the original, as if no other were converted.

    Returns the sites' results and the batches; these have kept some of the held-out images, at most 64, for a report.

    Raises:
        CalibrationError: fewer than two batches, or fewer tokens than channels.
    """
    units = units_of(original, [problem.fqn for problem in problems])
    before, after = Walk(original, units, call), Walk(converted, units, call)
    store = Store()
    try:
        data = _first_pass(before, after, batches, store)
        results = []
        for number, problem in enumerate(problems):
            results.append(Site(before, after, number, problem, data, store).solve(alone))
            done(problem.fqn)
        return results, data
    finally:
        store.close()


def _first_pass(before: Walk, after: Walk, batches: Iterable[Tensor], store: Store) -> Batches:
    sizes: list[int] = []
    images: dict[int, Tensor] = {}
    kept: list[Tensor] = []
    for index, batch in enumerate(batches):
        if index % HELD_OUT == HELD_OUT - 1 and sum(map(len, kept)) < _REPORTED:
            kept.append(batch)
        last = batch
        if len(batch) not in images:
            images[len(batch)] = batch
            after.start(batch)
        # Up to the first site both models are one.
        store["original", index] = store["converted", index] = before.begin(batch)
        sizes.append(len(batch))
    if len(sizes) < 2:
        raise CalibrationError(
            f"calibration got {sum(sizes)} images in {len(sizes)} batch, and needs two batches at least: one to fit "
            "and one to check on; give more images, or smaller batches"
        )
    data = Batches(sizes, images)
    data.kept = kept or [last]
    data.learned = learned_tokens(before, images[sizes[0]], store["original", 0])
    return data
