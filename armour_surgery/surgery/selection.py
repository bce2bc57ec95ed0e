"""Which sites to convert, in which mode and with how many channels: the most rewarding first, within a budget of loss.

A model's *loss* is 1 - the mean cosine of its final features' tokens to the original's, on held-out images. What
converting a site costs is measured for each site alone; small errors add up nearly, so a choice of sites is predicted
to cost the sum. What the sum leaves out is measured by converting, and the prediction scaled by it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from armour_surgery.copies import copy_weights
from armour_surgery.errors import NothingToConvertError, UsageError
from armour_surgery.measure.cost import count_params
from armour_surgery.records import FrontierPoint, Progress, RefusedSite, Sensitivity
from armour_surgery.spelled import MLP
from armour_surgery.surgery.gauge import fixed_as, params_of_gauge
from armour_surgery.surgery.mlps import narrow_without_images
from armour_surgery.surgery.new_weights import to_read_again
from armour_surgery.surgery.operation import Prepared, operate, prepare
from armour_surgery.surgery.order import Order
from armour_surgery.surgery.perform import keep_plan, perform, surgery_of
from armour_surgery.surgery.sensitivity import measure_mlps, measure_sites
from armour_surgery.traced import FoundSite

__all__ = ["Choice", "convert_within", "frontier", "search"]

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


class _Attempts:
    """Conversions of a model that were tried, each on a copy; what was prepared for each of them is kept."""

    def __init__(self, model: nn.Module, everything: Prepared, order: Order) -> None:
        self.prepared: dict[Choice, Prepared] = {}
        self._model = model
        self._everything = everything
        self._order = order

    def more_to_give(self) -> str:
        """What else could let parameters go, as the end of a sentence."""
        order, more = self._order, []
        if not order.mlp:
            more.append("mlp=True (--mlp)")
        if order.rank is None:
            more.append("rank='auto' (--rank auto)")
        return f", or add {' or '.join(more)}, with which more can go" if more else ""

    def convert(self, choice: Choice, *, reason: str) -> tuple[nn.Module, float]:
        """The model with these sites converted, and its loss on held-out images; `reason` is why others are not."""
        modes: dict[str, str] = {}
        ranks: dict[str, int] = {}
        widths: dict[str, int] = {}
        for fqn, mode, rank in choice:
            if mode == MLP:
                widths[fqn] = rank or 0
                continue
            modes[fqn] = mode
            if rank is not None:
                ranks[fqn] = rank
        sites: list[FoundSite] = []
        left: list[RefusedSite] = []
        for operation in self._everything.operations:
            if operation.fqn in modes:
                sites.append(operation.found)
            else:
                left.append(RefusedSite(operation.fqn, reason))
        left.sort(key=lambda site: site.fqn)
        fixed = self._order.fixes_gauge
        operations = prepare(self._model, sites, modes, ranks, refit=True, gauge=fixed).operations
        mlps = [replace(one, kept=widths[one.found.fqn]) for one in self._everything.mlps if one.found.fqn in widths]
        prepared = Prepared(operations, [*self._everything.refused, *left], mlps, self._everything.units)
        self.prepared[choice] = prepared
        converted = perform(self._model, prepared, self._order, inplace=False)
        return converted, surgery_of(converted).loss


def convert_within(model: nn.Module, prepared: Prepared, order: Order, *, inplace: bool) -> nn.Module:
    """Convert what fits a budget of loss, or leads to a number of parameters, and say on the plan what was weighed.

    `prepared` is how everything would be converted. With rank "auto", ranks are free; without a budget it is then a
    tenth more than what full ranks cost, or 0.001.

    Raises:
        NothingToConvertError: the budget leaves nothing, or there is not so much to save.
    """
    order = replace(order, images=to_read_again(model, order.example, order.images))
    options = _measured(prepared, order) if order.measured is not None else _measure(model, prepared, order)
    if order.fixed_rank is not None:
        given = {operation.fqn: operation.rank for operation in prepared.operations}
        options = [option if option.mode == MLP else replace(option, rank=given[option.fqn]) for option in options]
    params = count_params(model)
    attempts = _Attempts(model, prepared, order)
    whole = _with_gauge(options, prepared)
    if order.params_goal is not None:
        points = frontier(whole, params)
        best, points, taken = _of_size(points, order.params_goal, attempts)
    else:
        best, points, taken, order = _within_loss(whole, params, prepared, order, attempts)
    plan = replace(
        surgery_of(best),
        sensitivities=tuple(options),
        frontier=tuple(points),
        max_loss=order.max_loss,
        params_goal=order.params_goal,
    )
    if not inplace:
        return keep_plan(best, plan)
    chosen = attempts.prepared[taken.sites]
    records = {site.fqn: site for site in plan.sites}
    for operation in chosen.operations:
        operate(model, fixed_as(operation, records[operation.fqn], model))
    narrow_without_images(model, chosen.mlps)
    copy_weights(best, model)
    return keep_plan(model, plan)


def _with_gauge(options: Sequence[Sensitivity], prepared: Prepared) -> list[Sensitivity]:
    """The options with what fixed gauges save too, which costs no loss."""
    sites = {operation.fqn: operation for operation in prepared.operations}
    whole = []
    for option in options:
        more = params_of_gauge(sites[option.fqn], option.rank) if option.fqn in sites else 0
        whole.append(replace(option, params_saved=option.params_saved + more))
    return whole


def _measure(model: nn.Module, prepared: Prepared, order: Order) -> list[Sensitivity]:
    """What every site and MLP costs alone, on images."""
    sites = [operation.found for operation in prepared.operations]
    with torch.inference_mode(False):
        options = measure_sites(model, sites, order, ranks=order.rank == "auto")
        return options + measure_mlps(model, [one.found for one in prepared.mlps], prepared.units, order)


def _measured(prepared: Prepared, order: Order) -> list[Sensitivity]:
    """What was measured before, of what is to be converted now.

    Raises:
        UsageError: something was not measured.
    """
    mlps = [one.found.fqn for one in prepared.mlps]
    ranks = {operation.fqn: operation.rank for operation in prepared.operations}
    given: list[Sensitivity] = []
    for one in order.measured or ():
        is_rank = order.rank == "auto" or one.rank in (None, ranks.get(one.fqn))
        if one.fqn in mlps or (one.fqn in ranks and is_rank):
            given.append(one)
    known = {one.fqn for one in given}
    missing = [fqn for fqn in ranks if fqn not in known]
    # Of single MLPs there may be nothing: the images had too few tokens for them.
    missing += mlps if known.isdisjoint(mlps) else []
    if missing:
        raise UsageError(
            f"measured has nothing of {missing[0]} and {len(missing) - 1} others; measure with the same mode, rank and "
            "mlp, or leave it out"
        )
    return given


def _within_loss(
    options: Sequence[Sensitivity], params: int, prepared: Prepared, order: Order, attempts: _Attempts
) -> tuple[nn.Module, list[FrontierPoint], FrontierPoint, Order]:
    """The smallest model within a budget of loss, and the order with that budget in it."""
    first: nn.Module | None = None
    if order.max_loss is not None:
        budget = order.max_loss
        points = frontier(options, params)
    else:
        full = tuple((operation.fqn, operation.mode, None) for operation in prepared.operations)
        first, loss = attempts.convert(full, reason="")
        budget = max(_SLACK * loss, _LITTLE)
        points = _beyond(options, full, params)
        points[0] = replace(points[0], measured=loss)
    reason = f"converting it costs more than a loss of {budget:.4g} allows"
    best, points, taken = search(points, budget, partial(attempts.convert, reason=reason), order.progress, first)
    return best, points, taken, replace(order, max_loss=budget)


def _of_size(
    points: list[FrontierPoint], goal: int, attempts: _Attempts
) -> tuple[nn.Module, list[FrontierPoint], FrontierPoint]:
    """The model with so many parameters at most that should lose the least.

    Raises:
        NothingToConvertError: all of it together does not save so much.
    """
    place = next((place for place, point in enumerate(points) if point.params <= goal), None)
    if not place:
        smallest = points[-1].params
        raise NothingToConvertError(
            f"params asks for {goal:,} parameters, and this model has {points[0].params:,}; it could have "
            f"{smallest:,}. Ask for a number between these{attempts.more_to_give()}"
        )
    model, loss = attempts.convert(points[place].sites, reason=f"{goal:,} parameters are reached without it")
    points[place] = replace(points[place], measured=loss)
    return model, points, points[place]


def _beyond(options: Sequence[Sensitivity], full: Choice, params: int) -> list[FrontierPoint]:
    """The frontier from where every site has its full rank."""
    base: dict[str, Sensitivity] = {}
    for option in options:
        if option.rank is None and (option.fqn, option.mode, None) in full:
            base[option.fqn] = option
    further = []
    for option in options:
        start = base[option.fqn]
        if option.rank is not None and option.mode == start.mode:
            saved = option.params_saved - start.params_saved
            further.append(replace(option, params_saved=saved, loss=option.loss - start.loss))
    saved, loss = 0, 0.0
    for start in base.values():
        saved += start.params_saved
        loss += start.loss
    points = []
    for point in frontier(further, params - saved):
        ranks = {fqn: rank for fqn, _, rank in point.sites}
        sites = tuple((fqn, mode, ranks.get(fqn)) for fqn, mode, _ in full)
        points.append(FrontierPoint(point.params, point.predicted + loss, None, sites))
    return points


def frontier(options: Sequence[Sensitivity], params: int) -> list[FrontierPoint]:
    """Choices of sites from none to all, each a site's next step further, the most parameters for the loss first.

    Of a site's options only those count that no mixture of others beats (the lower convex hull). `params` are those of
    the model as it was.
    """
    by_site: dict[str, list[Sensitivity]] = {}
    for option in options:
        by_site.setdefault(option.fqn, []).append(option)
    steps: list[_Step] = []
    for alternatives in by_site.values():
        steps += _hull(alternatives)
    chosen: dict[str, Sensitivity] = {}
    left, loss = params, 0.0
    points = [FrontierPoint(params, 0.0, None, ())]
    for step in sorted(steps, key=lambda step: step.price):
        chosen[step.to.fqn] = step.to
        left, loss = left - step.saved, loss + step.loss
        sites = tuple((option.fqn, option.mode, option.rank) for option in chosen.values())
        points.append(FrontierPoint(left, loss, None, sites))
    return points


def _hull(options: list[Sensitivity]) -> list[_Step]:
    """A site's steps, each dearer per parameter than the one before."""
    steps: list[_Step] = []
    rest = sorted(options, key=lambda option: option.params_saved)
    saved, loss = 0, 0.0
    while rest:
        further = [_Step(option, option.params_saved - saved, max(option.loss - loss, 0.0)) for option in rest]
        # Of steps at one price the longest: those between would be taken right after each other.
        best = min(further, key=lambda step: (step.price, -step.saved))
        steps.append(best)
        saved, loss = best.to.params_saved, best.to.loss
        rest = [option for option in rest if option.params_saved > saved]
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
        # The furthest that should fit, or else the next one after what is known to.
        place = low + 1
        for further in range(low + 1, high):
            if points[further].predicted * scale <= budget:
                place = further
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
    measured = [replace(point, measured=tried.get(place, point.measured)) for place, point in enumerate(points)]
    if best is None:
        place, loss = min(tried.items(), key=lambda item: item[1])
        raise NothingToConvertError(
            f"max_loss {budget:g} leaves nothing to convert: {points[place].sites[0][0]} and "
            f"{len(points[place].sites) - 1} others cost {loss:.4f}, measured as 1 - cosine of the final features; "
            "allow more, or give more calibration images"
        )
    return best[1], measured, measured[best[0]]
