"""Which sites to convert, in which mode and with how many channels: the most rewarding first, within a budget of loss.

A model's *loss* is 1 - the mean cosine of its final features' tokens to the original's, on held-out images. What
converting a site costs is measured for each site alone; small errors add up nearly, so a choice of sites is predicted
to cost the sum. What the sum leaves out is measured by converting, and the prediction scaled by it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from armour_surgery import hosts
from armour_surgery.copies import copy_weights, full_copy
from armour_surgery.discover import FoundSite
from armour_surgery.errors import NothingToConvertError
from armour_surgery.measure.cost import count_params
from armour_surgery.modes import AUTO, choose
from armour_surgery.records import FrontierPoint, Progress, RefusedSite, Sensitivity
from armour_surgery.surgery.new_weights import Effect, measure_alone, to_read_again
from armour_surgery.surgery.operation import Operation, operate, prepare
from armour_surgery.surgery.order import Order
from armour_surgery.surgery.perform import perform, surgery_of

__all__ = ["Choice", "convert_within", "frontier", "measure_sites", "search"]

# Images that sites are measured on one by one: enough to rank them.
SENSITIVITY_IMAGES = 64
# Ranks are multiples of this: what hardware likes.
RANK_STEP = 8
_TRIES = 4
# A conversion this near to its budget is not tried again.
_CLOSE = 0.85
# What automatic ranks may cost: so much more than full ones, or this loss if that is more.
_SLACK = 1.1
_LITTLE = 0.001

Choice = tuple[tuple[str, str, int | None], ...]


@dataclass(frozen=True)
class _Step:
    """From one way of converting a site to the next that saves more."""

    to: Sensitivity
    saved: int
    loss: float

    @property
    def price(self) -> float:
        return self.loss / max(self.saved, 1)


def convert_within(
    model: nn.Module,
    found: list[FoundSite],
    operations: list[Operation],
    refused: list[RefusedSite],
    order: Order,
    budget: float | None,
    rank: int | Mapping[str, int] | None,
    *,
    automatic: bool,
    inplace: bool,
) -> nn.Module:
    """Convert the sites that fit a budget of loss, and say on the plan what was weighed.

    `operations` are those of converting everything. `automatic`: ranks are free; without a budget it is a tenth more
    than what full ranks cost, or 0.001.

    Raises:
        NothingToConvertError: the budget leaves nothing.
    """
    assert order.images is not None
    order = replace(order, images=to_read_again(model, order.example, order.images))
    sites = {operation.fqn for operation in operations}
    found = [one for one in found if one.site.fqn in sites]

    def attempt(choice: Choice) -> tuple[nn.Module, float]:
        modes = {fqn: mode for fqn, mode, _ in choice}
        ranks = {fqn: number for fqn, _, number in choice if number is not None}
        chosen, _ = prepare(model, [one for one in found if one.site.fqn in modes], modes, ranks)
        left = [
            RefusedSite(name, f"converting it costs more than a loss of {budget:.4g} allows")
            for name in sorted(sites - modes.keys())
        ]
        converted = perform(model, chosen, [*refused, *left], order, inplace=False)
        fidelity = surgery_of(converted).fidelity
        assert fidelity is not None
        return converted, 1 - fidelity.cosine

    with torch.inference_mode(False):
        options = measure_sites(model, found, order, ranks=automatic)
    if rank is not None:
        fixed = {one.fqn: one.rank for one in operations}
        options = [replace(one, rank=fixed[one.fqn]) for one in options]
    params = count_params(model)
    points = frontier(options, params)
    if budget is None:
        full = tuple((one.fqn, one.mode, None) for one in operations)
        points = _beyond(options, full, params)
        first, loss = attempt(full)
        budget = max(_SLACK * loss, _LITTLE)
        points[0] = replace(points[0], measured=loss)
    else:
        first = None
    best, points, _ = search(points, budget, attempt, order.progress, first)
    surgery = replace(surgery_of(best), sensitivities=tuple(options), frontier=tuple(points), max_loss=budget)
    best.surgery = surgery  # type: ignore[assignment]
    if not inplace:
        return best
    modes = {site.fqn: site.mode for site in surgery.sites}
    ranks = {site.fqn: site.rank for site in surgery.sites if site.rank is not None}
    chosen, _ = prepare(model, [one for one in found if one.site.fqn in modes], modes, ranks)
    for operation in chosen:
        operate(model, operation, order.init)
    copy_weights(best, model)
    model.surgery = surgery  # type: ignore[assignment]
    hosts.mark_converted(model)
    return model


def _beyond(options: Sequence[Sensitivity], full: Choice, params: int) -> list[FrontierPoint]:
    """The frontier from where every site has its full rank."""
    base = {one.fqn: one for one in options if (one.fqn, one.mode, None) in full and one.rank is None}
    further = [
        replace(one, params_saved=one.params_saved - base[one.fqn].params_saved, loss=one.loss - base[one.fqn].loss)
        for one in options
        if one.rank is not None and one.mode == base[one.fqn].mode
    ]
    saved, loss = sum(one.params_saved for one in base.values()), sum(one.loss for one in base.values())
    points = []
    for point in frontier(further, params - saved):
        ranks = {fqn: rank for fqn, _, rank in point.sites}
        sites = tuple((fqn, mode, ranks.get(fqn)) for fqn, mode, _ in full)
        points.append(FrontierPoint(point.params, point.predicted + loss, None, sites))
    return points


def measure_sites(model: nn.Module, found: list[FoundSite], order: Order, *, ranks: bool) -> list[Sensitivity]:
    """What every site costs when it alone is converted: in its mode, for wide V under `auto` also in `concat-full`.

    With `ranks`, also with fewer channels a head, in steps of 8: then what the closed form leaves out, relative to all
    channels, scales what was measured.
    """
    images = order.images
    assert images is not None
    images = replace(images, count=min(images.count, SENSITIVITY_IMAGES))
    options: list[Sensitivity] = []
    for mode in _modes(found, order.mode):
        chosen = {one.site.fqn: mode for one in found if mode in one.site.modes}
        operations, _ = prepare(model, [one for one in found if one.site.fqn in chosen], chosen)
        converted = full_copy(model)
        plans = [operate(converted, operation, order.init) for operation in operations]
        effects = measure_alone(model, converted, operations, order.example, images, order.progress)
        sizes = {one.site.fqn: one.site.key_dim for one in found}
        for plan, effect in zip(plans, effects, strict=True):
            saved = plan.params_before - plan.params_after
            options.append(Sensitivity(plan.fqn, mode, None, saved, effect.result.residual, max(effect.loss, 0.0)))
            if ranks:
                options += _with_ranks(options[-1], effect, sizes[plan.fqn])
    return options


def _modes(found: list[FoundSite], requested: str) -> list[str]:
    if requested != AUTO:
        return [requested]
    usual = {choose(one.site, AUTO)[0] for one in found} - {None}
    wide = ["concat-full"] if "concat-half" in usual else []
    return [*sorted(name for name in usual if name), *wide]


def _with_ranks(full: Sensitivity, effect: Effect, size: int) -> list[Sensitivity]:
    """The same site with fewer channels a head, where their number is free."""
    if not effect.per_channel:
        return []
    found = []
    for rank in range((size - 1) // RANK_STEP * RANK_STEP, 0, -RANK_STEP):
        lost = effect.result.ranks[rank - 1]
        saved = full.params_saved + (size - rank) * effect.per_channel
        found.append(
            replace(full, rank=rank, params_saved=saved, loss=full.loss * lost, residual=full.residual * lost**0.5)
        )
    return found


def frontier(options: Sequence[Sensitivity], params: int) -> list[FrontierPoint]:
    """Choices of sites from none to all, each a site's next step further, the most parameters for the loss first.

    Of a site's options only those count that no mixture of others beats (the lower convex hull). `params` are those of
    the model as it was.
    """
    steps = sorted((step for site in _by_site(options) for step in _hull(site)), key=lambda step: step.price)
    chosen: dict[str, Sensitivity] = {}
    left, loss = params, 0.0
    points = [FrontierPoint(params, 0.0, None, ())]
    for step in steps:
        chosen[step.to.fqn] = step.to
        left, loss = left - step.saved, loss + step.loss
        sites = tuple((one.fqn, one.mode, one.rank) for one in chosen.values())
        points.append(FrontierPoint(left, loss, None, sites))
    return points


def _by_site(options: Sequence[Sensitivity]) -> list[list[Sensitivity]]:
    sites: dict[str, list[Sensitivity]] = {}
    for one in options:
        sites.setdefault(one.fqn, []).append(one)
    return list(sites.values())


def _hull(options: list[Sensitivity]) -> list[_Step]:
    """A site's steps, each dearer per parameter than the one before."""
    steps: list[_Step] = []
    saved, loss = 0, 0.0
    rest = sorted(options, key=lambda one: one.params_saved)
    while rest:
        best = min(
            rest, key=lambda one: (max(one.loss - loss, 0.0) / max(one.params_saved - saved, 1), -one.params_saved)
        )
        steps.append(_Step(best, best.params_saved - saved, max(best.loss - loss, 0.0)))
        saved, loss = best.params_saved, best.loss
        rest = [one for one in rest if one.params_saved > saved]
    return steps


def search(
    points: list[FrontierPoint],
    budget: float,
    attempt: Callable[[Choice], tuple[nn.Module, float]],
    progress: Progress | None = None,
    first: nn.Module | None = None,
) -> tuple[nn.Module, list[FrontierPoint], FrontierPoint]:
    """The smallest model within the budget: convert, measure, and correct the prediction, a few times.

    `attempt(sites)` converts and returns the model and its loss; `first` is the model of the first point, if it is
    one. Returns the model, the frontier with what was measured, and the point that was taken.

    Raises:
        NothingToConvertError: even the cheapest site alone costs more than the budget.
    """
    start = points[0].measured
    scale = start / max(points[0].predicted, 1e-12) if start is not None else 1.0
    best = (0, first) if first is not None else None
    tried: dict[int, float] = {}
    low, high = 0, len(points)
    for number in range(_TRIES):
        fitting = [place for place in range(low + 1, high) if points[place].predicted * scale <= budget]
        place = max(fitting, default=low + 1)
        if place >= high:
            break
        if progress is not None:
            progress("converting within the budget, attempt", number + 1, _TRIES)
        model, loss = attempt(points[place].sites)
        tried[place] = loss
        if loss <= budget:
            low, best = place, (place, model)
            if loss >= _CLOSE * budget:
                break
        else:
            high = place
        scale = loss / max(points[place].predicted, 1e-12)
    measured = [replace(one, measured=tried.get(place, one.measured)) for place, one in enumerate(points)]
    if best is None:
        place, loss = min(tried.items(), key=lambda item: item[1])
        raise NothingToConvertError(
            f"max_loss {budget:g} leaves no site to convert: {points[place].sites[0][0]} and "
            f"{len(points[place].sites) - 1} others cost {loss:.4f}, measured as 1 - cosine of the final features; "
            "allow more, or give more calibration images"
        )
    return best[1], measured, measured[best[0]]
