"""Start every ImageNet recipe under torchrun with two processes, stop it, resume it: on generated images.

    python benchmarks/imagenet_recipes.py --steps 20 [--set run.precision=fp32] > imagenet_recipes.json

Only the batch is made small, and the teacher a small random ResNet; everything else is the recipe's, unless --set says
otherwise: a CPU without instructions for bfloat16 takes far longer in it than in fp32. What this shows is
that recipes run and resume. It says nothing about accuracy.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
from PIL import Image
from timm.models import save_for_hf

from armour_surgery.recover.recipe_files import load_recipe, recipe_names

CLASSES = 1000


def make_folder(root: Path, images: int) -> None:
    """`train/` with 1,000 classes and `val/` with the first 20 of them, one small photo-sized JPEG each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", CLASSES), ("val", 20)):
        for number in range(count):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            small = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
            for image in range(images):
                small.resize((280, 240), Image.Resampling.BICUBIC).save(folder / f"{image}.jpg")


def launch(recipe: str, model: str, arguments: list[str], out: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "armour_surgery", "finetune", model, "--recipe", recipe, "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--recipes", default=",".join(n for n in recipe_names() if n.startswith(("deit_", "levit_"))))
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_folder(root / "images", 1)
        save_for_hf(timm.create_model("resnet10t", num_classes=CLASSES), str(root / "teacher"), safe_serialization=True)
        for name in options.recipes.split(","):
            recipe = load_recipe(name)
            common = ["--data", str(root / "images")]
            for setting in [f"data.batch_size={options.batch_size}", "data.workers=1", "run.log_every=1"]:
                common += ["--set", setting]
            for setting in options.settings:
                common += ["--set", setting]
            common += ["--teacher", f"local-dir:{root / 'teacher'}"] if recipe.teacher else []
            out, began = root / name, time.perf_counter()
            half, whole = ([*common, "--set", f"schedule.max_steps={n}"] for n in (options.steps // 2, options.steps))
            launch(name, recipe.written_for, half, out)
            launch(name, recipe.written_for, [*whole, "--resume"], out)
            lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            assert [line["step"] for line in lines] == list(range(1, options.steps + 1))
            found.append({"recipe": name, "steps": len(lines), "first_loss": lines[0]["loss"]})
            found[-1] |= {"last_loss": lines[-1]["loss"], "seconds": round(time.perf_counter() - began)}
            print(found[-1], file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
