"""A benchmark as one table, for sessions and notebooks."""

from typing import TYPE_CHECKING

from armour_surgery.benchmarking.intervals import CONFIDENCE
from armour_surgery.tabular import Table

if TYPE_CHECKING:
    from armour_surgery.benchmarking.results import Benchmark

__all__ = ["benchmark_table"]


def benchmark_table(benchmark: "Benchmark") -> Table:
    """A row for each model and batch size; speed-ups are over the first model, whose own is that of its double."""
    rows: list[tuple[str, ...]] = []
    for place, cost in enumerate(benchmark.costs):
        for number, batch in enumerate(benchmark.batches):
            speed = batch.models[place]
            pair = batch.pairs[place - 1] if place else batch.noise
            ends = pair.speedup_interval
            row = (
                "" if number else cost.name,
                str(batch.batch_size),
                f"{speed.images_per_s:.1f}",
                f"{speed.latency_ms:.1f}",
                f"{pair.speedup:.3f}",
                "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}",
                batch.verdict(pair) if place else "noise",
            )
            rows.append(row)
    here = benchmark.environment
    caption = f"Benchmark: {benchmark.settings.way}, {here.threads} threads, {here.processor}"
    headers = ("model", "batch", "images/s", "ms", "speed-up", f"{100 * CONFIDENCE:.0f} % interval", "verdict")
    return Table(caption, headers, rows, frozenset((1, 2, 3, 4, 5)))
