"""The figure of a training run: its loss, and what held-out images say, each kind of number on axes of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from armour_surgery.report.style import INK, LEGEND, MUTED, PAPER, SERIES, blank_figure, tidy

__all__ = ["curves_figure"]

# A legend inside the axes, which lines may cross behind it.
_ON_TOP = {**LEGEND, "frameon": True, "framealpha": 0.85, "facecolor": PAPER, "edgecolor": "none"}
# What is drawn together has one unit: percent of the images, or a cosine.
_KINDS = {
    "held-out images, %": {"top1": "top-1", "agreement": "same first choice as the teacher"},
    "cosine to the teacher": {"cosine": "cosine"},
}


def curves_figure(
    lines: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]], start: Mapping[str, float]
) -> Figure:
    """The loss of every logged step and of each epoch; below it accuracy and likeness, with what they began with.

    `lines` are those of `log.jsonl` that have a loss, `epochs` the rows of `summary.csv`; `start` is what held-out
    images said before the first step, empty where nobody asked.
    """
    shown = []
    for title, scores in _KINDS.items():
        known = [name for name in scores if name in start or any(name in row for row in epochs)]
        if known:
            shown.append((title, {name: scores[name] for name in known}))
    figure = blank_figure(7.6, 2.6 + 2.2 * len(shown))
    panels = figure.subplots(1 + len(shown), 1, sharex=True, squeeze=False)[:, 0]
    _draw_loss(panels[0], lines, epochs)
    for axes, (title, scores) in zip(panels[1:], shown, strict=True):
        _draw_scores(axes, epochs, start, scores)
        axes.set_ylabel(title)
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.margins(x=0.02, y=0.12)
        tidy(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(**_ON_TOP, loc="best")
    panels[-1].set_xlabel("step")
    figure.align_ylabels(panels)
    return figure


def _draw_loss(axes: Axes, lines: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]) -> None:
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    axes.plot(steps, losses, color=MUTED, linewidth=0.9, alpha=0.7, label="of a step")
    means = [row for row in epochs if "loss" in row]
    axes.plot(
        [row["step"] for row in means], [row["loss"] for row in means],
        color=SERIES[1], linewidth=1.4, marker="o", markersize=4, label="mean of an epoch",
    )  # fmt: skip
    axes.set_ylabel("training loss")


def _draw_scores(
    axes: Axes, epochs: Sequence[Mapping[str, Any]], start: Mapping[str, float], scores: Mapping[str, str]
) -> None:
    """A line for each score, from its start on; that of the moving average is dashed, in the same color."""
    for place, (name, label) in enumerate(scores.items()):
        color = SERIES[2 * place]
        for key, line, title in ((name, "-", label), (f"ema_{name}", "--", f"{label}, moving average")):
            points = [(row["step"], row[key]) for row in epochs if key in row]
            if not points:
                continue
            # The average begins with the weights that training begins with.
            if name in start and points[0][0] > 0:
                points.insert(0, (0, start[name]))
            axes.plot(*zip(*points, strict=True), color=color, linestyle=line, linewidth=1.4, marker="o", markersize=4,
                      label=title)  # fmt: skip
        if name in start:
            axes.axhline(start[name], color=color, linewidth=0.9, linestyle=":")
            axes.plot([0], [start[name]], marker="o", markersize=7, markerfacecolor="none", markeredgecolor=INK)
            axes.annotate(f"start {start[name]:.4g}", (0, start[name]), xytext=(9, -11), textcoords="offset points",
                          fontsize=8.5, color=MUTED)  # fmt: skip
