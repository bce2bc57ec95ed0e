"""Figures of a conversion, site by site and choice by choice, and of which class a model takes for which.

They are drawn with matplotlib's objects, without pyplot, so no window system and no state of the caller's is touched.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from armour_surgery.records import FrontierPoint, Sensitivity
from armour_surgery.report.style import INK, LEGEND, MUTED, PAPER, RULE, SERIES, blank_figure, plain, tidy
from armour_surgery.report.whole_file import write_whole
from armour_surgery.spelled import short_names, way

__all__ = ["draw_confusion", "frontier_figure", "sensitivity_figure"]

# Features are float32, in which 1 - cosine and relative errors are known no better: less than this is nothing.
_NOTHING = 1e-7
# A logarithmic axis is worth its trouble from this ratio of the largest to the smallest value on.
_LOG_FROM = 30.0
_MARKERS = "osD^vPX*"
# Labels of more letters than this are written upright, or neighbors would run into each other.
_LONGEST = 4
# Of how many classes a confusion matrix names each, and of how many it prints the number in each cell.
_NAMED_CLASSES, _NUMBERED_CLASSES = 30, 12


def sensitivity_figure(sensitivities: Sequence[Sensitivity], title: str) -> Figure:
    """What each site costs alone: the model's loss above, the relative error of the site's own output below.

    Conversions of full rank are bars, one color for each mode; fewer shared channels are thin lines of that color.
    """
    # Dictionaries keep the order in which the names come, each once.
    fqns = list(dict.fromkeys(trial.fqn for trial in sensitivities))
    ways = list(dict.fromkeys((trial.mode, trial.rank) for trial in sensitivities))
    looks = _looks(ways)
    labels, pattern = short_names(fqns)
    longest = max(map(len, labels), default=0)
    upright = longest > _LONGEST
    # Inches: a quarter for each site, and what the letters of upright labels need below.
    width = min(14.0, max(8.0, 0.26 * len(fqns) + 2.0))
    figure = blank_figure(width, 5.0 + 0.055 * longest * upright)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, name, nothing in ((upper, "loss", "no loss"), (lower, "residual", "no error")):
        values = {(trial.fqn, trial.mode, trial.rank): float(getattr(trial, name)) for trial in sensitivities}
        logarithmic = _scale(axes, list(values.values()))
        # Bars first, so that the lines are drawn over them.
        for mode, rank in sorted(ways, key=lambda pair: pair[1] is not None):
            known = [values.get((fqn, mode, rank)) for fqn in fqns]
            _draw_way(axes, _heights(known, logarithmic), looks[mode, rank])
            if rank is None:
                _write_nothing(axes, known, looks[mode, rank], nothing)
        tidy(axes)
    upper.set_ylabel("loss of the model")
    lower.set_ylabel("error of the site's output")
    lower.set_xticks(range(len(fqns)), list(map(plain, labels)), rotation=90 if upright else 0)
    lower.set_xlim(-0.6, max(len(fqns), 1) - 0.4)
    lower.set_xlabel(plain(pattern))
    _head(figure, upper, title, legend=len(ways) > 1)
    return figure


@dataclass(frozen=True)
class _Look:
    """How one way of converting is drawn. With a marker it is a line; else bars, `left` of the middle of each site."""

    label: str
    color: str
    marker: str | None
    left: float = 0.0
    width: float = 0.0


def _looks(ways: Sequence[tuple[str, int | None]]) -> dict[tuple[str, int | None], _Look]:
    modes = list(dict.fromkeys(mode for mode, _ in ways))
    bars = [mode for mode, rank in ways if rank is None]
    ranks = sorted({rank for _, rank in ways if rank is not None}, reverse=True)
    looks: dict[tuple[str, int | None], _Look] = {}
    for mode, rank in ways:
        label, color = way(mode, rank), SERIES[modes.index(mode) % len(SERIES)]
        if rank is None:
            # The bars of a site stand beside each other, and all of them take about three quarters of its room.
            width = 0.76 / len(bars)
            left = (bars.index(mode) - (len(bars) - 1) / 2) * width
            looks[mode, rank] = _Look(label, color, None, left, 0.92 * width)
        else:
            looks[mode, rank] = _Look(label, color, _MARKERS[ranks.index(rank) % len(_MARKERS)])
    return looks


def _draw_way(axes: Axes, heights: list[float], look: _Look) -> None:
    if look.marker is None:
        places = [place + look.left for place in range(len(heights))]
        axes.bar(places, heights, look.width, color=look.color, label=look.label)
        return
    axes.plot(
        range(len(heights)), heights, color=look.color, linewidth=0.8, marker=look.marker, markersize=3.2,
        markerfacecolor=PAPER, markeredgewidth=0.8, label=look.label,
    )  # fmt: skip


def _write_nothing(axes: Axes, values: Sequence[float | None], look: "_Look", words: str) -> None:
    """Say it where a bar would have no height that means anything."""
    for place, value in enumerate(values):
        if value is not None and value < _NOTHING:
            foot = (place + look.left, 0.02)
            axes.annotate(
                words, foot, xycoords=("data", "axes fraction"), rotation=90, ha="center", va="bottom",
                fontsize=7.5, color=MUTED,
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
    figure = blank_figure(7.6, 4.4)
    axes = figure.subplots()
    ordered = sorted(points, key=lambda point: -point.params)
    params = [point.params / 1e6 for point in ordered]
    predicted = [point.predicted for point in ordered]
    tried_params, measured = [], []
    for point in ordered:
        if point.measured is not None:
            tried_params.append(point.params / 1e6)
            measured.append(point.measured)
    budgets = [] if budget is None else [budget]
    logarithmic = _scale(axes, predicted + measured + budgets)
    axes.plot(
        params, _heights(predicted, logarithmic),
        color=SERIES[0], linewidth=1.6, label="predicted: sum of the sites alone",
    )  # fmt: skip
    if measured:
        axes.plot(
            tried_params, _heights(measured, logarithmic),
            color=SERIES[1], linestyle="none", marker="o", markersize=5, label="measured on held-out images",
        )  # fmt: skip
    if budget is not None:
        axes.axhline(budget, color=MUTED, linewidth=1, linestyle=(0, (5, 3)), label=f"budget {budget:g}")
    if chosen is not None:
        loss = chosen.predicted if chosen.measured is None else chosen.measured
        axes.plot(
            [chosen.params / 1e6], _heights([loss], logarithmic), linestyle="none", marker="o", markersize=12,
            markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6,
            label=f"chosen: {chosen.params / 1e6:,.3f} M",
        )  # fmt: skip
    axes.axvline(params_before / 1e6, color=MUTED, linewidth=1, linestyle=":", label="the original")
    axes.set_xlabel("parameters, M")
    axes.set_ylabel("loss of the model")
    tidy(axes)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    # The same axis again above, in the unit that most readers think in.
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
    # The axes would hide the page's background, which may be dark.
    axes.patch.set_alpha(0)
    positive = [value for value in values if value >= _NOTHING and math.isfinite(value)]
    if not positive or max(positive) / min(positive) < _LOG_FROM:
        axes.set_ylim(0, 1.08 * max(positive, default=1.0))
        return False
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    # The smallest value gets a bar that can be seen.
    axes.set_ylim(10.0 ** math.floor(math.log10(0.8 * min(positive))), 1.6 * max(positive))
    return True


def _heights(values: Sequence[float | None], logarithmic: bool) -> list[float]:
    """The heights to draw at: none where there is no value, or no place for it on the axis."""
    heights = []
    for value in values:
        if value is None or not math.isfinite(value) or (logarithmic and value < _NOTHING):
            value = math.nan  # matplotlib leaves a gap
        heights.append(value)
    return heights


def _head(figure: Figure, axes: Axes, title: str, legend: bool) -> None:
    if title:
        # At the left, as the axes' own text; a centered title of a long model name would be cut on both sides.
        figure.suptitle(plain(title), x=0.01, horizontalalignment="left", fontsize=11, fontweight="bold", color=INK)
    if legend:
        lines, bars = axes.get_lines(), axes.containers
        figure.legend(handles=[*bars, *lines], **LEGEND, loc="outside lower left", ncols=5)


def draw_confusion(counts: Tensor, names: Sequence[str], path: Path) -> None:
    """A picture of a confusion matrix, each row in percent of its class."""
    # A class without images has a row of zeros, and 0 / 1 is what to show for it.
    share = 100 * counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    classes = len(counts)
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="percent of the class")
    axes.set_xlabel("first choice")
    axes.set_ylabel("label")
    if classes <= _NAMED_CLASSES:
        axes.set_xticks(range(classes), names, rotation=90)
        axes.set_yticks(range(classes), names)
    if classes <= _NUMBERED_CLASSES:
        for row in range(classes):
            for column in range(classes):
                value = float(share[row, column])
                # Large shares are dark blue.
                color = "white" if value > 50 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue(), "confusion plot")
