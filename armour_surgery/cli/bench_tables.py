"""The tables of `bench`, made for 80 columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from armour_surgery.cli.tables import plain_table

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
    here, settings = benchmark.environment, benchmark.settings
    where = f" (this process: {', '.join(map(str, here.affinity))})" if here.affinity else ""
    ways = [settings.dtype]
    if settings.deployed:
        ways.append("deployed")
    ways.append(settings.ran)
    load = f"; load {here.load:.2f} at the start" if here.load is not None else ""
    return (
        f"{here.processor}, {here.cpu_capability}; threads: {here.threads}; CPUs: {here.cores}{where}; "
        f"torch {here.torch}; {', '.join(ways)}{load}"
    )


def size_table(benchmark: "Benchmark") -> Table:
    """A row for each model: what it is made of, at any batch size."""
    table = plain_table()
    table.add_column("model", overflow="fold")
    table.add_column("params, M", justify="right", no_wrap=True)
    table.add_column("MACs, G", justify="right", no_wrap=True)
    for cost in benchmark.costs:
        table.add_row(escape(cost.name), f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e9:.3f}")
    return table


def model_table(benchmark: "Benchmark") -> Table:
    """A row for each model and batch size."""
    table = plain_table()
    table.add_column("model", overflow="fold")
    compiled = benchmark.settings.compiled
    headers = ["batch", "images/s", "ms", "p90", "MiB"]
    if compiled:
        headers.append("compile, s")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
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
            table.add_row("" if number else escape(cost.name), *cells)
    return table


def pair_table(benchmark: "Benchmark") -> Table:
    """A row for each pair and batch size, the first model against its double beneath them."""
    from armour_surgery.benchmarking.intervals import CONFIDENCE

    first = escape(benchmark.costs[0].name)
    table = plain_table(f"How many times as fast as {first}")
    table.add_column("model", overflow="fold")
    for header in ("batch", "speed-up", f"{100 * CONFIDENCE:.0f} % interval", "rounds"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict")
    for place, cost in enumerate(benchmark.costs[1:]):
        for number, batch in enumerate(benchmark.batches):
            pair = batch.pairs[place]
            said = batch.verdict(pair)
            label = "" if number else escape(cost.name)
            table.add_row(label, *_pair_cells(pair, batch.batch_size), said, style=_STYLES.get(said))
    for number, batch in enumerate(benchmark.batches):
        label = "" if number else "a copy of itself"
        table.add_row(label, *_pair_cells(batch.noise, batch.batch_size), "noise", style="dim")
    return table


def profile_table(profiles: "Sequence[Profile]") -> Table:
    """Milliseconds of the operators that take most, a column for each model."""
    from armour_surgery.benchmarking.operators import side_by_side

    table = plain_table(f"Where the time goes, batch {profiles[0].batch_size}: ms in each operator itself")
    table.add_column("operator", overflow="ellipsis", no_wrap=True)
    for profile in profiles:
        table.add_column(escape(profile.name), justify="right", overflow="fold")
    *operators, (all_of_them, sums) = side_by_side(profiles, _OPERATORS)
    for name, milliseconds in operators:
        table.add_row(escape(name), *map(_milliseconds, milliseconds))
    # A line between the operators and their sum.
    table.add_section()
    table.add_row(all_of_them, *map(_milliseconds, sums))
    return table


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
