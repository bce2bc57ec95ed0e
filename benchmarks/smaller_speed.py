"""How much faster a model is that was made smaller with `--mlp`, beside the ratio of its MACs.

    python benchmarks/smaller_speed.py [--params P] [--budget S] [--markdown FILE.md]

DeiT-S with random weights, which change no speed but decide which channels go; batch 1, two threads. The stock model
and the smaller one take turns (`armour_surgery.benchmark`).
"""

import argparse
from pathlib import Path

import timm
import torch

from armour_surgery import benchmark, convert
from armour_surgery.benchmarking.speed import keep_memory

RUNTIMES = ("torch", "compile", "onnx", "openvino")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", default="-25%", help="how many parameters go")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing in each runtime")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    keep_memory()
    torch.manual_seed(0)
    stock = timm.create_model("deit_small_patch16_224").eval()
    images = [torch.randn(8, 3, 224, 224) for _ in range(3)]
    small = convert(stock, "qv", init="calibrated", calibration=images, params=options.params, mlp=True)
    rows = []
    for runtime in RUNTIMES:
        measured = benchmark(
            {"stock": stock, "smaller": small},
            batch_sizes=(1,),
            runtime=runtime,
            threads=2,
            budget_s=options.budget,
            rounds=400,
            keep_freed_memory=True,
        )
        pair, (before, after) = measured.largest.pairs[0], (cost.macs for cost in measured.costs)
        ratio = before / after
        low, high = pair.speedup_iqr
        cells = [
            runtime,
            f"{ratio:.3f}",
            f"{pair.speedup:.3f} ({low:.3f} to {high:.3f})",
            f"{pair.speedup / ratio:.3f}",
        ]
        rows.append(f"| {' | '.join([*cells, f'{measured.largest.noise.speedup:.3f}'])} |")
        print(rows[-1], flush=True)
    if options.markdown is None:
        return
    here, surgery = measured.environment, small.surgery
    text = [
        "# Speed of a smaller DeiT-S",
        "",
        f"Made by `python benchmarks/smaller_speed.py --params {options.params} --budget {options.budget:g} --markdown "
        f"{options.markdown}`: {surgery.params_before:,} -> {surgery.params_after:,} parameters, {len(surgery.sites)} "
        f"attentions `qv`, {len(surgery.mlps)} MLPs narrower. {here.processor}, {here.threads} of {here.cores} CPUs, "
        f"torch {here.torch}, timm {here.timm}, ONNX Runtime {here.onnxruntime}, OpenVINO {here.openvino}.",
        "",
        "| runtime | ratio of MACs | speed-up, quartiles | of the MACs' ratio | stock model again |",
        "|---|---:|---:|---:|---:|",
        *rows,
    ]
    options.markdown.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
