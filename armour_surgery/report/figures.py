"""Figures of what conversion costs: site by site, and choice by choice.

They are drawn with matplotlib's objects, without pyplot, so no window system and no state of the caller's is touched.
"""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from armour_surgery.records import FrontierPoint, Sensitivity
from armour_surgery.report.style import INK, LEGEND, MUTED, PAPER, RULE, SERIES, blank_figure, plain, short_names, tidy
from armour_surgery.report.whole_file import write_whole

__all__ = ["draw_confusion", "frontier_figure", "sensitivity_figure"]

# A logarithmic axis is worth its trouble from this ratio of the largest to the smallest value on.
_LOG_FROM = 30.0
_MARKERS = "osD^vPX*"


def sensitivity_figure(sensitivities: Sequence[Sensitivity], title: str) -> Figure:
    """What each site costs alone: the model's loss above, the relative error of the site's own output below.

    Conversions of full rank are bars, one color for each mode; fewer shared channels are thin lines of that color.
    """
    fqns = list(dict.fromkeys(one.fqn for one in sensitivities))
    labels, pattern = short_names(fqns)
    ways = list(dict.fromkeys((one.mode, one.rank) for one in sensitivities))
    modes = list(dict.fromkeys(mode for mode, _ in ways))
    long = max((len(label) for label in labels), default=1) > 4
    figure = blank_figure(
        min(14.0, max(8.0, 0.26 * len(fqns) + 2.0)), 5.0 + 0.055 * max(map(len, labels), default=0) * long
    )
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, name in ((upper, "loss"), (lower, "residual")):
        found = {(one.fqn, one.mode, one.rank): float(getattr(one, name)) for one in sensitivities}
        logarithmic = _scale(axes, list(found.values()))
        for way in sorted(ways, key=lambda way: way[1] is not None):
            heights = [_shown(found.get((fqn, *way)), logarithmic) for fqn in fqns]
            _draw_way(axes, way, heights, modes, ways)
        tidy(axes)
    upper.set_ylabel("loss of the model")
    lower.set_ylabel("error of the site's output")
    lower.set_xticks(range(len(fqns)), [plain(label) for label in labels], rotation=90 if long else 0)
    lower.set_xlim(-0.6, max(len(fqns), 1) - 0.4)
    lower.set_xlabel(plain(pattern))
    _head(figure, upper, title, legend=len(ways) > 1)
    return figure


def _draw_way(
    axes: Axes,
    way: tuple[str, int | None],
    heights: list[float],
    modes: list[str],
    ways: list[tuple[str, int | None]],
) -> None:
    mode, rank = way
    color = SERIES[modes.index(mode) % len(SERIES)]
    if rank is None:
        full = [one for one, other in ways if other is None]
        width = 0.76 / len(full)
        left = (full.index(mode) - (len(full) - 1) / 2) * width
        axes.bar([place + left for place in range(len(heights))], heights, 0.92 * width, color=color, label=mode)
        return
    ranks = sorted((one for _, one in ways if one is not None), reverse=True)
    marker = _MARKERS[sorted(set(ranks), reverse=True).index(rank) % len(_MARKERS)]
    axes.plot(
        range(len(heights)), heights, color=color, linewidth=0.8, marker=marker, markersize=3.2,
        markerfacecolor=PAPER, markeredgewidth=0.8, label=f"{mode}, rank {rank}",
    )  # fmt: skip


def frontier_figure(
    points: Sequence[FrontierPoint],
    params_before: int,
    budget: float | None,
    chosen: FrontierPoint | None = None,
) -> Figure:
    """Parameters against loss: what was predicted as a line, what was measured as dots, the budget as a level.

    The point that was `chosen` is highlighted.
    """
    ordered = sorted(points, key=lambda point: -point.params)
    figure = blank_figure(7.6, 4.4)
    axes = figure.subplots()
    losses = [loss for point in ordered for loss in (point.predicted, point.measured) if loss is not None]
    logarithmic = _scale(axes, [*losses, *([] if budget is None else [budget])])
    axes.plot(
        [point.params / 1e6 for point in ordered], [_shown(point.predicted, logarithmic) for point in ordered],
        color=SERIES[0], linewidth=1.6, label="predicted: sum of the sites alone",
    )  # fmt: skip
    tried = [point for point in ordered if point.measured is not None]
    if tried:
        axes.plot(
            [point.params / 1e6 for point in tried], [_shown(point.measured, logarithmic) for point in tried],
            color=SERIES[1], linestyle="none", marker="o", markersize=5, label="measured on held-out images",
        )  # fmt: skip
    if budget is not None:
        axes.axhline(budget, color=MUTED, linewidth=1, linestyle=(0, (5, 3)), label=f"budget {budget:g}")
    if chosen is not None:
        loss = chosen.predicted if chosen.measured is None else chosen.measured
        axes.plot(
            [chosen.params / 1e6], [_shown(loss, logarithmic)], linestyle="none", marker="o", markersize=12,
            markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6,
            label=f"chosen: {chosen.params / 1e6:,.3f} M",
        )  # fmt: skip
    axes.axvline(params_before / 1e6, color=MUTED, linewidth=1, linestyle=":", label="the original")
    axes.set_xlabel("parameters, M")
    axes.set_ylabel("loss of the model")
    tidy(axes)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    saved = axes.secondary_xaxis("top", functions=_percent_axis(params_before))
    saved.set_xlabel("change, %", color=MUTED, fontsize=9)
    saved.tick_params(colors=MUTED, labelsize=8, length=0)
    saved.spines["top"].set_visible(False)
    figure.legend(**LEGEND, loc="outside lower left", ncols=3)
    return figure


def _percent_axis(params_before: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """From millions of parameters to the change in percent, and back; for numbers and arrays."""

    def to_percent(millions: Any) -> Any:
        return 100 * (1e6 * millions / params_before - 1)

    def to_millions(percent: Any) -> Any:
        return params_before * (1 + percent / 100) / 1e6

    return to_percent, to_millions


def _scale(axes: Axes, values: Sequence[float]) -> bool:
    """Make the axis logarithmic where the values need it; whether it is."""
    axes.patch.set_alpha(0)
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if not positive or max(positive) / min(positive) < _LOG_FROM:
        axes.set_ylim(0, 1.08 * max(positive, default=1.0))
        return False
    axes.set_yscale("log")
    axes.set_ylim(10.0 ** math.floor(math.log10(min(positive))), 1.6 * max(positive))
    return True


def _shown(value: float | None, logarithmic: bool) -> float:
    """The height to draw at: none where there is no value, or no place for it on the axis."""
    if value is None or not math.isfinite(value) or (logarithmic and value <= 0):
        return math.nan
    return value


def _head(figure: Figure, axes: Axes, title: str, legend: bool) -> None:
    if title:
        figure.suptitle(plain(title), x=0.01, horizontalalignment="left", fontsize=11, fontweight="bold", color=INK)
    if legend:
        lines, bars = axes.get_lines(), axes.containers
        figure.legend(handles=[*bars, *lines], **LEGEND, loc="outside lower left", ncols=5)


def draw_confusion(counts: Tensor, names: Sequence[str], path: Path) -> None:
    """A picture of a confusion matrix, each row in percent of its class."""
    share = 100 * counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    classes = len(counts)
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="percent of the class")
    axes.set_xlabel("first choice")
    axes.set_ylabel("label")
    if classes <= 30:
        axes.set_xticks(range(classes), names, rotation=90)
        axes.set_yticks(range(classes), names)
    if classes <= 12:
        for row in range(classes):
            for column in range(classes):
                value = float(share[row, column])
                color = "white" if value > 50 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue(), "confusion plot")
