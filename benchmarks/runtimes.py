"""What converting is worth where models are deployed: ONNX Runtime and OpenVINO, beside the ratio of MACs.

    python benchmarks/runtimes.py [--threads N] [--budget S] [--batch-size N] [--only NAME] [--out FILE.json]
                                  [--markdown FILE.md]

The stock model, the converted one and the converted one after `deploy` take turns (`armour_surgery.benchmark`), with
random weights, which change no speed. What is told is how many times as fast as the stock model each of the two is.
"""

import argparse
import json
from pathlib import Path

import timm

from armour_surgery import benchmark, convert, deploy
from armour_surgery.benchmarking.results import Benchmark
from armour_surgery.benchmarking.speed import keep_memory

MODELS = {
    "deit_tiny_patch16_224": "qv",
    "deit_small_patch16_224": "qv",
    "levit_128s": "concat-full",
    "levit_256": "concat-full",
}
RUNTIMES = ("onnx", "openvino")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of timing for each model and runtime")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--only", choices=MODELS, help="this model alone")
    parser.add_argument("--out", type=Path, help="what was measured, as JSON")
    parser.add_argument("--markdown", type=Path, help="the table")
    options = parser.parse_args()
    keep_memory()
    found = {}
    for name, mode in MODELS.items():
        if options.only not in (None, name):
            continue
        for runtime in RUNTIMES:
            stock = timm.create_model(name).eval()
            armour = convert(stock, mode)
            measured = benchmark(
                {"stock": stock, "armour": armour, "deployed": deploy(armour, runtime=runtime)},
                batch_sizes=(options.batch_size,),
                runtime=runtime,
                threads=options.threads,
                budget_s=options.budget,
                rounds=1000,
                keep_freed_memory=True,
            )
            found[f"{name}, {runtime}"] = measured
            print(_row(name, mode, runtime, measured), flush=True)
    if options.out is not None:
        document = {key: measured.to_dict() for key, measured in found.items()}
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.markdown is not None:
        rows = [
            _row(key.partition(",")[0], MODELS[key.partition(",")[0]], key.split()[-1], found[key]) for key in found
        ]
        options.markdown.write_text(_page(rows, next(iter(found.values())), options), encoding="utf-8")


def _row(name: str, mode: str, runtime: str, measured: Benchmark) -> str:
    stock, armour, _ = (cost.macs for cost in measured.costs)
    told = [
        f"{pair.speedup:.3f} ({pair.speedup_iqr[0]:.3f} to {pair.speedup_iqr[1]:.3f})"
        for pair in measured.largest.pairs
    ]
    noise = measured.largest.noise
    double = f"{noise.speedup:.3f}"
    return f"| {name} | {mode} | {runtime} | {stock / armour:.3f} | {' | '.join(told)} | {double} | {noise.rounds} |"


def _page(rows: list[str], measured: Benchmark, options: argparse.Namespace) -> str:
    here = measured.environment
    return "\n".join(
        [
            "# Converted models in other runtimes",
            "",
            f"Made by `python benchmarks/runtimes.py --threads {options.threads} --budget {options.budget:g} "
            f"--batch-size {options.batch_size} --markdown {options.markdown.name}`.",
            f"{here.processor}, {here.cpu_capability}; {here.threads} of {here.cores} CPUs; torch {here.torch}, timm "
            f"{here.timm}, ONNX Runtime {here.onnxruntime}, OpenVINO {here.openvino}, {here.system}; load "
            f"{here.load or 0:.2f} at the start.",
            "Ratios to the stock model in the same runtime: medians of paired rounds, with quartiles; random weights, "
            "fp32. `again` is a copy of the stock model: what noise alone does.",
            "",
            "| model | mode | runtime | MACs | converted | and deployed | again | rounds |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
