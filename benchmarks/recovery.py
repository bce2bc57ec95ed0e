"""How fast a converted Fashion-MNIST model comes back, with labels and without, from each start.

    python benchmarks/recovery.py vit qv --init wq,wq-refit,joint-svd,calibrated --epochs 2 --seeds 0,1,2 --data FOLDER
    python benchmarks/recovery.py vit qv --init calibrated --label-free --epochs 1 --data FOLDER

5,000 of the 60,000 training images are kept out to choose the weights that are kept; the 10,000 test images choose
nothing. Both are looked at `--looks` times an epoch. FOLDER holds the four .gz files. `--out` adds the runs to a file
that may hold others, and writes a Markdown table of all beside it.
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
from kept_runs import add_run
from torch import nn

from armour_surgery import convert
from armour_surgery.hosts.preprocessing import Preprocessing
from armour_surgery.images.sources import Pictures, held_out, open_pictures
from armour_surgery.measure.accuracy import choices, top_hits
from armour_surgery.recover.distributed import Process
from armour_surgery.recover.loading import evaluation_batches
from armour_surgery.recover.recipe_files import load_recipe
from armour_surgery.recover.student import evaluating
from armour_surgery.recover.teacher import Teacher
from armour_surgery.recover.timm_parts import training_transform
from armour_surgery.recover.trainer import Task, train

PREP = Preprocessing((1, 28, 28), (fashion_mnist.MEAN,), (fashion_mnist.STD,), crop_pct=1.0)
WEIGHTS = Path(__file__).with_name("weights")
ALONE = Process(0, 1, torch.device("cpu"))
TRAINING = 55_000
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
    parser.add_argument("--epochs", type=int, default=2, help="of 55,000 images (%(default)s)")
    parser.add_argument("--looks", type=int, default=2, help="at held-out and test images, an epoch (%(default)s)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--data", default=str(fashion_mnist.DATA))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery.json"))
    options = parser.parse_args()
    for init in options.init.split(","):
        for seed in map(int, options.seeds.split(",")):
            found = recover(options, init, seed)
            print(json.dumps(found), file=sys.stderr, flush=True)
            add_run(options.out, found, key, markdown)


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    return *map(str, kind(run)), run["seed"]


def kind(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["model"], run["mode"], run["label_free"], run["init"], run["epochs"], tuple(run["settings"])


def markdown(record: dict[str, Any]) -> str:
    here = record["environment"]
    lines = [
        f"{here['processor']}, {here['threads']} thread, torch {here['torch']}, timm {here['timm']}. Written by "
        "`benchmarks/recovery.py`. Top-1 on 10,000 test images in percent: the mean over seeds, and the lowest and the "
        'highest. Of the last epoch: the weights, and their moving average; "chosen" are those that 5,000 held-out '
        'images like best, at a standard error of 0.4 points. "Back after" is the first look, in epochs, at which '
        "the weights or their average are within 0.1 points of the baseline.",
        "",
        "| model | mode | labels | init | baseline | start | last | average | chosen | back after | epochs; seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in dict.fromkeys(map(kind, record["runs"])):
        runs = [run for run in record["runs"] if kind(run) == group]
        model, mode, free, init, epochs, settings = group
        told = f"{init} ({', '.join(settings)})" if settings else init
        seeds = ", ".join(str(run["seed"]) for run in runs)
        back = ", ".join(first_back(run) for run in runs)
        start, chosen = (over_seeds([run[key] for run in runs]) for key in ("start", "end"))
        ends = [list(run["test_by_epoch_and_of_the_average"].values())[-1] for run in runs]
        last, average = (over_seeds([end[place] for end in ends]) for place in (0, 1))
        cells = [model, mode, "none" if free else "yes", told, f"{runs[0]['baseline']:.2f}", start, last, average]
        cells += [chosen, back]
        lines.append("| " + " | ".join([*cells, f"{epochs}; {seeds}"]) + " |")
    return "\n".join(lines) + "\n"


def over_seeds(values: list[float]) -> str:
    middle = f"{sum(values) / len(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def first_back(run: dict[str, Any]) -> str:
    enough = run["baseline"] - 0.1
    if run["start"] >= enough:
        return "0"
    curve = run["test_by_epoch_and_of_the_average"].items()
    return next((epoch for epoch, scores in curve if max(scores) >= enough), "no")


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
    settings = [f"seed={seed}", f"data.images_per_epoch={TRAINING // options.looks}"]
    settings += [f"schedule.epochs={options.epochs * options.looks}"]
    settings += [
        "judge.keep=best",
        "schedule.warmup_epochs=0.1",
        *(LABEL_FREE if options.label_free else []),
        *options.settings,
    ]
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
    curve = {f"{int(row['epoch']) / options.looks:g}": [float(row["test"]), float(row["ema_test"])] for row in rows}
    return {
        "model": options.model,
        "mode": options.mode,
        "init": init,
        "seed": seed,
        "epochs": options.epochs,
        "settings": options.settings,
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
