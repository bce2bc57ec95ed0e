"""Armour beside what else makes a trained ViT smaller or faster, and together with it: in one run, on one machine.

    pip install torchao torch-pruning
    pip install --no-deps git+https://github.com/facebookresearch/ToMe
    python benchmarks/peers.py --data FOLDER [--quick] [--out benchmarks/results/peers.json]

Two models: the trained Fashion-MNIST ViT of benchmarks/weights, where accuracy counts (top-1 on the 10,000 test images,
FOLDER holds the four .gz files), and DeiT-Ti at 224 pixels with random weights, where only time does. Nothing is
trained: `qv` is calibrated with 512 training images, which Torch-Pruning's Taylor scores see too, with their labels.
On the ViT, ToMe merges as many tokens, and Torch-Pruning takes as many hidden channels of the MLPs, as leave the
accuracy within `--lost` points of the original's, found with the same test images, which favors both. On DeiT-Ti, ToMe
merges 13 tokens a block (as its paper does) and Torch-Pruning goes down to the parameters of `qv`; dynamic int8, ten
times slower than float32 on processors without instructions for it, is left to the ViT.

Models are timed in turns, eager and compiled, against the stock model. What is not installed is left out and named,
what does not compile is said so. Writes JSON and, beside it, a Markdown table; a model that is not among --models
keeps what is in the file already.
"""

import argparse
import copy
import io
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fashion_mnist
import torch
import torch.nn.functional as F
from mlp_rivals import taylor_step
from torch import Tensor, nn

from armour_surgery import convert, deploy
from armour_surgery.benchmarking.speed import compare, keep_memory, many_compiled
from armour_surgery.hosts import load_model
from armour_surgery.measure.cost import count_params

WEIGHTS = Path(__file__).with_name("weights")
PACKAGES = {"torchao": "torchao", "tome": "tome", "torch_pruning": "torch-pruning"}
CALIBRATION = 512
TOME_PAPER = 13


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 rounds, eager only")
    parser.add_argument("--models", nargs="+", choices=list(HOSTS), default=list(HOSTS), help="both")
    parser.add_argument("--lost", type=float, default=0.2, help="points that ToMe and pruning may lose (%(default)s)")
    parser.add_argument("--data", type=Path, default=fashion_mnist.DATA)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    options = parser.parse_args()

    keep_memory()
    # They warn of what they themselves call.
    warnings.filterwarnings("ignore", module="torchao|torch_pruning|torch")
    installed = {name: version(package) for name, package in PACKAGES.items() if find_spec(name)}
    for name in PACKAGES.keys() - installed.keys():
        print(f"{PACKAGES[name]} is not installed and is left out", file=sys.stderr)
    results = json.loads(options.out.read_text(encoding="utf-8"))["results"] if options.out.exists() else []
    for chosen in options.models:
        name, models, accuracies, images = HOSTS[chosen](options, installed)
        found = {"model": name, "batch_size": len(images), "rows": []}
        eager, report = speeds(models, images, options.quick, compiled=False)
        compiled = {} if options.quick else speeds(models, images, options.quick, compiled=True)[0]
        for label, model in models.items():
            row = {"what": label, "top1": accuracies.get(label), "stored_mib": stored_bytes(model) / 2**20}
            found["rows"].append(row | {"eager": eager.get(label), "compiled": compiled.get(label)})
        results = [one for one in results if one["model"] != name] + [
            found | {"environment": report.environment.to_dict()}
        ]
        record = {"installed": installed, "lost": options.lost, "quick": options.quick, "results": results}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    print(options.out.with_suffix(".md").read_text(encoding="utf-8"))


def on_fashion_mnist(
    options: argparse.Namespace, installed: Mapping[str, str]
) -> tuple[str, dict[str, nn.Module], dict[str, float], Tensor]:
    """The trained ViT: models, their accuracies in percent, and a batch to time them with."""
    stock = fashion_mnist.load("vit", WEIGHTS / "fashion_vit.safetensors")
    images, labels = fashion_mnist.read_split(options.data, "train")
    test = fashion_mnist.read_split(options.data, "test")
    seen = fashion_mnist.normalize(images[:CALIBRATION])

    def top1(model: nn.Module) -> float:
        return 100 * fashion_mnist.accuracy(model, *test)

    least = top1(stock) - options.lost
    converted = convert(stock, "qv", init="calibrated", calibration=seen.split(64)).eval()
    models = ours(stock, converted) | (quantized(stock, converted) if "torchao" in installed else {})
    if "tome" in installed:
        number, model = most(range(1, 17), lambda number: merge_tokens(stock, number), top1, least)
        models |= {f"ToMe, {number} tokens a block": model} if number else {}
    if "torch_pruning" in installed:
        make = lambda percent: prune(stock, percent / 100, seen, labels[:CALIBRATION])  # noqa: E731
        percent, model = most(range(1, 95), make, top1, least)
        models |= {f"Torch-Pruning, {percent} % of the MLPs": model} if percent else {}
    return "Fashion-MNIST ViT", models, {name: top1(model) for name, model in models.items()}, seen[:64]


def on_deit(
    options: argparse.Namespace, installed: Mapping[str, str]
) -> tuple[str, dict[str, nn.Module], dict[str, float], Tensor]:
    """DeiT-Ti at 224 pixels: no accuracies, the weights are random."""
    torch.manual_seed(0)
    stock = load_model("deit_tiny_patch16_224", pretrained=False)[0].eval()
    converted = convert(stock, "qv").eval()
    models = ours(stock, converted)
    if "torchao" in installed:
        models |= {name: model for name, model in quantized(stock, converted).items() if "dynamic" not in name}
    images = torch.randn(16, 3, 224, 224)
    if "tome" in installed:
        models[f"ToMe, {TOME_PAPER} tokens a block"] = merge_tokens(stock, TOME_PAPER)
    if "torch_pruning" in installed:
        hidden = stock.blocks[0].mlp.fc1
        channel = len(stock.blocks) * (2 * hidden.in_features + 1)
        share = (count_params(stock) - count_params(converted)) / channel / hidden.out_features
        model = prune(stock, share, images[:2], torch.tensor([0, 1]))
        models[f"Torch-Pruning, {share:.0%} of the MLPs"] = model
    return "DeiT-Ti, 224 pixels, random weights", models, {}, images


HOSTS = {"vit": on_fashion_mnist, "deit": on_deit}


def ours(stock: nn.Module, converted: nn.Module) -> dict[str, nn.Module]:
    unfused = copy.deepcopy(stock)
    for block in unfused.get_submodule("blocks"):
        block.attn.fused_attn = False
    return {
        "stock": stock,
        "stock again": copy.deepcopy(stock),
        "timm's fused_attn off": unfused,
        "qv": converted,
        "deploy": deploy(stock),
        "qv + deploy": deploy(converted),
    }


def quantized(stock: nn.Module, converted: nn.Module) -> dict[str, nn.Module]:
    """torchao's int8, of the weights alone and of both sides of a product, before and after Armour."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    models = {}
    for label, settings in (
        ("int8 weights", Int8WeightOnlyConfig()),
        ("int8 dynamic", Int8DynamicActivationInt8WeightConfig()),
    ):
        for name, model in (("", stock), ("qv + ", converted)):
            models[name + label] = copy.deepcopy(model)
            quantize_(models[name + label], settings)
    return models


def merge_tokens(stock: nn.Module, number: int) -> Any:
    import tome

    model: Any = copy.deepcopy(stock)
    tome.patch.timm(model)
    model.r = number
    return model


def prune(stock: nn.Module, share: float, images: Tensor, labels: Tensor) -> nn.Module:
    """Without that share of the hidden channels of all MLPs, chosen over all blocks together by Taylor scores."""
    model: Any = copy.deepcopy(stock)
    F.cross_entropy(model(images), labels).backward()
    taylor_step(model, images[:1], share)
    model.zero_grad(set_to_none=True)
    assert count_params(model) < count_params(stock)
    return model.eval()


def most(
    numbers: range, make: Callable[[int], nn.Module], top1: Callable[[nn.Module], float], least: float
) -> tuple[int, nn.Module]:
    """By bisection the largest number whose model still has that accuracy, and the model; 0 where none has."""
    held: tuple[int, nn.Module] = (0, nn.Identity())
    low, high = 0, len(numbers)
    while low < high:
        middle = (low + high) // 2
        model = make(numbers[middle])
        if top1(model) >= least:
            held, low = (numbers[middle], model), middle + 1
        else:
            high = middle
    return held


def speeds(models: Mapping[str, nn.Module], images: Tensor, quick: bool, compiled: bool) -> tuple[dict[str, Any], Any]:
    """How much faster than the first, by name; without those that do not compile."""
    runs: dict[str, Callable[[Tensor], Any]] = {}
    with many_compiled():
        for label, model in models.items():
            run = torch.compile(model, dynamic=False) if compiled else model
            try:
                with torch.inference_mode():
                    run(images)
            except Exception as error:
                # Compilers raise whatever they run into.
                print(f"{label} does not run: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            else:
                runs[label] = run
        rounds = 4 if quick else 60
        report = compare(runs, lambda: torch.randn_like(images), rounds=rounds, budget_s=150.0)
    return {pair.b: pair.to_dict() for pair in report.pairs}, report


def stored_bytes(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return len(buffer.getvalue())


def markdown(record: dict[str, Any]) -> str:
    here = record["results"][0]["environment"]
    installed = ", ".join(f"{PACKAGES[name]} {found}" for name, found in record["installed"].items())
    lines = [
        f"{here['processor']}, {here['threads']} threads, torch {here['torch']}, timm {here['timm']}, {installed}. "
        "Written by `benchmarks/peers.py`. Speed-ups over the stock model run in the same way (eager over eager, "
        "compiled over compiled), median of the paired rounds and its 99 % interval. Nothing was trained.",
    ]
    for result in record["results"]:
        scored = any(row["top1"] is not None for row in result["rows"])
        lines += ["", f"**{result['model']}**, batch {result['batch_size']}", ""]
        lines.append(f"| what |{' top-1, % |' if scored else ''} stored, MiB | eager | compiled |")
        lines.append("|---|---|---|---|" + ("---|" if scored else ""))
        for row in result["rows"]:
            cells = [row["what"], *([f"{row['top1']:.2f}"] if scored else []), f"{row['stored_mib']:.2f}"]
            for way in ("eager", "compiled"):
                cells.append(speed_cell(row[way], row["what"] == "stock"))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def speed_cell(pair: dict[str, Any] | None, first: bool) -> str:
    if pair is None:
        return "1" if first else "did not run"
    interval = pair["speedup_interval"]
    return f"{pair['speedup']:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


if __name__ == "__main__":
    main()
