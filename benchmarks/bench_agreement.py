"""Whether two runs of `bench` on the same pair agree, on an idle machine and with another core loaded.

    python benchmarks/bench_agreement.py --runs 10 --budget 30

Converts the model, then runs `armour-surgery bench MODEL --vs CONVERTED --vs MODEL` in fresh processes, in
turns with the machine left alone and with an endless loop on the last core that this process may use. Over
all pairs of runs under the same condition it counts how often their intervals overlap, and, stricter, how
often the median of one lies in the interval of the other; `mixed` holds a run left alone against one
beside the loop. A run whose time was over before there were rounds enough for an interval is in no pair.
MODEL against itself shows how often a difference is called where there is none. Writes JSON and, beside
it, a Markdown table, anew after every run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import combinations, product
from pathlib import Path
from typing import Any

CONDITIONS = ("alone", "beside a loop")
TOOL = (sys.executable, "-m", "armour_surgery")
Pairs = list[tuple[dict[str, Any], dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="MODEL (%(default)s)")
    parser.add_argument("--mode", default="qv", help="what it is converted to (%(default)s)")
    parser.add_argument("--runs", type=int, default=10, help="runs under each condition (%(default)s)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of rounds per batch size (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="%(default)s, and one image alone")
    parser.add_argument("--threads", type=int, help="as many as torch takes, if it is not given")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bench_agreement.json"))
    options = parser.parse_args(arguments)

    runs: dict[str, list[dict[str, Any]]] = {condition: [] for condition in CONDITIONS}
    with tempfile.TemporaryDirectory() as folder:
        converted = f"{folder}/{options.mode}"
        words = ("convert", options.model, "--mode", options.mode, "--no-pretrained", "--out", converted)
        subprocess.run((*TOOL, *words), check=True, capture_output=True)
        command = [
            *TOOL, "bench", options.model, "--vs", converted, "--vs", options.model, "--json",
            "--budget", str(options.budget), "--batch-size", str(options.batch_size),
            *(["--threads", str(options.threads)] if options.threads else []),
            *(["--compile"] if options.compile else []),
        ]  # fmt: skip
        for number, condition in product(range(options.runs), CONDITIONS):
            with nullcontext() if condition == CONDITIONS[0] else busy_core():
                done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[condition].append(json.loads(done.stdout.replace(converted, options.mode)))
            print(f"run {number + 1} of {options.runs}, {condition}", file=sys.stderr)
            write(runs, options.out)
    print(options.out.with_suffix(".md").read_text(encoding="utf-8"))


@contextmanager
def busy_core() -> Iterator[None]:
    """An endless loop in a process of its own, on the last core that this process may use."""
    code = f"import os; os.sched_setaffinity(0, {{{max(os.sched_getaffinity(0))}}})\nwhile True: pass"
    loop = subprocess.Popen((sys.executable, "-c", code))
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


def write(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(runs), encoding="utf-8")


def markdown(runs: dict[str, list[dict[str, Any]]]) -> str:
    first = runs[CONDITIONS[0]][0]
    here = first["environment"]
    alone, beside = (runs[condition] for condition in CONDITIONS)
    pairings: dict[str, Pairs] = {
        **{condition: list(combinations(runs[condition], 2)) for condition in CONDITIONS},
        "mixed": list(product(alone, beside)),
    }
    lines = [
        f"{here['processor']}, {here['threads']} threads, {here['cores']} cores, torch {here['torch']}, "
        f"{first['settings']['budget_s']:g} s of rounds per batch size; {len(alone)} runs alone, {len(beside)} "
        "beside a loop.",
        "",
        "| comparison | batch | condition | medians | pairs of runs | intervals overlap | median in the other's | "
        "differences called |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for place, batch in enumerate(first["batches"]):
        for number, pair in enumerate(batch["pairs"]):
            for condition, both in pairings.items():
                if both:
                    cells = agreement(both, runs.get(condition, []), place, number)
                    name = f"{pair['b']} over {pair['a']}"
                    lines.append(f"| {' | '.join([name, str(batch['batch_size']), condition, *cells])} |")
    return "\n".join(lines) + "\n"


def agreement(both: Pairs, runs: list[dict[str, Any]], place: int, number: int) -> list[str]:
    """Cells of the table: medians, pairs, and how often they agree."""
    read = [[one["batches"][place]["pairs"][number] for one in pairing] for pairing in both]
    found = [pairing for pairing in read if all(pair["speedup_interval"] for pair in pairing)]
    if not found:
        return ["", "0", "too few rounds", "too few rounds", ""]
    overlap = sum(overlap_of(a["speedup_interval"], b["speedup_interval"]) for a, b in found)
    inside = [lies(a["speedup"], b) for one, other in found for a, b in ((one, other), (other, one))]
    single = [one["batches"][place]["pairs"][number] for one in runs]
    medians = sorted(one["speedup"] for one in single)
    called = sum(one["verdict"] in ("faster", "slower") for one in single)
    return [
        f"{medians[0]:.3f} to {medians[-1]:.3f}" if medians else "",
        str(len(found)),
        f"{100 * overlap / len(found):.0f} %",
        f"{100 * sum(inside) / len(inside):.0f} %",
        f"{called} of {len(single)}" if single else "",
    ]


def overlap_of(one: list[float], other: list[float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def lies(median: float, pair: dict[str, Any]) -> bool:
    low, high = pair["speedup_interval"]
    return bool(low <= median <= high)


if __name__ == "__main__":
    main()
