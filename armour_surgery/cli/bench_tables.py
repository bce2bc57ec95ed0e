"""The tables of `bench`, made for 80 columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from armour_surgery.cli.tables import Shown
from armour_surgery.tabular import Table

if TYPE_CHECKING:
    from armour_surgery.benchmarking.operators import Profile
    from armour_surgery.benchmarking.results import Benchmark
    from armour_surgery.benchmarking.speed import PairSpeed

__all__ = ["environment_line", "model_table", "pair_table", "profile_table", "size_table"]

# Operators that a table names; the others share a row.
_OPERATORS = 10
_STYLES = {"faster": "green", "slower": "red"}


def environment_line(benchmark: "Benchmark") -> str:
    """Where and how, in a sentence or two."""
    here = benchmark.environment
    where = f" (this process: {', '.join(map(str, here.affinity))})" if here.affinity else ""
    load = f"; load {here.load:.2f} at the start" if here.load is not None else ""
    return (
        f"{here.processor}, {here.cpu_capability}; threads: {here.threads}; CPUs: {here.cores}{where}; "
        f"torch {here.torch}; {benchmark.settings.way}{load}"
    )


def size_table(benchmark: "Benchmark") -> Shown:
    """A row for each model: what it is made of, at any batch size."""
    rows: list[tuple[str, ...]] = []
    for cost in benchmark.costs:
        rows.append((cost.name, f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e9:.3f}"))
    return Shown(Table("", ("model", "params, M", "MACs, G"), rows, frozenset((1, 2))))


def model_table(benchmark: "Benchmark") -> Shown:
    """A row for each model and batch size."""
    compiled = benchmark.settings.compiled
    headers = ["model", "batch", "images/s", "ms", "p90", "MiB"]
    if compiled:
        headers.append("compile, s")
    rows: list[tuple[str, ...]] = []
    for place, cost in enumerate(benchmark.costs):
        for number, batch in enumerate(benchmark.batches):
            speed = batch.models[place]
            peak = batch.peak_mib[cost.name]
            cells = [
                str(batch.batch_size),
                _short(speed.images_per_s),
                _short(speed.latency_ms),
                _short(speed.p90_ms),
                "-" if peak is None else _short(peak),
            ]
            if compiled:
                cells.append(f"{batch.compile_s[cost.name]:.1f}")
            # A model is named once, in the first of its rows.
            rows.append(("" if number else cost.name, *cells))
    return Shown(Table("", tuple(headers), rows, frozenset(range(1, len(headers)))))


def pair_table(benchmark: "Benchmark") -> Shown:
    """A row for each pair and batch size, the first model against its double beneath them."""
    from armour_surgery.benchmarking.intervals import CONFIDENCE

    rows: list[tuple[str, ...]] = []
    styles: dict[int, str] = {}
    for place, cost in enumerate(benchmark.costs[1:]):
        for number, batch in enumerate(benchmark.batches):
            pair = batch.pairs[place]
            said = batch.verdict(pair)
            if said in _STYLES:
                styles[len(rows)] = _STYLES[said]
            rows.append(("" if number else cost.name, *_pair_cells(pair, batch.batch_size), said))
    for number, batch in enumerate(benchmark.batches):
        styles[len(rows)] = "dim"
        label = "" if number else "a copy of itself"
        rows.append((label, *_pair_cells(batch.noise, batch.batch_size), "noise"))
    headers = ("model", "batch", "speed-up", f"{100 * CONFIDENCE:.0f} % interval", "rounds", "verdict")
    caption = f"How many times as fast as {benchmark.costs[0].name}"
    return Shown(Table(caption, headers, rows, frozenset((1, 2, 3, 4))), styles)


def profile_table(profiles: "Sequence[Profile]") -> Shown:
    """Milliseconds of the operators that take most, a column for each model."""
    from armour_surgery.benchmarking.operators import side_by_side

    *operators, (all_of_them, sums) = side_by_side(profiles, _OPERATORS)
    rows: list[tuple[str, ...]] = []
    for name, milliseconds in (*operators, (all_of_them, sums)):
        rows.append((name, *map(_milliseconds, milliseconds)))
    headers = ("operator", *(profile.name for profile in profiles))
    caption = f"Where the time goes, batch {profiles[0].batch_size}: ms in each operator itself"
    return Shown(Table(caption, headers, rows, frozenset(range(1, len(headers)))), {len(rows) - 1: "bold"})


def _milliseconds(value: float) -> str:
    return f"{value:.2f}"


def _pair_cells(pair: "PairSpeed", batch_size: int) -> list[str]:
    ends = pair.speedup_interval
    interval = "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
    return [str(batch_size), f"{pair.speedup:.3f}", interval, str(pair.rounds)]


def _short(value: float) -> str:
    """Three digits or more, and of what is less than one, two decimals."""
    if value < 1:
        return f"{value:.2f}"
    if value < 100:
        return f"{value:.3g}"
    return f"{value:.0f}" if value < 1000 else f"{value:,.0f}"
