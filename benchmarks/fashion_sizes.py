"""How small the Fashion-MNIST models may get: accuracy by size without training, and after a recipe with labels.

    python benchmarks/fashion_sizes.py
    python benchmarks/fashion_sizes.py --epochs 2 --only vit:45,levit:20,levit:30

`convert(params=..., mlp=True, rank="auto", init="calibrated")` on 512 training images, without labels; then, with
`--epochs`, the recipe `fashion_mnist_recover` with labels and the original as teacher. Top-1 on all 10,000 test images,
which choose nothing: the recipe keeps its last weights. `--data` names the folder of the four .gz files. What is
measured is added to `--out`, and a Markdown table of all is written beside it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fashion_mnist
from calibrated_conversion import command, heading, say
from recovery import ALONE, PREP, accuracy
from torch import Tensor, nn

from armour_surgery import convert, sensitivities
from armour_surgery.benchmarking.environment import environment
from armour_surgery.copies import full_copy
from armour_surgery.images.sources import held_out, open_pictures
from armour_surgery.recover.recipe_files import load_recipe
from armour_surgery.recover.student import evaluating
from armour_surgery.recover.teacher import Teacher
from armour_surgery.recover.timm_parts import training_transform
from armour_surgery.recover.trainer import Task, train

ROOT = Path(__file__).parents[1]
SIZES = {"vit": (15, 25, 33, 45, 60, 70), "levit": (10, 20, 27)}
IMAGES = 512
EXAMPLE = (2, 1, 28, 28)
RECIPE = "fashion_mnist_recover"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion_mnist.DATA, help="folder of Fashion-MNIST's .gz files")
    parser.add_argument("--only", default="", help="MODEL:PERCENT, several by commas; without it all")
    parser.add_argument("--epochs", type=int, default=0, help="of the recipe with labels (%(default)s: none)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fashion_sizes.json")
    options = parser.parse_args(arguments)
    every = [f"{name}:{size}" for name, sizes in SIZES.items() for size in sizes]
    chosen = options.only.split(",") if options.only else every
    record = earlier(options.out)
    record["environment"] = environment().to_dict()
    for name in dict.fromkeys(one.partition(":")[0] for one in chosen):
        sizes = [int(one.partition(":")[2]) for one in chosen if one.startswith(f"{name}:")]
        for row in measured(name, sizes, options):
            row["command"] = command(arguments)
            rows = record["rows"]
            rows[:] = [other for other in rows if key(other) != key(row)] + [row]
            rows.sort(key=key)
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            options.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")


def earlier(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"rows": []}
    return found


def key(row: dict[str, Any]) -> tuple[bool, int, int]:
    return row["model"] == "levit", row["size"], row["epochs"]


def measured(name: str, sizes: Sequence[int], options: argparse.Namespace) -> Any:
    """A row for every size, without training or with it."""
    original = fashion_mnist.load(name, ROOT / "benchmarks" / "weights" / f"fashion_{name}.safetensors").eval()
    test = fashion_mnist.read_split(options.data, "test")
    images = fashion_mnist.normalize(fashion_mnist.read_split(options.data, "train")[0][:IMAGES])
    given: dict[str, Any] = {
        "calibration": list(images.split(64)),
        "calibration_images": IMAGES,
        "mlp": True,
        "rank": "auto",
        "example_input": EXAMPLE,
    }
    before = 100 * fashion_mnist.accuracy(original, *test)
    say(f"{name}: {before:.2f} %")
    # Once for all sizes.
    found = sensitivities(original, **given)
    for size in sizes:
        began = time.perf_counter()
        small = convert(original, init="calibrated", params=f"-{size}%", measured=found, **given).eval()
        surgery = small.surgery
        row: dict[str, Any] = {
            "model": name,
            "size": size,
            "epochs": options.epochs,
            "parameters": surgery.params_after,
            "parameters_before": surgery.params_before,
            "before": before,
            "converted": 100 * fashion_mnist.accuracy(small, *test),
            "seconds_of_converting": time.perf_counter() - began,
        }
        say(f"-{size} %: {surgery.params_after:,} parameters, {row['converted']:.2f} %")
        if options.epochs:
            row |= trained(small, original, test, options)
            say(f"after {options.epochs} epochs: {row['trained']:.2f} %")
        yield row


def trained(
    small: nn.Module, original: nn.Module, test: tuple[Tensor, Tensor], options: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy after the recipe, in percent.

    What `finetune` runs; these models are of this repository's own making, so that a folder could not build them again.
    """
    for module in small.modules():
        # On CPUs the fused kernel's backward is slower than plain attention.
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    recipe = load_recipe(RECIPE, [f"schedule.epochs={options.epochs}", f"judge.every={options.epochs}"])
    every = open_pictures(str(options.data), "train", size=PREP.size, labelled=True)
    training, judged = held_out(every, recipe.data.holdout)

    def judge(runner: nn.Module) -> Mapping[str, float]:
        with evaluating(runner):
            return {"top1": accuracy(lambda images: runner(images).logits, judged)}

    surgery = small.surgery
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        task = Task(
            small,
            recipe,
            training,
            training_transform(PREP, recipe.augment),
            judge,
            Path(scratch),
            # A copy: a teacher is frozen, and the next size is converted from this one.
            teacher=Teacher(full_copy(original)),
            sites=tuple(site.fqn for site in surgery.sites),
            mlps=tuple(mlp.fqn for mlp in surgery.mlps),
            classes=fashion_mnist.CLASSES,
        )
        outcome = train(task, ALONE)
    small.load_state_dict(outcome.weights)
    seconds = time.perf_counter() - began
    return {"trained": 100 * fashion_mnist.accuracy(small.eval(), *test), "seconds_of_training": seconds}


def markdown(record: dict[str, Any]) -> str:
    commands = list(dict.fromkeys(row["command"] for row in record["rows"]))
    machine = heading({"environment": record["environment"], "command": ""})[0]
    lines = [
        "# Fashion-MNIST: accuracy by size",
        "",
        machine.replace(", no labels.", "."),
        "",
        *(f"`{one}`\n" for one in commands),
        f'Attention and MLPs narrowed by `convert(params=..., mlp=True, rank="auto", init="calibrated")` on {IMAGES} '
        f"training images without labels; then, where it says so, the recipe `{RECIPE}` with labels and the original "
        "as teacher. Top-1 on the 10,000 test images in percent; one seed.",
        "",
        "| model | parameters | | original | converted | points | trained on | epochs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        share = 100 * (row["parameters"] / row["parameters_before"] - 1)
        after = f"{row['trained']:.2f}" if "trained" in row else "-"
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {share:.1f} % | {row['before']:.2f} | {row['converted']:.2f} "
            f"| {row['converted'] - row['before']:+.2f} | {after} | {row['epochs'] or '-'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
