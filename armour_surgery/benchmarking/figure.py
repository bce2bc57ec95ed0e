"""The figure of a benchmark: how many times as fast as the first model, with the interval that this is known to."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from armour_surgery.benchmarking.intervals import CONFIDENCE
from armour_surgery.benchmarking.results import Benchmark
from armour_surgery.benchmarking.speed import PairSpeed
from armour_surgery.report.style import INK, LEGEND, MUTED, SERIES, blank_figure, plain, tidy
from armour_surgery.spelled import millions, shortened

__all__ = ["speed_figure"]

# Letters of a model's name beside its row.
_NAME = 34
# How far apart the batch sizes of one model are, in rows.
_APART = 0.28


@dataclass(frozen=True)
class _Row:
    """A model's label, and how fast it is at each batch size."""

    label: str
    pairs: Sequence[PairSpeed]


def speed_figure(benchmark: Benchmark) -> Figure:
    """A row for each model, with a dot for each batch size; the first model's double is the last row, and is noise.

    A dot without a line had too few rounds for an interval.
    """
    first = benchmark.costs[0].name
    rows = []
    for place, cost in enumerate(benchmark.costs[1:]):
        pairs = [batch.pairs[place] for batch in benchmark.batches]
        rows.append(_Row(f"{shortened(cost.name, _NAME)}\n{millions(cost.params)} parameters", pairs))
    rows.append(_Row("a copy of itself\n(noise)", [batch.noise for batch in benchmark.batches]))
    figure = blank_figure(8.4, 1.7 + 0.42 * len(rows) * (1 + len(benchmark.batches)) / 2)
    axes = figure.subplots()
    # The figure has no background, and its axes should not bring one.
    axes.patch.set_alpha(0)
    axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (5, 3)))
    handles = []
    for number, batch in enumerate(benchmark.batches):
        color = SERIES[number % len(SERIES)]
        offset = (number - (len(benchmark.batches) - 1) / 2) * _APART
        for place, row in enumerate(rows):
            pair, height = row.pairs[number], place + offset
            ends = pair.speedup_interval
            if ends is not None:
                axes.plot(ends, [height] * 2, color=color, linewidth=2, solid_capstyle="butt")
            known = f"{pair.speedup:.3f}" + ("" if ends is None else f"  ({ends[0]:.3f} to {ends[1]:.3f})")
            axes.annotate(
                known, (1.01, height), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=INK
            )
            filled = color if ends is not None else "none"
            axes.plot([pair.speedup], [height], color=color, marker="o", markersize=6, markerfacecolor=filled)
        marker = axes.plot(
            [], [], color=color, linewidth=2, marker="o", markersize=6, label=f"batch {batch.batch_size}"
        )
        handles += marker
    axes.set_yticks(range(len(rows)), [plain(row.label) for row in rows])
    # From top to bottom, as in the table.
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.margins(x=0.08)
    title = f"{benchmark.environment.processor}, {benchmark.settings.way}"
    axes.set_title(plain(title), loc="left", fontsize=9.5)
    interval = f"with {100 * CONFIDENCE:.0f} % intervals"
    axes.set_xlabel(plain(f"how many times as fast as {shortened(first, _NAME)}, {interval}"))
    tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", linewidth=0.6, alpha=0.5)
    figure.legend(handles=handles, **LEGEND, loc="outside lower left", ncols=len(handles))
    return figure
