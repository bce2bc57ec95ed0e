"""The order of the paper's Table 1, tried small: every way of sharing trained from scratch by one recipe.

    python benchmarks/from_scratch.py --epochs 6 --seeds 0,1 --data FOLDER

A ViT of 4 blocks on Fashion-MNIST, by the shipped recipe `fashion_mnist_vit` with fewer epochs and a smaller network;
`armour-surgery finetune` runs it as a user would. Seeds and orders of images are the same for all modes. The test
images are looked at once, at the end: the last weights and their moving average are told, no choice is made. FOLDER
holds the four .gz files. `--out` adds the runs to a file that may hold others.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import fashion_mnist
from kept_runs import add_run

MODES = ("baseline", "qv", "kv", "qk", "qk-diag")
NETWORK = "{img_size: 28, patch_size: 4, in_chans: 1, num_classes: 10, embed_dim: 64, depth: 4, num_heads: 2, "
NETWORK += "mlp_ratio: 2.0}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=60_000, help="of an epoch (%(default)s)")
    parser.add_argument("--data", default=str(fashion_mnist.DATA))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/from_scratch.json"))
    options = parser.parse_args()
    for seed in map(int, options.seeds.split(",")):
        for mode in options.modes.split(","):
            found = one_run(options, mode, seed)
            print(json.dumps(found), file=sys.stderr, flush=True)
            add_run(options.out, found, key, markdown, network=NETWORK)


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["epochs"], run["images"], MODES.index(run["mode"]), run["seed"]


def one_run(options: argparse.Namespace, mode: str, seed: int) -> dict[str, Any]:
    """Train, and read what the last row of the run's summary says."""
    settings = [f"model.args={NETWORK}", f"seed={seed}", f"schedule.epochs={options.epochs}", "run.precision=fp32"]
    settings += [f"data.images_per_epoch={options.images}", f"judge.every={options.epochs}"]
    settings += [] if mode == "baseline" else [f"model.mode={mode}"]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "armour_surgery", "finetune", "vit_tiny_patch16_224"]
        command += ["--recipe", "fashion_mnist_vit", "--data", options.data, "--out", str(out), "--json"]
        for setting in settings:
            command += ["--set", setting]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{mode}: {done.stderr}")
        with (out / "summary.csv").open(encoding="utf-8") as stream:
            last = list(csv.DictReader(stream))[-1]
    return {
        "mode": mode,
        "seed": seed,
        "epochs": options.epochs,
        "images": options.images,
        "test": float(last["top1"]),
        "average": float(last["ema_top1"]),
        "loss": float(last["loss"]),
        "seconds": round(time.perf_counter() - began),
    }


def markdown(record: dict[str, Any]) -> str:
    here, runs = record["environment"], record["runs"]
    lines = [
        f"{here['processor']}, {here['threads']} thread, torch {here['torch']}, timm {here['timm']}. Written by "
        "`benchmarks/from_scratch.py`.",
        "",
        "Fashion-MNIST from scratch, top-1 on 10,000 test images in percent: the mean over seeds, and each of them.",
        "",
        "| epochs | images each | mode | last weights | their moving average | training loss |",
        "|---|---|---|---|---|---|",
    ]
    for epochs, images, mode in dict.fromkeys((run["epochs"], run["images"], run["mode"]) for run in runs):
        mine = [run for run in runs if (run["epochs"], run["images"], run["mode"]) == (epochs, images, mode)]
        cells = []
        for key, digits in (("test", 2), ("average", 2), ("loss", 4)):
            values = [run[key] for run in mine]
            cells.append(f"{mean(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})")
        lines.append(f"| {epochs} | {images:,} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
