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
    from rich.console import Console
    from torch import Tensor, nn

    from armour_surgery.benchmarking.speed import PairSpeed, SpeedReport
    from armour_surgery.cli.tables import Shown
    from armour_surgery.records import SurgeryPlan

__all__ = ["demo"]

# What is tried of each mode: how the weights are chosen. `wq` is what `convert` does unless told otherwise.
_INITS = {
    "qv": ("wq", "wq-refit", "joint-svd", "calibrated"),
    "kv": ("wq", "calibrated"),
    "qk": ("wq", "calibrated"),
    "qk-diag": ("wq", "calibrated"),
}
# A mode, and how its weights were chosen.
Trial = tuple[str, str]
# What is trained at the end, from the start that needs it most, and by which recipe.
_RECOVERED: Trial = ("qv", "wq")
_RECIPE = "digits_recover"
# What a process of its own runs, so that nothing can come from this one's memory.
_FRESH = """
import json, sys
from armour_surgery import load
from armour_surgery.demo.digits_vit import accuracy
from armour_surgery.images.digits import digits_split
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


def _story(console: "Console", folder: Path) -> dict[str, Any]:
    with console.status("loading PyTorch and a ViT trained on digits"):
        import torch

        from armour_surgery.demo.digits_vit import load_digits_vit
        from armour_surgery.images.digits import digits_split
        from armour_surgery.surgery.perform import surgery_of

        torch.manual_seed(0)
        model = load_digits_vit()
        train_images, _, images, labels = digits_split()
    console.rule("1. inspect", align="left")
    _inspect(console, model)
    console.rule("2. convert and evaluate", align="left")
    before, converted, accuracies = _convert(console, model, train_images, images, labels)
    console.rule("3. save, and load in a new process", align="left")
    paths, reloaded = _reload(console, converted, accuracies, folder)
    console.rule("4. time", align="left")
    # How large and how fast a model is depends on its mode and not on its weights.
    by_mode = {mode: converted[mode, "wq"] for mode in _INITS}
    plans = {mode: surgery_of(student) for mode, student in by_mode.items()}
    report = _time(console, model, by_mode, images)
    pairs = {pair.b: pair for pair in report.pairs}
    _summarize(console, plans, before, accuracies, pairs)
    console.rule("5. recover without labels", align="left")
    recovered = _recover(console, Path(paths[_RECOVERED]), folder, before, accuracies[_RECOVERED])
    original = plans["qv"]
    return {
        "original": {"params": original.params_before, "macs": original.macs_before, "accuracy": before},
        "modes": {mode: _mode_to_dict(mode, plans[mode], pairs[mode], accuracies, reloaded) for mode in _INITS},
        "recovered": {"mode": _RECOVERED[0], "init": _RECOVERED[1], "recipe": _RECIPE, **recovered},
        "environment": report.environment.to_dict(),
    }


def _inspect(console: "Console", model: "nn.Module") -> None:
    from armour_surgery import inspect
    from armour_surgery.cli.tables import Shown
    from armour_surgery.views import site_table

    console.print(Shown(site_table(inspect(model)), caption=False))


def _convert(
    console: "Console", model: "nn.Module", train_images: "Tensor", images: "Tensor", labels: "Tensor"
) -> "tuple[float, dict[Trial, nn.Module], dict[Trial, float]]":
    """The original's accuracy; every trial's model, and its accuracy. Percent of the test images."""
    import torch

    from armour_surgery import convert
    from armour_surgery.demo.digits_vit import accuracy, digits_source
    from armour_surgery.surgery.perform import surgery_of

    before = accuracy(model, images, labels)
    converted: dict[Trial, nn.Module] = {}
    accuracies: dict[Trial, float] = {}
    batches = torch.split(train_images, 64)  # without their labels; the test images stay unseen
    for mode, inits in _INITS.items():
        for init in inits:
            with console.status(f"converting to {mode} with {init}"):
                calibration = batches if init == "calibrated" else None
                student = convert(model, mode, init=init, calibration=calibration, source=digits_source())
                right = accuracy(student, images, labels)
            sites = len(surgery_of(student).sites)
            console.print(f"  {mode:8} {init:11} {sites} sites converted, {right:.1f} % right")
            converted[mode, init], accuracies[mode, init] = student, right
    return before, converted, accuracies


def _reload(
    console: "Console", converted: "dict[Trial, nn.Module]", accuracies: dict[Trial, float], folder: Path
) -> tuple[dict[Trial, str], dict[Trial, float]]:
    """Where the models were saved, and the accuracies that they have in a process that loads them."""
    from armour_surgery import save

    paths = {trial: str(save(student, folder / _folder_name(*trial))) for trial, student in converted.items()}
    with console.status("a fresh Python loads them"):
        fresh = _evaluate_fresh(list(paths.values()))
    reloaded = {trial: fresh[path] for trial, path in paths.items()}
    # To the last digit: a saved model is the same model.
    said = "the same accuracy, every one" if reloaded == accuracies else f"OTHER accuracies: {reloaded}"
    console.print(f"  reloaded models get {said}")
    return paths, reloaded


def _folder_name(mode: str, init: str) -> str:
    """`convert`'s default name for `wq`, the init behind it for others."""
    return f"digits_vit-armour-{mode}" + ("" if init == "wq" else f"-{init}")


def _evaluate_fresh(paths: list[str]) -> dict[str, float]:
    """Load saved folders in a new process and evaluate them there."""
    from armour_surgery.errors import FolderError

    done = subprocess.run([sys.executable, "-c", _FRESH, *paths], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise FolderError(f"a fresh process could not load {paths[0]}: {last[0]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _time(console: "Console", model: "nn.Module", by_mode: "dict[str, nn.Module]", images: "Tensor") -> "SpeedReport":
    import torch

    from armour_surgery.benchmarking import speed

    with console.status("timing in turns with the original"):
        speed.keep_memory()
        return speed.compare(
            {"original": model, **by_mode},
            lambda: torch.randn(256, *images.shape[1:]),
            rounds=20,
            budget_s=20,
        )


def _summarize(
    console: "Console",
    plans: "dict[str, SurgeryPlan]",
    before: float,
    accuracies: dict[Trial, float],
    pairs: "dict[str, PairSpeed]",
) -> None:
    """The table of it all, and what it shows."""
    from armour_surgery.spelled import change
    from armour_surgery.surgery.order import CALIBRATION_IMAGES

    original = plans["qv"]
    console.print(_summary_table(plans, before, accuracies, pairs))
    console.print(
        f"Parameters: {change(original.params_before, original.params_after)} with qv. Times as fast: the median of "
        "paired rounds, with its quartiles; it does not depend on the init. What the table shows is true: sharing a "
        "weight as it is (wq) without training costs nearly all accuracy, and is a start for training. Calibrated on "
        f"{CALIBRATION_IMAGES} training images, without their labels, qv gets {accuracies['qv', 'calibrated']:.1f} % "
        f"where the original gets {before:.1f} %."
    )


def _summary_table(
    plans: "dict[str, SurgeryPlan]",
    before: float,
    accuracies: dict[Trial, float],
    pairs: "dict[str, PairSpeed]",
) -> "Shown":
    from armour_surgery.cli.tables import Shown
    from armour_surgery.spelled import millions
    from armour_surgery.tabular import Table

    bold: dict[int, str] = {}
    original = plans["qv"]
    costs = (f"{original.params_before:,}", millions(original.macs_before), "1.00")
    rows: list[tuple[str, ...]] = [("original", "", f"{before:.1f} %", *costs)]
    for mode, inits in _INITS.items():
        surgery, pair = plans[mode], pairs[mode]
        low, high = pair.speedup_iqr
        # What depends on the mode alone is said once, beside the first of its inits.
        label = mode
        costs = (
            f"{surgery.params_after:,}",
            millions(surgery.macs_after),
            f"{pair.speedup:.2f} ({low:.2f}-{high:.2f})",
        )
        for init in inits:
            if init == "calibrated":
                bold[len(rows)] = "bold"
            rows.append((label, init, f"{accuracies[mode, init]:.1f} %", *costs))
            label, costs = "", ("", "", "")
    caption = "A ViT on scikit-learn's digits, 500 held-out images, no training"
    headers = ("model", "init", "accuracy", "parameters", "MACs", "times as fast")
    return Shown(Table(caption, headers, rows, frozenset((2, 3, 4, 5))), bold)


def _recover(
    console: "Console", student: Path, folder: Path, original_accuracy: float, student_accuracy: float
) -> dict[str, Any]:
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
    recovered = {
        "accuracy": accuracy(load(out), images, labels),
        "steps": done.outcome.steps,
        "images": done.outcome.images,
        "seconds": round(done.outcome.seconds, 2),
    }
    mode, init = _RECOVERED
    console.print(
        f"  {mode} from {init}: {student_accuracy:.1f} % -> {recovered['accuracy']:.1f} % right in "
        f"{recovered['seconds']:.0f} s (original {original_accuracy:.1f} %): {recovered['steps']} steps towards what "
        "the original computes, on the training images alone"
    )
    return recovered


def _mode_to_dict(
    mode: str,
    surgery: "SurgeryPlan",
    pair: "PairSpeed",
    accuracies: dict[Trial, float],
    reloaded: dict[Trial, float],
) -> dict[str, Any]:
    inits = {}
    for init in _INITS[mode]:
        inits[init] = {"accuracy": accuracies[mode, init], "accuracy_reloaded": reloaded[mode, init]}
    return {
        "params": surgery.params_after,
        "macs": surgery.macs_after,
        **inits["wq"],
        "speedup": pair.speedup,
        "speedup_iqr": list(pair.speedup_iqr),
        "inits": inits,
    }
