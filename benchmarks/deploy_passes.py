"""How much faster `deploy` makes a model on the CPU of this machine: each pass alone, all together, and after surgery.

    python benchmarks/deploy_passes.py --rounds 80
    python benchmarks/deploy_passes.py --rounds 60 --compiled --out benchmarks/results/deploy_passes_compiled.json
        --models deit_tiny_patch16_224 levit_128s deit_small_patch16_224 deit_base_patch16_224
    python benchmarks/deploy_passes.py --rounds 40 --each-pass --out benchmarks/results/deploy_each_pass.json
        --models deit_tiny_patch16_224 levit_128s

For each model, in eager mode: the stock model against itself (what this machine's noise alone does), against all
passes that pay, and against its conversions with and without them. With --each-pass, against each pass alone
instead, run also where `deploy` would leave it out because it does not pay. With --compiled, what is compared goes
through torch.compile.
Every deployed model, compiled if it is, is first compared with the one it came from, in float32: the largest
difference of its outputs on noise, relative to the largest output, is in the table. A second table holds conversions
against the original, as they are and both deployed, beside what the MACs say. Models are timed in turns and freed
memory is kept (see benchmarking/speed.py). Weights are random: they do not change the time. Writes JSON and,
beside it, a Markdown table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from armour_surgery import convert, deploy
from armour_surgery.benchmarking.speed import compare, keep_memory, many_compiled
from armour_surgery.deployment import PASSES
from armour_surgery.errors import NothingToDeployError
from armour_surgery.hosts import load_model
from armour_surgery.measure.cost import count_macs
from armour_surgery.measure.difference import largest_difference

BATCH_SIZE = 16
BUDGET_S = 420.0  # Of one model with all that is compared with it: DeiT-B gets fewer rounds.
IMAGE = (3, 224, 224)
MODELS = {
    "deit_tiny_patch16_224": ("qv",),
    "deit_small_patch16_224": ("qv",),
    "deit_base_patch16_224": ("qv",),
    "levit_128s": ("concat-half", "concat-full"),
    "levit_128": ("concat-half", "concat-full"),
    "levit_192": ("concat-half", "concat-full"),
    "levit_256": ("concat-half", "concat-full"),
    "levit_384": ("concat-half", "concat-full"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="6 rounds, batch 4")
    parser.add_argument("--each-pass", action="store_true", help="each pass alone, and no conversions")
    parser.add_argument("--compiled", action="store_true", help="after torch.compile, not in eager mode")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (an even number)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/deploy_passes.json"))
    options = parser.parse_args(arguments)
    batch_size, rounds = (4, options.rounds or 6) if options.quick else (BATCH_SIZE, options.rounds or 40)

    kept = keep_memory()
    results: list[dict[str, Any]] = []
    for name in options.models:
        results.append(run(name, options.compiled, options.each_pass, batch_size, rounds))
        write(results, options.out, kept)
    print(options.out.with_suffix(".md").read_text(encoding="utf-8"))


def run(name: str, compiled: bool, each_pass: bool, batch_size: int, rounds: int) -> dict[str, Any]:
    host = _with_statistics(load_model(name, pretrained=False)[0])
    models: dict[str, nn.Module] = {name: host, f"{name} again": host}
    origins: dict[str, nn.Module] = {}

    def add(label: str, model: nn.Module, passes: tuple[str, ...] | None) -> None:
        try:
            deployed = deploy(model, passes=passes, compiled=compiled)
        except NothingToDeployError:
            return
        models[label] = deployed
        origins[label] = model

    for one in PASSES if each_pass else ():
        add(one, host, (one,))
    add("deploy", host, None)
    modes = () if each_pass else MODELS[name]
    for mode in modes:
        models[mode] = convert(host, mode).eval()
        add(f"{mode} + deploy", models[mode], None)
    macs = {
        label: count_macs(model, {"x": torch.empty(1, *IMAGE, device="meta")}).macs for label, model in models.items()
    }
    print(f"{name}{', compiled' if compiled else ''}: {', '.join(list(models)[2:])}", file=sys.stderr, flush=True)
    if compiled:
        models = {label: torch.compile(model, dynamic=False) for label, model in models.items()}
    with many_compiled():
        with torch.inference_mode():
            noise = torch.randn(batch_size, *IMAGE)
            errors = {}
            for label, origin in origins.items():
                errors[label] = largest_difference([origin(noise)], [models[label](noise)])
        report = compare(models, lambda: torch.randn(batch_size, *IMAGE), rounds=rounds, budget_s=BUDGET_S)
    return {
        "model": name,
        "kind": "torch.compile" if compiled else "eager",
        "macs": macs,
        "errors": errors,
        **report.to_dict(),
        "conversions": [
            {"deployed": a == "deploy", **report.pair(a, b).to_dict()}
            for mode in modes
            for a, b in ((name, mode), ("deploy", f"{mode} + deploy"))
        ],
    }


def _with_statistics(model: nn.Module) -> nn.Module:
    """The model in eval mode, with statistics and scales that are not ones and zeros, as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0.0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.1, generator=generator)
    model.eval()
    return model


def write(results: Sequence[dict[str, Any]], out: Path, kept: bool) -> None:
    """Write `out` (JSON) and the same name with .md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"memory_kept": kept, "comparisons": list(results)}, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(results, kept), encoding="utf-8")


def markdown(results: Sequence[dict[str, Any]], kept: bool) -> str:
    here = results[0]["environment"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, torch {here['torch']}, timm {here['timm']}, "
        f"{here['system']}, batch {results[0]['batch_size']}, inference mode, random weights, freed memory "
        f"{'kept' if kept else 'given back'}. Speed-ups over the stock model in eval mode.",
        "",
        "| model | run as | what | MACs saved | median speed-up | middle half of the rounds | rounds | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        stock = result["macs"][result["model"]]
        for pair in result["pairs"]:
            label = pair["b"]
            error = result["errors"].get(label)
            cells: list[Any] = [
                result["model"],
                result["kind"],
                "itself" if label.endswith(" again") else label,
                f"{1 - result['macs'][label] / stock:.1%}",
                f"{pair['speedup']:.3f}",
                "{:.3f} to {:.3f}".format(*pair["speedup_iqr"]),
                pair["rounds"],
                "" if error is None else f"{error:.0e}",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    if not any(result["conversions"] for result in results):
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "What conversion alone makes of it. The last column is the speed-up over what the ratio of MACs promises.",
        "",
        "| model | run as | mode | both deployed | ratio of MACs | median speed-up | interval | of the MACs' ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for pair in result["conversions"]:
            ratio = result["macs"][pair["a"]] / result["macs"][pair["b"]]
            cells = [
                result["model"],
                result["kind"],
                pair["b"].removesuffix(" + deploy"),
                "yes" if pair["deployed"] else "no",
                f"{ratio:.3f}",
                f"{pair['speedup']:.3f}",
                "{:.3f} to {:.3f}".format(*pair["speedup_interval"]) if pair["speedup_interval"] else "",
                f"{pair['speedup'] / ratio:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
