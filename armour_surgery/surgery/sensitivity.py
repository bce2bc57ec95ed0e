"""What every site, and every MLP, costs when it alone is converted: measured on images, one by one.

A model's *loss* is 1 - the mean cosine of its final features' tokens to the original's, on held-out images.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from armour_surgery.copies import sharing_copy
from armour_surgery.initialize import STEP
from armour_surgery.modes import AUTO, MODES, choose
from armour_surgery.notes import ArmourWarning
from armour_surgery.records import Sensitivity
from armour_surgery.spelled import MLP, grouped_names
from armour_surgery.surgery.mlps import Narrowing
from armour_surgery.surgery.new_weights import Effect, measure_alone
from armour_surgery.surgery.operation import Prepared, operate, prepare
from armour_surgery.surgery.order import Images, Order
from armour_surgery.traced import FoundMlp, FoundSite, SeenSite

__all__ = ["RANK_STEP", "measure_mlps", "measure_sites"]

# Images that sites are measured on one by one: enough to rank them.
SENSITIVITY_IMAGES = 64
# Ranks are multiples of this: what hardware likes.
RANK_STEP = 8
# Hidden channels that an MLP is measured with, of all that it has; in between, what its closed form loses tells.
_PROBED = (0.75, 0.4)
# Numbers of hidden channels that are weighed: so many, from few to all.
_WIDTHS = 32


def measure_sites(model: nn.Module, sites: Sequence[SeenSite], order: Order, *, ranks: bool) -> list[Sensitivity]:
    """What every site costs when it alone is converted, in each mode that may be the best for it.

    Under `auto` these are `qv` and `kv` where both fit, and for wide V `concat-half` and `concat-full`. With `ranks`,
    also with fewer channels a head, in steps of 8: then what the closed form leaves out, relative to all channels,
    scales what was measured.
    """
    followed = [site for site in sites if isinstance(site, FoundSite)]
    options: list[Sensitivity] = []
    for mode in _modes(followed, order.mode):
        fitting = [site for site in followed if mode in _modes_of(site, order.mode)]
        operations = prepare(model, fitting, mode, refit=True).operations
        converted = sharing_copy(model)
        changes = [operate(converted, operation, views=True) for operation in operations]
        effects = measure_alone(model, converted, Prepared(operations, []), order, _fewer(order.images))
        for operation, change, effect in zip(operations, changes, effects, strict=True):
            saved = change.params_before - change.params_after
            full = Sensitivity(operation.fqn, mode, None, saved, effect.result.residual, max(effect.loss, 0.0))
            options.append(full)
            if ranks:
                options += _with_ranks(full, effect, operation.found.site.key_dim)
    # Site by site, as they are shown.
    order_of = {site.fqn: place for place, site in enumerate(followed)}
    return sorted(options, key=lambda option: order_of[option.fqn])


def _fewer(images: Images) -> Images:
    return replace(images, count=min(images.count, SENSITIVITY_IMAGES))


def _modes(sites: list[FoundSite], requested: str) -> list[str]:
    """The modes that some site is tried in."""
    modes: set[str] = set()
    for site in sites:
        modes.update(_modes_of(site, requested))
    return [name for name in MODES if name in modes]


def _modes_of(found: FoundSite, requested: str) -> list[str]:
    """The modes that a site is tried in."""
    mode, _ = choose(found.site, requested)
    if mode is None:
        return []
    # Which of them saves the most at the least loss differs from site to site (docs/decisions.md).
    others = {"concat-half": "concat-full", "qv": "kv"} if requested == AUTO else {}
    other = others.get(mode)
    return [mode, other] if other is not None and other in found.site.modes else [mode]


def _with_ranks(full: Sensitivity, effect: Effect, size: int) -> list[Sensitivity]:
    """The same site with fewer channels a head, where their number is free."""
    if not effect.per_channel:
        return []
    options = []
    for rank in range((size - 1) // RANK_STEP * RANK_STEP, 0, -RANK_STEP):
        lost = effect.result.ranks[rank - 1]
        saved = full.params_saved + (size - rank) * effect.per_channel
        # `lost` is of squared errors, as a loss is; a residual is the root of one.
        residual = full.residual * lost**0.5
        options.append(replace(full, rank=rank, params_saved=saved, loss=full.loss * lost, residual=residual))
    return options


def measure_mlps(model: nn.Module, mlps: Sequence[FoundMlp], units: dict[str, str], order: Order) -> list[Sensitivity]:
    """What every MLP costs with fewer hidden channels when nothing else is converted.

    Two numbers of them are measured. For others, what the closed form loses scales the nearer measurement.
    """
    measured: dict[str, dict[int, Effect]] = {}
    for share in _PROBED:
        narrowings = [Narrowing(mlp, _rounded(share * mlp.hidden)) for mlp in mlps]
        # One that is too narrow for a step fewer has nothing to give.
        narrowings = [one for one in narrowings if 0 < one.kept < one.found.hidden]
        if not narrowings:
            continue
        prepared = Prepared([], [], narrowings, units)
        kept = {one.found.fqn: one.kept for one in narrowings}
        for effect in measure_alone(model, sharing_copy(model), prepared, order, _fewer(order.images)):
            fqn = effect.result.fqn
            if effect.result.ranks:  # none where the images have too few tokens for its channels
                measured.setdefault(fqn, {})[kept[fqn]] = effect
    options: list[Sensitivity] = []
    left: list[str] = []
    for mlp in mlps:
        if mlp.fqn in measured:
            options += _widths(mlp, measured[mlp.fqn])
        else:
            left.append(mlp.fqn)
    if left:
        warnings.warn(
            f"{grouped_names(left)} keep all hidden channels: the images have fewer tokens than these; give more",
            ArmourWarning,
            stacklevel=5,
        )
    return options


def _rounded(channels: float) -> int:
    return max(STEP, round(channels / STEP) * STEP)


def _widths(mlp: FoundMlp, measured: dict[int, Effect]) -> list[Sensitivity]:
    """The numbers of hidden channels that are weighed, and what each would cost."""
    options = []
    for kept in sorted(_candidates(mlp.hidden), reverse=True):
        near = min(measured, key=lambda probed: abs(probed - kept))
        effect = measured[near]
        lost, of_near = effect.result.ranks[kept - 1], max(effect.result.ranks[near - 1], 1e-12)
        options.append(
            Sensitivity(
                fqn=mlp.fqn,
                mode=MLP,
                rank=kept,
                params_saved=(mlp.hidden - kept) * effect.per_channel,
                residual=effect.result.residual * (lost / of_near) ** 0.5,
                loss=effect.loss * lost / of_near,
            )
        )
    return options


def _candidates(hidden: int) -> Iterable[int]:
    numbers = {_rounded(hidden * place / _WIDTHS) for place in range(2, _WIDTHS)}
    return (number for number in numbers if number < hidden)
