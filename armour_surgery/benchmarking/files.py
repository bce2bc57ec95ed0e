"""A benchmark as a file: JSON, CSV, a page of tables, or a figure."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from armour_surgery.benchmarking.intervals import CONFIDENCE
from armour_surgery.benchmarking.operators import side_by_side
from armour_surgery.benchmarking.results import Benchmark, Settings
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
    or `.pdf` speed against parameters.

    Raises:
        UsageError, FolderError: see `check_speed_file`.
    """
    check_speed_file(path)
    kind = Path(path).suffix.lower()
    if kind in _FIGURES:
        # Only who draws waits for matplotlib.
        from armour_surgery.benchmarking.figure import speed_figure
        from armour_surgery.report.style import save_figure

        return save_figure(path, speed_figure(*_points(benchmark), title=_how(benchmark)))
    if kind == ".json":
        text = json.dumps(benchmark.to_dict(), indent=1, allow_nan=False) + "\n"
    else:
        text = _csv(benchmark) if kind == ".csv" else markdown([benchmark])
    return write_whole(path, text.encode(), "benchmark")


def markdown(benchmarks: Sequence[Benchmark]) -> str:
    """Tables of benchmarks that were made in one environment: where and how, models, pairs, and where time went."""
    sections = [f"{_where(benchmarks[0])}\n"]
    models = [
        [
            cost.name,
            _way(one.settings),
            batch.batch_size,
            f"{cost.params:,}",
            f"{cost.macs:,}",
            f"{speed.images_per_s:.1f}",
            f"{speed.latency_ms:.2f}",
            f"{speed.p90_ms:.2f}",
            _number(batch.peak_mib[cost.name], ".1f"),
        ]
        for one in benchmarks
        for batch in one.batches
        for cost, speed in zip(one.costs, batch.models, strict=True)
    ]
    sections.append(_table(_MODEL_HEAD, models))
    pairs = [
        [
            f"{pair.b} over {pair.a}",
            _way(one.settings),
            batch.batch_size,
            f"{pair.speedup:.3f}",
            _range(pair.speedup_interval),
            _range(pair.speedup_iqr),
            pair.rounds,
            "noise" if pair is batch.noise else batch.verdict(pair),
        ]
        for one in benchmarks
        for batch in one.batches
        for pair in (batch.noise, *batch.pairs)
    ]
    sections.append(_table(_PAIR_HEAD, pairs))
    for one in (one for one in benchmarks if one.profiles):
        sections.append(f"Milliseconds in each operator, {_way(one.settings)}, batch {one.profiles[0].batch_size}:\n")
        rows = [[name, *(f"{ms:.3f}" for ms in cells)] for name, cells in side_by_side(one.profiles, _OPERATORS)]
        sections.append(_table(("operator", *(profile.name for profile in one.profiles)), rows))
    return "\n".join(sections)


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
            writer.writerow(row + [None] * (len(_CSV_HEAD) - len(row)))
    return stream.getvalue()


def _points(benchmark: Benchmark) -> tuple[list[str], list[int], list[float], list[tuple[float, float] | None]]:
    """Names, parameters, images per second, and the interval of these as far as they are compared with the first."""
    batch = benchmark.largest
    ranges: list[tuple[float, float] | None] = [None]
    for speed, pair in zip(batch.models[1:], batch.pairs, strict=True):
        ends = pair.speedup_interval
        scale = speed.images_per_s / pair.speedup
        ranges.append(None if ends is None else (scale * ends[0], scale * ends[1]))
    names = [cost.name for cost in benchmark.costs]
    return names, [cost.params for cost in benchmark.costs], [one.images_per_s for one in batch.models], ranges


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


def _way(settings: Settings) -> str:
    kinds = (settings.dtype, "deployed" if settings.deployed else "", "compiled" if settings.compiled else "eager")
    return ", ".join(kind for kind in kinds if kind)


def _how(benchmark: Benchmark) -> str:
    batch = benchmark.largest.batch_size
    return f"{benchmark.environment.processor}, {_way(benchmark.settings)}, batch {batch}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _range(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
