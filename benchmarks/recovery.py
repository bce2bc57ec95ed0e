"""How fast a converted Fashion-MNIST model comes back, with labels and without, from each start.

    python benchmarks/recovery.py vit qv --init wq,wq-refit,joint-svd,calibrated --epochs 2 --seeds 0,1,2 --data FOLDER
    python benchmarks/recovery.py vit qv --init calibrated --label-free --epochs 1 --data FOLDER

5,000 of the 60,000 training images are kept out to choose the weights that are kept; the 10,000 test images choose
nothing. Test accuracy is told after every fifth of an epoch (11,000 images). FOLDER holds the four .gz files.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fashion_mnist
import torch
from torch import nn

from armour_surgery import convert
from armour_surgery.hosts.preprocessing import Preprocessing
from armour_surgery.measure.accuracy import choices, top_hits
from armour_surgery.recover.data import Pictures, held_out, open_pictures
from armour_surgery.recover.distillation import Teacher
from armour_surgery.recover.distributed import Process
from armour_surgery.recover.loading import evaluation_batches
from armour_surgery.recover.recipe_files import load_recipe
from armour_surgery.recover.student import evaluating
from armour_surgery.recover.timm_parts import training_transform
from armour_surgery.recover.trainer import Task, train

PREP = Preprocessing((1, 28, 28), (fashion_mnist.MEAN,), (fashion_mnist.STD,), crop_pct=1.0)
WEIGHTS = Path(__file__).with_name("weights")
ALONE = Process(0, 1, torch.device("cpu"))
FIFTH = 11_000
LABEL_FREE = ["loss.labels=0", "loss.smoothing=0", "loss.logits=1", "loss.features=1", "loss.blocks=0.5"]


def accuracy(run: Any, pictures: Pictures) -> float:
    made = choices(run, evaluation_batches(pictures, PREP.tensor, 250))
    return 100 * top_hits(made)[0] / len(made.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=fashion_mnist.MODELS)
    parser.add_argument("mode")
    parser.add_argument("--init", default="calibrated")
    parser.add_argument("--label-free", action="store_true")
    parser.add_argument("--epochs", type=float, default=2.0, help="of 55,000 images; a multiple of 0.2")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--data", default=str(fashion_mnist.DATA))
    options = parser.parse_args()
    results = []
    for init in options.init.split(","):
        for seed in map(int, options.seeds.split(",")):
            results.append(recover(options, init, seed))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"model": options.model, "mode": options.mode, "runs": results}, indent=1))


def recover(options: argparse.Namespace, init: str, seed: int) -> dict[str, Any]:
    """One conversion, and one run by the recipe; test accuracies in percent by images seen."""
    original = fashion_mnist.load(options.model, WEIGHTS / f"fashion_{options.model}.safetensors").eval()
    train_images = open_pictures(options.data, "train", size=PREP.size, labelled=True)
    test = open_pictures(options.data, "val", size=PREP.size, labelled=True)
    training, judged = held_out(train_images, 5000)
    example = (2, 1, 28, 28)
    if init == "calibrated":
        some = (PREP.tensor(training.read(index)[0]) for index in range(512))
        batches = [torch.stack([next(some) for _ in range(64)]) for _ in range(8)]
        converted = convert(original, options.mode, init=init, calibration=batches, example_input=example)
    else:
        converted = convert(original, options.mode, init=init, example_input=example)
    settings = [f"seed={seed}", f"data.images_per_epoch={FIFTH}", f"schedule.epochs={round(options.epochs * 5)}"]
    settings += ["schedule.warmup_epochs=0.5", *(LABEL_FREE if options.label_free else []), *options.settings]
    settings += ["judge.metric=agreement"] if options.label_free else []
    recipe = load_recipe("fashion_mnist_recover", settings)
    for module in [*converted.modules(), *original.modules()]:
        # On CPUs the fused kernel's backward is slower than plain attention.
        if hasattr(module, "fused_attn"):
            module.fused_attn = False

    def judge(runner: nn.Module) -> Mapping[str, float]:
        with evaluating(runner):
            logits = lambda images: runner(images).logits  # noqa: E731
            held = accuracy(logits, judged)
            if options.label_free:
                # Without labels the original's choices are the labels.
                same = choices(logits, evaluation_batches(judged, PREP.tensor, 250)).top[:, 0]
                held = 100 * float((same == wanted).double().mean())
            return {recipe.metric: held, "test": accuracy(logits, test)}

    with torch.no_grad():
        baseline = accuracy(original, test)
        wanted = choices(original, evaluation_batches(judged, PREP.tensor, 250)).top[:, 0]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        task = Task(
            converted,
            recipe,
            training,
            training_transform(PREP, recipe.augment),
            judge,
            Path(out),
            teacher=Teacher(original),
            sites=tuple(site.fqn for site in converted.surgery.sites),
            classes=10,
        )
        outcome = train(task, ALONE)
        with (Path(out) / "summary.csv").open(encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    curve = {str(round(int(row["epoch"]) / 5, 1)): [float(row["test"]), float(row["ema_test"])] for row in rows}
    return {
        "init": init,
        "seed": seed,
        "label_free": options.label_free,
        "baseline": baseline,
        "start": outcome.start["test"],
        "end": outcome.end["test"],
        "kept": outcome.kept,
        "average": outcome.average,
        "test_by_epoch_and_of_the_average": curve,
        "seconds": round(time.perf_counter() - began),
    }


if __name__ == "__main__":
    main()
