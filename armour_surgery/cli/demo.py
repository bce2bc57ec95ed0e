"""`armour-surgery demo`: the whole story, offline, on scikit-learn's digits."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armour_surgery.cli.options import AsJson
from armour_surgery.cli.run import command, console_for, print_json
from armour_surgery.errors import FolderError

if TYPE_CHECKING:
    from armour_surgery.benchmarking.speed import PairSpeed
    from armour_surgery.records import SurgeryPlan

__all__ = ["demo"]

# What is tried of each mode: how the weights are chosen. `wq` is what `convert` does unless told otherwise.
_INITS = {
    "qv": ("wq", "wq-refit", "joint-svd", "calibrated"),
    "kv": ("wq", "calibrated"),
    "qk": ("wq", "calibrated"),
    "qk-diag": ("wq", "calibrated"),
}
_TRIALS = tuple((mode, init) for mode, inits in _INITS.items() for init in inits)
# What is trained at the end, from the start that needs it most, and by which recipe.
_RECOVERED = ("qv", "wq")
_RECIPE = "digits_recover"
_FRESH = """
import json, sys
from armour_surgery import load
from armour_surgery.demo.digits_vit import accuracy, digits_split
_, _, images, labels = digits_split()
print(json.dumps({name: accuracy(load(name), images, labels) for name in sys.argv[1:]}))
"""


@command
def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the converted models here. Default: a temporary folder.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Inspect, convert, evaluate, save, reload, time and recover a small ViT. Needs no network."""
    console = console_for(as_json)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FolderError(f"{out} cannot be made: {error.strerror}; name another --out") from error
    with tempfile.TemporaryDirectory(prefix="armour-demo-") as scratch:
        document = _story(console, out if out is not None else Path(scratch))
    if as_json:
        print_json(document)
    elif out is not None:
        console.print(f"The converted models are in {out}.", markup=False, soft_wrap=True)


def _story(console: Any, folder: Path) -> dict[str, Any]:
    with console.status("loading PyTorch and a ViT trained on digits"):
        import torch

        from armour_surgery import convert, inspect, save
        from armour_surgery.benchmarking import speed
        from armour_surgery.cli.tables import site_table
        from armour_surgery.demo.digits_vit import accuracy, digits_source, load_digits_vit
        from armour_surgery.images.digits import digits_split
        from armour_surgery.surgery.perform import surgery_of

        torch.manual_seed(0)
        model = load_digits_vit()
        train_images, _, images, labels = digits_split()
    console.rule("1. inspect", align="left")
    table, _ = site_table(inspect(model))
    console.print(table)

    console.rule("2. convert and evaluate", align="left")
    before = accuracy(model, images, labels)
    converted, found = {}, {}
    given = torch.split(train_images, 64)  # without their labels; the test images stay unseen
    for mode, init in _TRIALS:
        with console.status(f"converting to {mode} with {init}"):
            images_given = given if init == "calibrated" else None
            one = convert(model, mode, init=init, calibration=images_given, source=digits_source())
            converted[mode, init], found[mode, init] = one, accuracy(one, images, labels)
        console.print(
            f"  {mode:8} {init:11} {len(surgery_of(one).sites)} sites converted, {found[mode, init]:.1f} % right"
        )

    console.rule("3. save, and load in a new process", align="left")
    paths = {trial: str(save(one, folder / _folder_name(*trial))) for trial, one in converted.items()}
    with console.status("a fresh Python loads them"):
        fresh = _evaluate_fresh(list(paths.values()))
    reloaded = {trial: fresh[path] for trial, path in paths.items()}
    same = reloaded == found
    console.print(
        f"  reloaded models get {'the same accuracy, every one' if same else f'OTHER accuracies: {reloaded}'}"
    )

    console.rule("4. time", align="left")
    with console.status("timing in turns with the original"):
        speed.keep_memory()
        report = speed.compare(
            # How fast a model is depends on its mode and not on its weights.
            {"original": model, **{mode: converted[mode, "wq"] for mode in _INITS}},
            lambda: torch.randn(256, *images.shape[1:]),
            rounds=20,
            budget_s=20,
        )
    plans = {mode: surgery_of(converted[mode, "wq"]) for mode in _INITS}
    _tell(console, plans, before, found, {pair.b: pair for pair in report.pairs})

    console.rule("5. recover without labels", align="left")
    recovered = _recover(console, Path(paths[_RECOVERED]), folder)
    console.print(
        f"  {_RECOVERED[0]} from {_RECOVERED[1]}: {found[_RECOVERED]:.1f} % -> {recovered['accuracy']:.1f} % right in "
        f"{recovered['seconds']:.0f} s (original {before:.1f} %): {recovered['steps']} steps towards what the original "
        "computes, on the training images alone"
    )
    first = plans["qv"]
    return {
        "original": {"params": first.params_before, "macs": first.macs_before, "accuracy": before},
        "modes": {
            pair.b: {
                "params": plans[pair.b].params_after,
                "macs": plans[pair.b].macs_after,
                "accuracy": found[pair.b, "wq"],
                "accuracy_reloaded": reloaded[pair.b, "wq"],
                "speedup": pair.speedup,
                "speedup_iqr": list(pair.speedup_iqr),
                "inits": {
                    init: {"accuracy": found[pair.b, init], "accuracy_reloaded": reloaded[pair.b, init]}
                    for init in _INITS[pair.b]
                },
            }
            for pair in report.pairs
        },
        "recovered": {"mode": _RECOVERED[0], "init": _RECOVERED[1], "recipe": _RECIPE, **recovered},
        "environment": report.environment.to_dict(),
    }


def _recover(console: Any, student: Path, folder: Path) -> dict[str, Any]:
    """`armour-surgery finetune STUDENT --recipe digits_recover`, and what the test images say of the result."""
    from armour_surgery import load
    from armour_surgery.demo.digits_vit import accuracy
    from armour_surgery.images.digits import digits_split
    from armour_surgery.recover.distributed import distributed
    from armour_surgery.recover.finetuning import finetune
    from armour_surgery.recover.recipe_files import load_recipe

    out = folder / f"{student.name}-recovered"
    with distributed("cpu") as process, console.status("learning from the original, without labels"):
        done = finetune(str(student), load_recipe(_RECIPE), out, process)
    _, _, images, labels = digits_split()
    return {
        "accuracy": accuracy(load(out), images, labels),
        "steps": done.outcome.steps,
        "images": done.outcome.images,
        "seconds": round(done.outcome.seconds, 2),
    }


def _folder_name(mode: str, init: str) -> str:
    """`convert`'s default name for `wq`, the init behind it for others."""
    return f"digits_vit-armour-{mode}" + ("" if init == "wq" else f"-{init}")


def _tell(
    console: Any,
    plans: "dict[str, SurgeryPlan]",
    before: float,
    found: dict[tuple[str, str], float],
    pairs: "dict[str, PairSpeed]",
) -> None:
    """The table of it all, and what it shows."""
    from armour_surgery.cli.tables import millions, plain_table
    from armour_surgery.report.wording import change
    from armour_surgery.surgery.order import CALIBRATION_IMAGES

    summary = plain_table("A ViT on scikit-learn's digits, 500 held-out images, no training")
    for column, side in (("model", "left"), ("init", "left"), ("accuracy", "right"), ("parameters", "right"),
                         ("MACs", "right"), ("times as fast", "right")):  # fmt: skip
        summary.add_column(column, justify=side, no_wrap=True)  # type: ignore[arg-type]
    first = plans["qv"]
    summary.add_row("original", "", f"{before:.1f} %", f"{first.params_before:,}", millions(first.macs_before), "1.00")
    for mode, inits in _INITS.items():
        surgery, pair = plans[mode], pairs[mode]
        costs = (
            f"{surgery.params_after:,}",
            millions(surgery.macs_after),
            f"{pair.speedup:.2f} ({pair.speedup_iqr[0]:.2f}-{pair.speedup_iqr[1]:.2f})",
        )
        for place, init in enumerate(inits):
            summary.add_row(
                mode if place == 0 else "",
                init,
                f"{found[mode, init]:.1f} %",
                *(costs if place == 0 else ()),
                style="bold" if init == "calibrated" else None,
            )
    console.print(summary)
    console.print(
        f"Parameters: {change(first.params_before, first.params_after)} with qv. Times as fast: the median of paired "
        "rounds, with its quartiles; it does not depend on the init. What the table shows is true: sharing a weight as "
        "it is (wq) without training costs nearly all accuracy, and is a start for training. Calibrated on "
        f"{CALIBRATION_IMAGES} training images, without their labels, qv gets {found['qv', 'calibrated']:.1f} % where "
        f"the original gets {before:.1f} %."
    )


def _evaluate_fresh(paths: list[str]) -> dict[str, float]:
    """Load saved folders in a new process and evaluate them there."""
    from armour_surgery.errors import FolderError

    done = subprocess.run([sys.executable, "-c", _FRESH, *paths], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise FolderError(f"a fresh process could not load {paths[0]}: {last[0]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result
