"""How much faster a converted model is, on the CPU of this machine or on its GPU.

    python benchmarks/conversion_speed.py [--quick] [--out benchmarks/results/conversion_speed.json]
    python benchmarks/conversion_speed.py --device cuda --dtype bf16 --out benchmarks/results/conversion_speed_gpu.json

What `armour-surgery bench` does, with models that are converted here: they come from the same weights, get
the same images and the same compilation, are timed in turns, and the original is also held against a copy
of itself, which shows what this machine's noise alone does to a ratio. Weights are random: they do not
change the time. Writes JSON and, beside it, Markdown tables.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from armour_surgery import benchmark, convert
from armour_surgery.benchmarking.files import markdown
from armour_surgery.benchmarking.results import Benchmark
from armour_surgery.hosts import load_model

# Model, modes to hold against it, and whether to compile.
ON_CPU = (
    ("deit_tiny_patch16_224", ("qv",), False),
    ("deit_tiny_patch16_224", ("qv",), True),
    ("levit_128s", ("concat-half", "concat-full"), False),
)
ON_GPU = (
    ("deit_tiny_patch16_224", ("qv",), False),
    ("deit_tiny_patch16_224", ("qv",), True),
    ("deit_base_patch16_224", ("qv",), False),
    ("deit_base_patch16_224", ("qv",), True),
    ("levit_128s", ("concat-half", "concat-full"), False),
    ("levit_128s", ("concat-half", "concat-full"), True),
)


def main(arguments: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="12 rounds, batch 4, nothing compiled")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison, at most (an even number)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds at each batch size (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/conversion_speed.json"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for name, modes, compiled in ON_GPU if options.device == "cuda" else ON_CPU:
        if compiled and options.quick:
            continue
        print(f"{name}: {', '.join(modes)}, {'compiled' if compiled else 'eager'}", file=sys.stderr)
        results.append(run(name, modes, compiled, options))
        # After each of them: what was measured on a machine that is then taken away is not lost.
        text = json.dumps({"comparisons": [one.to_dict() for one in results]}, indent=2)
        options.out.write_text(text + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def run(name: str, modes: Sequence[str], compiled: bool, options: argparse.Namespace) -> Benchmark:
    host = load_model(name, pretrained=False)[0]
    batch_size = 256 if options.device == "cuda" else 16
    return benchmark(
        {name: host, **{f"{name} {mode}": convert(host, mode=mode) for mode in modes}},
        batch_sizes=(4 if options.quick else batch_size,),
        device=options.device,
        dtype=options.dtype,
        compile=compiled,
        rounds=options.rounds or (12 if options.quick else 300),
        budget_s=options.budget,
        keep_freed_memory=options.device == "cpu",
    )


if __name__ == "__main__":
    main()
