"""What `deploy` changes in trained models: their outputs, and how many test images they get right.

    python benchmarks/deploy_accuracy.py --data FOLDER [--dinov2 dinov2.safetensors]
        [--out benchmarks/results/deploy_accuracy.json]

The Fashion-MNIST ViT and LeViT of benchmarks/weights, as they are and calibrated with 512 training images, on the
10,000 test images (FOLDER holds the four .gz files): top-1, the images whose class changes, and the largest difference
of the logits relative to the largest logit, in float32, with every pass and with those that pay. With --dinov2
(benchmarks/dinov2_weights.py) the same of the features that a real DINOv2-S, from timm and from transformers, gives 64
of these images, and of its conversion. Writes JSON and, beside it, a Markdown table.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dinov2_weights
import fashion_mnist
import torch
from feature_quality import gray_batches
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from armour_surgery import convert, deploy
from armour_surgery.deployment import PASSES
from armour_surgery.measure.difference import largest_difference

WEIGHTS = Path(__file__).with_name("weights")
CALIBRATION = 512
FEATURES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion_mnist.DATA)
    parser.add_argument("--dinov2", type=Path, help="the file that benchmarks/dinov2_weights.py writes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/deploy_accuracy.json"))
    options = parser.parse_args()

    rows = list(fashion(options.data))
    if options.dinov2:
        rows += dinov2(options.data, options.dinov2)
    record = {"torch": torch.__version__, "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))


def fashion(data: Path) -> Iterator[dict[str, Any]]:
    seen = fashion_mnist.normalize(fashion_mnist.read_split(data, "train")[0][:CALIBRATION]).split(64)
    images, labels = fashion_mnist.read_split(data, "test")
    batches = fashion_mnist.normalize(images).split(500)
    for name in ("vit", "levit"):
        stock = fashion_mnist.load(name, WEIGHTS / f"fashion_{name}.safetensors")
        modes = ("qv",) if name == "vit" else ("concat-half", "concat-full")
        converted = {mode: convert(stock, mode, init="calibrated", calibration=seen) for mode in modes}
        for label, model in {"as it is": stock, **converted}.items():
            yield from compare(
                f"Fashion-MNIST {name}", label, model, lambda model: torch.cat(list(map(model, batches))), labels
            )


def dinov2(data: Path, weights: Path) -> Iterator[dict[str, Any]]:
    images = fashion_mnist.read_split(data, "test")[0][:FEATURES]
    batches = list(gray_batches(images, dinov2_weights.IMAGE_SIZE, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, 16))
    for host, model in (
        ("timm", dinov2_weights.timm_model(weights)),
        ("transformers", dinov2_weights.transformers_model(weights)),
    ):
        for label, one in {"as it is": model, "qv": convert(model, "qv")}.items():
            yield from compare(
                f"DINOv2-S, {host}", label, one, lambda model: torch.cat([tokens(model, batch) for batch in batches])
            )


def tokens(model: nn.Module, batch: Tensor) -> Tensor:
    found = model(batch)
    return found if isinstance(found, Tensor) else found.last_hidden_state


def compare(
    name: str, label: str, model: nn.Module, outputs: Callable[[nn.Module], Tensor], labels: Tensor | None = None
) -> Iterator[dict[str, Any]]:
    """A row for the passes that pay, and one for all of them; with labels, top-1 in percent before and after."""
    print(f"{name}, {label}", file=sys.stderr, flush=True)
    with torch.inference_mode():
        expected = outputs(model.eval())
        for passes in (None, PASSES):
            deployed = deploy(model, passes=passes)
            found = outputs(deployed)
            error = largest_difference([expected], [found])
            row: dict[str, Any] = {
                "model": name,
                "what": label,
                "passes": "all" if passes else "that pay",
                "error": error,
            }
            if labels is not None:
                row["top1"] = [100 * float((given.argmax(1) == labels).float().mean()) for given in (expected, found)]
                row["changed"] = int((found.argmax(1) != expected.argmax(1)).sum())
            yield row


def markdown(record: dict[str, Any]) -> str:
    lines = [
        f"Written by `benchmarks/deploy_accuracy.py`, torch {record['torch']}, float32. Errors are relative to the "
        "largest output.",
        "",
        "| model | what | passes | largest error | top-1 before and after, % | classes that changed |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        scored = "{:.2f}, {:.2f}".format(*row["top1"]) if "top1" in row else ""
        cells = [row["model"], row["what"], row["passes"], f"{row['error']:.0e}", scored, str(row.get("changed", ""))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
