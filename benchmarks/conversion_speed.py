"""How much faster a converted model is, on the CPU of this machine.

    python benchmarks/conversion_speed.py [--quick] [--out benchmarks/results/conversion_speed.json]

The models of a comparison come from the same weights, are in eval mode, and get the same batches and the
same compilation; they are timed in turns, and what is reported is the distribution of the ratios within
rounds (see armour_surgery.measure.speed). Freed memory stays with the process, so that no model pays for
pages that another one gave back. The host is also held against itself: a ratio within that row's
spread is noise. Weights are random: they do not change the time. Writes JSON and, beside it, a Markdown
table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from armour_surgery import convert
from armour_surgery.hosts import load_model
from armour_surgery.measure.cost import count_macs, count_params
from armour_surgery.measure.speed import SpeedReport, compare, keep_memory

BATCH_SIZE = 16
IMAGE = (3, 224, 224)
# Model, modes to hold against it, and whether to compile.
COMPARISONS = (
    ("deit_tiny_patch16_224", ("qv",), False),
    ("deit_tiny_patch16_224", ("qv",), True),
    ("levit_128s", ("concat-half", "concat-full"), False),
)


def main(arguments: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="6 rounds, batch 4, nothing compiled")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (an even number)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/conversion_speed.json"))
    options = parser.parse_args(arguments)
    batch_size, rounds = (4, options.rounds or 6) if options.quick else (BATCH_SIZE, options.rounds or 40)

    kept = keep_memory()
    torch.manual_seed(0)
    results = []
    for name, modes, compiled in COMPARISONS:
        if compiled and options.quick:
            continue
        kind = "torch.compile" if compiled else "eager"
        print(f"{name}: {', '.join(modes)}, {kind}", file=sys.stderr)
        results.append((kind, run(name, modes, compiled, batch_size, rounds)))
    write(results, options.out, kept)
    print(options.out.with_suffix(".md").read_text(encoding="utf-8"))


def run(name: str, modes: Sequence[str], compiled: bool, batch_size: int, rounds: int) -> SpeedReport:
    host: nn.Module = load_model(name, pretrained=False)[0].eval()
    converted = {f"{name} {mode}": convert(host, mode=mode).eval() for mode in modes}
    # The host against itself shows what this machine's noise alone does to a ratio.
    models: dict[str, nn.Module] = {name: host, f"{name} again": host, **converted}
    for label, model in models.items():
        macs = count_macs(model, {"x": torch.empty(1, *IMAGE, device="meta")}).macs
        print(f"  {label}: {count_params(model):,} parameters, {macs:,} MACs", file=sys.stderr)
    if compiled:
        models = {label: torch.compile(model) for label, model in models.items()}
    return compare(models, lambda: torch.randn(batch_size, *IMAGE), rounds=rounds, budget_s=600.0)


def write(results: Sequence[tuple[str, SpeedReport]], out: Path, kept: bool) -> None:
    """Write `out` (JSON) and the same name with .md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    data = {"memory_kept": kept, "comparisons": [{"kind": kind, **report.to_dict()} for kind, report in results]}
    out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(results, kept), encoding="utf-8")


def markdown(results: Sequence[tuple[str, SpeedReport]], kept: bool) -> str:
    first = results[0][1]
    here = first.environment
    lines = [
        f"{here.processor}, {here.threads} threads, torch {here.torch}, timm {here.timm}, {here.system}, "
        f"batch {first.batch_size}, inference mode, random weights, freed memory {'kept' if kept else 'given back'}.",
        "",
        "| comparison | run as | median speed-up | middle half of the rounds | rounds |",
        "|---|---|---|---|---|",
    ]
    for kind, report in results:
        for pair in report.pairs:
            cells: list[Any] = [
                f"{pair.b} over {pair.a}",
                kind,
                f"{pair.speedup:.3f}",
                "{:.3f} to {:.3f}".format(*pair.speedup_iqr),
                pair.rounds,
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
