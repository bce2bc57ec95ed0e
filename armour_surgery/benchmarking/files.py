"""A benchmark as a file: JSON, CSV, a page of Markdown tables, or a figure."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from armour_surgery.benchmarking.intervals import CONFIDENCE
from armour_surgery.benchmarking.operators import side_by_side
from armour_surgery.benchmarking.results import BatchSpeed, Benchmark
from armour_surgery.errors import UsageError
from armour_surgery.report.whole_file import check_target, write_whole

__all__ = ["check_speed_file", "markdown", "write_speed_file"]

_FIGURES = (".png", ".svg", ".pdf")
_TEXTS = (".json", ".csv", ".md")
# Operators that a Markdown table names; the others share a row.
_OPERATORS = 15
_MODEL_HEAD = ("model", "run as", "batch", "parameters", "MACs", "images/s", "median ms", "p90 ms", "peak MiB")
_PAIR_HEAD = (
    "comparison", "run as", "batch", "median speed-up", f"{100 * CONFIDENCE:.0f} % interval",
    "middle half of the rounds", "rounds", "verdict",
)  # fmt: skip
_CSV_HEAD = (
    "name", "batch_size", "params", "macs", "images_per_s", "latency_ms", "p90_ms", "peak_mib", "compile_s",
    "speedup", "interval_low", "interval_high", "quartile_low", "quartile_high", "rounds", "verdict",
)  # fmt: skip


def check_speed_file(path: str | Path) -> None:
    """Make sure that a benchmark may be written at `path`, before it is made.

    Raises:
        UsageError: its name does not end in a format that there is.
        FolderError: it is a folder or a device, or its folder is missing or cannot be written to.
    """
    if Path(path).suffix.lower() not in (*_TEXTS, *_FIGURES):
        raise UsageError(f"no format for {str(path)!r}; name a file that ends in {', '.join((*_TEXTS, *_FIGURES))}")
    check_target(path, "benchmark")


def write_speed_file(path: str | Path, benchmark: Benchmark) -> Path:
    """Write a benchmark whole or not at all, in the format that the name ends in.

    `.json` holds `Benchmark.to_dict()`, `.csv` a row for each model and batch size, `.md` tables, and `.png`, `.svg`
    or `.pdf` speed-ups with their intervals.

    Raises:
        UsageError, FolderError: see `check_speed_file`.
    """
    check_speed_file(path)
    kind = Path(path).suffix.lower()
    if kind in _FIGURES:
        # Only who draws waits for matplotlib.
        from armour_surgery.benchmarking.figure import speed_figure
        from armour_surgery.report.style import save_figure

        return save_figure(path, speed_figure(benchmark))
    if kind == ".json":
        text = json.dumps(benchmark.to_dict(), indent=1, allow_nan=False) + "\n"
    else:
        text = _csv(benchmark) if kind == ".csv" else markdown([benchmark])
    return write_whole(path, text.encode(), "benchmark")


def markdown(benchmarks: Sequence[Benchmark]) -> str:
    """Tables of benchmarks that were made in one environment: where and how, models, pairs, and where time went."""
    models: list[Sequence[object]] = []
    pairs: list[Sequence[object]] = []
    for benchmark in benchmarks:
        for batch in benchmark.batches:
            models += _model_rows(benchmark, batch)
            pairs += _pair_rows(benchmark, batch)
    sections = [f"{_where(benchmarks[0])}\n", _table(_MODEL_HEAD, models), _table(_PAIR_HEAD, pairs)]
    for benchmark in benchmarks:
        if benchmark.profiles:
            sections += _operators(benchmark)
    return "\n".join(sections)


def _model_rows(benchmark: Benchmark, batch: BatchSpeed) -> list[Sequence[object]]:
    rows: list[Sequence[object]] = []
    for cost, speed in zip(benchmark.costs, batch.models, strict=True):
        row = (
            cost.name,
            benchmark.settings.way,
            batch.batch_size,
            f"{cost.params:,}",
            f"{cost.macs:,}",
            f"{speed.images_per_s:.1f}",
            f"{speed.latency_ms:.2f}",
            f"{speed.p90_ms:.2f}",
            _number(batch.peak_mib[cost.name], ".1f"),
        )
        rows.append(row)
    return rows


def _pair_rows(benchmark: Benchmark, batch: BatchSpeed) -> list[Sequence[object]]:
    """The model against its double first: what the others have to be larger than."""
    rows: list[Sequence[object]] = []
    for pair in (batch.noise, *batch.pairs):
        row = (
            f"{pair.b} over {pair.a}",
            benchmark.settings.way,
            batch.batch_size,
            f"{pair.speedup:.3f}",
            _range(pair.speedup_interval),
            _range(pair.speedup_iqr),
            pair.rounds,
            "noise" if pair is batch.noise else batch.verdict(pair),
        )
        rows.append(row)
    return rows


def _operators(benchmark: Benchmark) -> list[str]:
    """Where the time goes: a line that says of what, and the table."""
    profiles = benchmark.profiles
    title = f"Milliseconds in each operator, {benchmark.settings.way}, batch {profiles[0].batch_size}:\n"
    head = ["operator"] + [profile.name for profile in profiles]
    rows = []
    for name, milliseconds in side_by_side(profiles, _OPERATORS):
        rows.append([name] + [f"{ms:.3f}" for ms in milliseconds])
    return [title, _table(head, rows)]


def _csv(benchmark: Benchmark) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CSV_HEAD)
    for batch in benchmark.batches:
        pairs = {pair.b: pair for pair in batch.pairs}
        for cost, speed in zip(benchmark.costs, batch.models, strict=True):
            row: list[object] = [
                cost.name, batch.batch_size, cost.params, cost.macs, speed.images_per_s, speed.latency_ms,
                speed.p90_ms, batch.peak_mib[cost.name], batch.compile_s.get(cost.name),
            ]  # fmt: skip
            pair = pairs.get(cost.name)
            if pair is not None:
                ends = pair.speedup_interval or (None, None)
                row += [pair.speedup, *ends, *pair.speedup_iqr, pair.rounds, batch.verdict(pair)]
            # The first model is compared with nothing, and its last columns stay empty.
            writer.writerow(row + [None] * (len(_CSV_HEAD) - len(row)))
    return stream.getvalue()


def _where(benchmark: Benchmark) -> str:
    here = benchmark.environment
    cpus = f" on CPUs {', '.join(map(str, here.affinity))}" if here.affinity else ""
    commit = f", commit {here.commit}" if here.commit else ""
    return (
        f"{here.processor} ({here.cpu_capability}), {here.threads} threads{cpus} of {here.cores}, "
        f"torch {here.torch}, timm {here.timm}, transformers {here.transformers}, {here.system}{commit}, load "
        f"{_number(here.load, '.2f')} at the start, inference mode, freed memory "
        f"{'kept' if benchmark.settings.freed_memory_kept else 'given back'}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = ""
    for line in (head, ["---"] * len(head), *rows):
        # A bar in a cell would end it.
        cells = [str(cell).replace("|", r"\|") for cell in line]
        text += f"| {' | '.join(cells)} |\n"
    return text


def _range(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
