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


def environment_line(found: "Benchmark") -> str:
    """Where and how, in a sentence or two."""
    here, settings = found.environment, found.settings
    where = f" (this process: {', '.join(map(str, here.affinity))})" if here.affinity else ""
    ways = [settings.dtype, *(["deployed"] if settings.deployed else []), "compiled" if settings.compiled else "eager"]
    load = f"; load {here.load:.2f} at the start" if here.load is not None else ""
    return (
        f"{here.processor}, {here.cpu_capability}; threads: {here.threads}; CPUs: {here.cores}{where}; "
        f"torch {here.torch}; {', '.join(ways)}{load}"
    )


def size_table(found: "Benchmark") -> Table:
    """A row for each model: what it is made of, at any batch size."""
    table = plain_table()
    table.add_column("model", overflow="fold")
    table.add_column("params, M", justify="right", no_wrap=True)
    table.add_column("MACs, G", justify="right", no_wrap=True)
    for cost in found.costs:
        table.add_row(escape(cost.name), f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e9:.3f}")
    return table


def model_table(found: "Benchmark") -> Table:
    """A row for each model and batch size."""
    table = plain_table()
    table.add_column("model", overflow="fold")
    compiled = found.settings.compiled
    for header in ("batch", "images/s", "ms", "p90", "MiB", *(["compile, s"] * compiled)):
        table.add_column(header, justify="right", no_wrap=True)
    for place, cost in enumerate(found.costs):
        for number, batch in enumerate(found.batches):
            speed = batch.models[place]
            peak = batch.peak_mib[cost.name]
            table.add_row(
                "" if number else escape(cost.name),
                str(batch.batch_size),
                _short(speed.images_per_s),
                _short(speed.latency_ms),
                _short(speed.p90_ms),
                "-" if peak is None else _short(peak),
                *([f"{batch.compile_s[cost.name]:.1f}"] if compiled else []),
            )
    return table


def pair_table(found: "Benchmark") -> Table:
    """A row for each pair and batch size, the first model against its double beneath them."""
    from armour_surgery.benchmarking.intervals import CONFIDENCE

    first = escape(found.costs[0].name)
    table = plain_table(f"How many times as fast as {first}")
    table.add_column("model", overflow="fold")
    for header in ("batch", "speed-up", f"{100 * CONFIDENCE:.0f} % interval", "rounds"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict")
    for place, cost in enumerate(found.costs[1:]):
        for number, batch in enumerate(found.batches):
            pair = batch.pairs[place]
            said = batch.verdict(pair)
            label = "" if number else escape(cost.name)
            table.add_row(label, *_pair_cells(pair, batch.batch_size), said, style=_STYLES.get(said))
    for number, batch in enumerate(found.batches):
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
    *rows, total = side_by_side(profiles, _OPERATORS)
    for name, cells in rows:
        table.add_row(escape(name), *(f"{ms:.2f}" for ms in cells), end_section=name == rows[-1][0])
    table.add_row(total[0], *(f"{ms:.2f}" for ms in total[1]))
    return table


def _pair_cells(pair: "PairSpeed", batch_size: int) -> list[str]:
    ends = pair.speedup_interval
    interval = "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
    return [str(batch_size), f"{pair.speedup:.3f}", interval, str(pair.rounds)]


def _short(value: float) -> str:
    """Three digits or more, and of what is less than one, two decimals."""
    if value < 1:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"
