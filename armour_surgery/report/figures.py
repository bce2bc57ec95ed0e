"""Figures of what conversion costs: site by site, and choice by choice.

They are drawn with matplotlib's objects, without pyplot, so no window system and no state of the caller's is touched.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from armour_surgery.errors import UsageError
from armour_surgery.records import FrontierPoint, Sensitivity
from armour_surgery.report.whole_file import check_target, write_whole

__all__ = [
    "INK",
    "LEGEND",
    "MUTED",
    "PAPER",
    "RULE",
    "SERIES",
    "blank_figure",
    "check_figure",
    "frontier_figure",
    "inline_svg",
    "plain",
    "save_figure",
    "sensitivity_figure",
    "short_names",
    "tidy",
]

# Each color has a name that a page may give another value to, for dark backgrounds; see `inline_svg`.
INK, MUTED, RULE, PAPER = "#1d2733", "#66727f", "#d8dee4", "#ffffff"
_VARIABLES = {
    PAPER: "paper",
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    "#2b6c8f": "series-1",
    "#c76f2a": "series-2",
    "#5b8c4a": "series-3",
    "#8a5a9e": "series-4",
    "#b0464f": "series-5",
}
SERIES = tuple(color for color, name in _VARIABLES.items() if name.startswith("series"))
LEGEND = {"frameon": False, "fontsize": 8.5, "labelcolor": INK, "handlelength": 1.6}
# A logarithmic axis is worth its trouble from this ratio of the largest to the smallest value on.
_LOG_FROM = 30.0
_FORMATS = (".png", ".svg", ".pdf")
_UNSIGNED = dict.fromkeys(("Creator", "Date", "Format", "Type"))
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


def check_figure(path: str | Path) -> None:
    """Make sure that a figure may be written at `path`, before the work that it is about begins.

    Raises:
        UsageError: its name does not end in a format that figures have.
        FolderError: it is a folder or a device, or its folder is missing or cannot be written to.
    """
    if Path(path).suffix.lower() not in _FORMATS:
        raise UsageError(f"a figure cannot be written to {str(path)!r}; name a file that ends in {', '.join(_FORMATS)}")
    check_target(path, "figure")


def save_figure(path: str | Path, figure: Figure) -> Path:
    """Write a figure in the format that its name ends in (.png, .svg, .pdf), whole or not at all.

    Raises:
        UsageError, FolderError: see `check_figure`.
    """
    check_figure(path)
    kind = Path(path).suffix.lower()
    stream = io.BytesIO()
    # What matplotlib would write of itself and of the time differs between equal figures.
    nothing = {".png": {}, ".svg": _UNSIGNED, ".pdf": {"CreationDate": None}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "armour-surgery"}):
        figure.savefig(stream, format=kind[1:], dpi=160, facecolor=PAPER, metadata=nothing)
    return write_whole(path, stream.getvalue(), "figure")


def inline_svg(figure: Figure, label: str) -> str:
    """A figure as an `<svg>` element for a page: no identifiers that could clash, nothing loaded from elsewhere.

    Equal figures give equal text. Colors follow the page's `--paper`, `--ink`, `--muted`, `--rule` and `--series-1` to
    `-5` where it sets them. `label` is what a screen reader says; it must be escaped.
    """
    stream = io.StringIO()
    # The salt and the kind of text are read from matplotlib's settings only; they are put back at once.
    with matplotlib.rc_context({"svg.hashsalt": label, "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata=_UNSIGNED)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name}, {color})")
    # As wide as its place, within reason: letters should not outgrow the page's own.
    size = f'style="max-width: {76 * figure.get_figwidth():.0f}pt"'
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{label}" {size}', text, count=1)


def short_names(fqns: Sequence[str]) -> tuple[list[str], str]:
    """What tells names apart, and the pattern of the rest: `blocks.0.attn`, ... are `0`, ... of `blocks.*.attn`."""
    splits = [re.split(r"(\d+)", name) for name in fqns]
    if len(fqns) > 1 and len({(len(parts), *parts[::2]) for parts in splits}) == 1:
        varying = [place for place in range(1, len(splits[0]), 2) if len({parts[place] for parts in splits}) > 1]
        pattern = "".join("*" if place in varying else text for place, text in enumerate(splits[0]))
        return [".".join(parts[place] for place in varying) for parts in splits], pattern
    paths = [name.split(".") for name in fqns]
    shortest = min(map(len, paths), default=1) - 1
    same = [all(path[place] == paths[0][place] for path in paths) for place in range(shortest)]
    start = same.index(False) if False in same else shortest
    tail = [all(path[-1 - place] == paths[0][-1 - place] for path in paths) for place in range(shortest - start)]
    end = tail.index(False) if False in tail else len(tail)
    if len(fqns) < 2 or not start + end:
        return list(fqns), "attention"
    labels = [".".join(path[start : len(path) - end]) for path in paths]
    return labels, ".".join([*paths[0][:start], "*", *paths[0][len(paths[0]) - end :]])


def blank_figure(width: float, height: float) -> Figure:
    """A figure of so many inches without a background, whose parts find their own room."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


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


def tidy(axes: Axes) -> None:
    """The look of all axes with lines or bars."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axes.tick_params(axis="y", which="minor", length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9.5)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _head(figure: Figure, axes: Axes, title: str, legend: bool) -> None:
    if title:
        figure.suptitle(plain(title), x=0.01, horizontalalignment="left", fontsize=11, fontweight="bold", color=INK)
    if legend:
        lines, bars = axes.get_lines(), axes.containers
        figure.legend(handles=[*bars, *lines], **LEGEND, loc="outside lower left", ncols=5)


def plain(text: str) -> str:
    """Text in which a dollar sign is a dollar sign and not the start of a formula."""
    return text.replace("$", r"\$")
