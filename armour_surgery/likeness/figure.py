"""Figure 1 of the Armour paper for any model: one layer in detail, and all layers beside each other."""

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from torch import Tensor

from armour_surgery.likeness.pairs import PAIRS, SiteRedundancy, differences
from armour_surgery.report.style import INK, LEGEND, MUTED, RULE, SERIES, blank_figure, plain, tidy
from armour_surgery.spelled import short_names

__all__ = ["redundancy_figure"]

_COLORS = dict(zip(PAIRS, SERIES[: len(PAIRS)], strict=True))
_MARKERS = dict(zip(PAIRS, "osD", strict=True))
_POINTS = 400  # of a curve
_LABELS = 14  # names that an axis has room for
_LONGEST = 4  # letters of such a name; longer ones would run into each other
_TICKS = 8  # heads that an axis of channels marks
_SEEN = 0.995  # share of the entries that the axes and colors are made for


def redundancy_figure(
    sites: Sequence[SiteRedundancy], fqn: str, weights: Mapping[str, Tensor], threshold: float, title: str
) -> Figure:
    """One layer, `fqn`, in detail, and all of them beside each other.

    Above, `| |A| - |B| |` of every entry for Q and K, K and V, Q and V. Below, which share of them is under any
    threshold, the share under the given one in every layer, and what the best shared weight costs there. Dotted is what
    chance alone gives. `weights` maps q, k and v to `[H, D, d]` of the layer.
    """
    figure = blank_figure(11.6, 8.4)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.18, 1])[:, 0]
    layer = next(site for site in sites if site.fqn == fqn)
    apart = {pair: differences(weights, pair) for pair in layer.pairs}
    limit = max((_quantile(values, _SEEN) for values in apart.values()), default=threshold)
    _draw_layer(upper, layer, apart, limit, threshold)
    shares, every, costs = lower.subplots(1, 3)
    _draw_shares(shares, apart, limit, threshold)
    # Each layer has a place on the axes, and a short name there.
    fqns = [site.fqn for site in sites]
    labels, pattern = short_names(fqns)
    for axes in (every, costs):
        _draw_layers(axes, labels, pattern, fqns.index(fqn))
    for pair in PAIRS:
        _draw_pair(every, costs, sites, pair)
    # From zero, and with room above for what is drawn on the line.
    for axes in (every, costs):
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    every.set_ylabel(f"entries below {threshold:g}, %")
    costs.set_ylabel("residual of the best shared weight")
    for axes in (shares, every, costs):
        tidy(axes)
    figure.suptitle(plain(title), x=0.01, horizontalalignment="left", fontsize=11.5, fontweight="bold", color=INK)
    marks = []
    for pair in PAIRS:
        look: dict[str, Any] = {"color": _COLORS[pair], "marker": _MARKERS[pair], "markersize": 4}
        marks.append(Line2D([], [], **look, label=f"{pair[0].upper()} and {pair[1].upper()}"))
    marks.append(Line2D([], [], color=MUTED, ls=":", label="by chance: the same entries in random order"))
    marks.append(Line2D([], [], color=MUTED, ls=(0, (5, 3)), linewidth=1, label=f"threshold {threshold:g}"))
    lower.legend(handles=marks, **LEGEND, loc="outside lower left", ncols=5)
    return figure


def _draw_pair(every: Axes, costs: Axes, sites: Sequence[SiteRedundancy], pair: str) -> None:
    """A pair's share of entries below the threshold in every layer, and what sharing costs there."""
    shares, by_chance, residuals = [], [], []
    for site in sites:
        compared = site.pairs.get(pair)
        # matplotlib leaves a gap for not a number.
        shares.append(compared.share if compared else math.nan)
        by_chance.append(compared.share_by_chance if compared else math.nan)
        residuals.append(compared.residual if compared and compared.residual is not None else math.nan)
    look: dict[str, Any] = {"color": _COLORS[pair], "marker": _MARKERS[pair], "markersize": 3.6, "linewidth": 1.2}
    every.plot(shares, **look)
    every.plot(by_chance, color=_COLORS[pair], linewidth=1.1, ls=":")
    costs.plot(residuals, **look, clip_on=False)


def _quantile(values: Tensor, share: float) -> float:
    """`torch.quantile` takes no large tensors."""
    flat = values.flatten()
    return float(flat.kthvalue(max(1, round(share * len(flat)))).values)


def _draw_layer(
    figure: SubFigure, layer: SiteRedundancy, apart: Mapping[str, Tensor], limit: float, threshold: float
) -> None:
    panels = figure.subplots(1, 3)
    picture = None
    for axes, pair in zip(panels, PAIRS, strict=True):
        axes.set_title(f"| |{pair[0].upper()}| − |{pair[1].upper()}| |", loc="left", fontsize=10.5, color=INK, pad=18)
        axes.tick_params(colors=MUTED, labelsize=8, length=2)
        for spine in axes.spines.values():
            spine.set_color(RULE)
        if pair not in apart:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.text(
                0.5, 0.5, plain(fill(layer.skipped[pair], 34)), transform=axes.transAxes, ha="center", va="center",
                fontsize=8.5, color=MUTED,
            )  # fmt: skip
            continue
        compared, values = layer.pairs[pair], apart[pair]
        heads, width, channels = values.shape
        share = f"{compared.share:.1f} % below {threshold:g}, by chance {compared.share_by_chance:.1f} %"
        axes.text(0, 1.012, share, transform=axes.transAxes, va="bottom", fontsize=8.5, color=MUTED)
        # Heads beside each other, as they are in the weight of a packed projection.
        flat = values.permute(1, 0, 2).reshape(width, heads * channels)
        picture = axes.imshow(flat.numpy(), cmap="Blues", vmin=0, vmax=limit, aspect="auto")
        # A tick where a head begins, at the edge of its first channel; of many heads, at every second or third.
        starts = [head * channels for head in range(0, heads + 1, -(-heads // _TICKS))]
        axes.set_xticks([start - 0.5 for start in starts], list(map(str, starts)))
        axes.set_xlabel(f"output channel, {heads} heads of {channels}", color=INK, fontsize=9)
    panels[0].set_ylabel("input channel", color=INK, fontsize=9)
    if picture is not None:
        bar = figure.colorbar(picture, ax=list(panels), fraction=0.025, pad=0.012, extend="max")
        bar.outline.set_edgecolor(RULE)
        bar.ax.tick_params(colors=MUTED, labelsize=8, length=2)


def _draw_shares(axes: Axes, apart: Mapping[str, Tensor], limit: float, threshold: float) -> None:
    """The share of entries under any threshold: the distribution function."""
    grid = torch.linspace(0, limit, _POINTS, dtype=torch.float64)
    for pair, values in apart.items():
        below = torch.searchsorted(values.flatten().sort().values, grid).double() / values.numel()
        axes.plot(grid.numpy(), 100 * below.numpy(), color=_COLORS[pair], linewidth=1.4)
    axes.axvline(threshold, color=MUTED, linewidth=1, linestyle=(0, (5, 3)))
    right = max(limit, 1.2 * threshold)
    axes.set_xlim(-0.05 * right, right)
    axes.set_ylim(0, 102)
    axes.set_xlabel("threshold")
    axes.set_ylabel("entries of this layer below it, %")


def _draw_layers(axes: Axes, labels: Sequence[str], pattern: str, place: int) -> None:
    """An axis over all layers, the one at `place` marked; by number where names are long."""
    axes.axvspan(place - 0.4, place + 0.4, color=RULE, alpha=0.55, linewidth=0)
    if max(map(len, labels)) > _LONGEST:
        labels, pattern = list(map(str, range(len(labels)))), "attention, numbered in order"
    step = -(-len(labels) // _LABELS)
    axes.set_xticks(range(0, len(labels), step), [plain(label) for label in labels[::step]])
    axes.set_xlim(-0.6, max(len(labels), 2) - 0.4)
    axes.set_xlabel(plain(pattern))
