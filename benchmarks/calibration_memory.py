r"""What calibrating a large model takes in memory beyond its weights: `convert(..., inplace=True)` block by block.

    python benchmarks/calibration_memory.py --blocks 4                         # ViT-g, float32
    python benchmarks/calibration_memory.py --blocks 4 --dtype bfloat16
    python benchmarks/calibration_memory.py --first-pass
    python benchmarks/calibration_memory.py --model vit_7b_patch16_dinov3 --dtype bfloat16 --depth 4 --blocks 2 \
        --images 96

Weights are random, since only sizes matter here; images are noise. With `--blocks` only the first so many blocks are
converted, and with `--depth` the model has fewer: every block takes what the first one takes. (Two at least: all of a
model is the block of a single attention.) The peak is that of the process's resident memory on Linux, counted from when
the model is there. `--first-pass` measures what is there for all blocks at once, before the first one is worked on: the
narrower projections, and output metrics. Appends a row to the JSON file, and writes Markdown beside it.
"""

import argparse
import contextlib
import importlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from calibrated_conversion import command, say
from torch import nn

from armour_surgery import convert
from armour_surgery.benchmarking.environment import environment
from armour_surgery.benchmarking.memory import held_bytes, peak_growth
from armour_surgery.measure.cost import count_params

ROOT = Path(__file__).parents[1]
MIB = 2**20
# `armour_surgery.initialize.calibrate` is the function.
CALIBRATE = importlib.import_module("armour_surgery.initialize.calibrate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_giant_patch14_dinov2", help="a ViT of timm (%(default)s)")
    parser.add_argument("--pixels", type=int, default=112)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--depth", type=int, help="blocks that the model has (its own number)")
    parser.add_argument("--blocks", type=int, help="convert only so many blocks (all)")
    parser.add_argument(
        "--first-pass", action="store_true", help="stop before the blocks, when the output metrics of all are known"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "calibration_memory.json")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
    rows.append({"command": command(None), "environment": environment().to_dict(), **measured(options)})
    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")


def measured(options: argparse.Namespace) -> dict[str, Any]:
    # What is loaded once and kept (libraries, their tables) is not what a calibration takes.
    convert(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64), "qv", init="calibrated", inplace=True)
    dtype = getattr(torch, options.dtype)
    model = random_model(options, dtype)
    largest = max(sum(tensor.numel() for tensor in block.parameters()) for block in model.blocks)
    weights, parameters, depth = held_bytes(model), count_params(model), len(model.blocks)
    widest = max(layer.in_features for layer in model.blocks[0].modules() if isinstance(layer, nn.Linear))
    include = None if options.blocks is None else [f"blocks.{number}.*" for number in range(options.blocks)]
    say(f"{options.model}: {parameters / 1e6:.0f} M parameters, {weights / MIB:.0f} MiB")
    found: dict[str, Any] = {}
    noise = torch.randn(options.images, 3, options.pixels, options.pixels, generator=torch.Generator().manual_seed(1))

    def calibrate() -> None:
        started = time.perf_counter()
        with stopped_after_first_pass() if options.first_pass else contextlib.nullcontext():
            convert(
                model,
                "qv",
                init="calibrated",
                calibration=noise.split(16),
                calibration_images=options.images,
                include=include,
                inplace=True,
            )
        found.update(seconds=time.perf_counter() - started)

    grown = peak_growth(calibrate, torch.device("cpu"))
    if grown is None:
        raise SystemExit("this system does not tell the peak of a process's memory; it needs Linux")
    row = {
        "model": options.model,
        "pixels": options.pixels,
        "images": options.images,
        "dtype": options.dtype,
        "blocks": depth if options.blocks is None else options.blocks,
        "depth": depth,
        "first_pass": options.first_pass,
        "parameters": parameters,
        "weights": weights,
        # A block is calibrated in float32.
        "block": 4 * largest,
        # One matrix of second moments of the widest layer's inputs, in float64.
        "moments": 8 * (widest + 1) ** 2,
        "beyond": grown,
        **found,
    }
    say(f"beyond the weights {grown / MIB:.0f} MiB, {row['seconds']:.0f} s")
    return row


class _Enough(Exception):
    """What is measured is over."""


@contextlib.contextmanager
def stopped_after_first_pass() -> Iterator[None]:
    """Inside, a calibration goes as far as to what it needs of all blocks at once."""
    note = CALIBRATE._note_errors

    def noted(*arguments: Any) -> None:
        note(*arguments)
        raise _Enough

    with contextlib.suppress(_Enough), patch.object(CALIBRATE, "_note_errors", noted):
        yield


def random_model(options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """A model with random weights, of which there is one copy from the start."""
    more = {} if options.depth is None else {"depth": options.depth}
    with torch.device("meta"):
        model = timm.create_model(options.model, img_size=options.pixels, **more)
    model = model.to(dtype).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            size = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 1
            parameter.normal_(generator=generator).mul_(size**-0.5 if parameter.ndim > 1 else 0.02)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and module.weight is not None:
                module.weight.fill_(1)
    for module in model.modules():
        # Tables that are computed, not learned (rotary positions), are not there after `to_empty`.
        if hasattr(module, "reset_parameters") and any(True for _ in module.buffers(recurse=False)):
            module.reset_parameters()
    return model


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Memory of a calibration, block by block",
        "",
        "`python benchmarks/calibration_memory.py`, one command a row. Weights are random, images noise, "
        "`convert(model, inplace=True)`; the peak of resident memory beyond what the model holds. A block is the "
        "largest one's weights in float32, and moments one matrix of second moments of the widest layer's inputs in "
        "float64.",
        "",
        "| model | pixels | images | weights | block | moments | beyond the weights | peak in models |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sizes = [f"{row[key] / MIB:,.0f} MiB" for key in ("weights", "block", "moments", "beyond")]
        peak = (row["weights"] + row["beyond"]) / row["weights"]
        done = "blocks, first pass alone" if row["first_pass"] else "blocks converted"
        name = f"{row['model']}, {row['dtype']}, {row['blocks']} of {row['depth']} {done}"
        cells = [name, str(row["pixels"]), str(row["images"]), *sizes, f"{peak:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    here = rows[-1]["environment"]
    return "\n".join([*lines, "", f"torch {here['torch']}, timm {here['timm']}, {here['system']}.", ""])


if __name__ == "__main__":
    main()
