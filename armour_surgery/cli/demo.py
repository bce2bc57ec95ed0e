"""`armour-surgery demo`: the whole story, offline, on scikit-learn's digits."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from armour_surgery.cli.options import AsJson
from armour_surgery.cli.run import command, console_for, print_json

__all__ = ["demo"]

_MODES = ("qv", "kv", "qk", "qk-diag")
_FRESH = """
import json, sys
from armour_surgery import load
from armour_surgery.demo import accuracy, digits_split
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
    """Inspect, convert, evaluate, save, reload in a new process and time a small ViT. Needs no network."""
    console = console_for(as_json)
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
        from armour_surgery.cli.tables import change, plain_table, site_table
        from armour_surgery.conversion import surgery_of
        from armour_surgery.demo import accuracy, digits_split, load_digits_vit
        from armour_surgery.measure.speed import compare

        torch.manual_seed(0)
        model = load_digits_vit()
        _, _, images, labels = digits_split()
    console.rule("1. inspect", align="left")
    table, _ = site_table(inspect(model))
    console.print(table)

    console.rule("2. convert and evaluate", align="left")
    before = accuracy(model, images, labels)
    converted, found = {}, {}
    for mode in _MODES:
        with console.status(f"converting to {mode}"):
            converted[mode] = convert(model, mode)
            found[mode] = accuracy(converted[mode], images, labels)
        console.print(f"  {mode:8} {len(surgery_of(converted[mode]).sites)} sites converted, {found[mode]:.1f} % right")

    console.rule("3. save, and load in a new process", align="left")
    paths = {mode: str(save(one, folder / f"digits_vit-armour-{mode}")) for mode, one in converted.items()}
    with console.status("a fresh Python loads them"):
        reloaded = _evaluate_fresh(list(paths.values()))
    same = all(reloaded[paths[mode]] == found[mode] for mode in _MODES)
    console.print(
        f"  reloaded models get {'the same accuracy, every one' if same else f'OTHER accuracies: {reloaded}'}"
    )

    console.rule("4. time", align="left")
    with console.status("timing in turns with the original"):
        report = compare(
            {"original": model, **converted},
            lambda: torch.randn(256, *images.shape[1:]),
            rounds=20,
            budget_s=20,
        )
    speed = {pair.b: pair for pair in report.pairs}

    summary = plain_table("A ViT on scikit-learn's digits, 500 held-out images, init wq, no training")
    for column, side in (("model", "left"), ("parameters", "right"), ("change", "right"), ("MACs", "right"),
                         ("accuracy", "right"), ("speed", "right")):  # fmt: skip
        summary.add_column(column, justify=side)  # type: ignore[arg-type]
    plans = {mode: surgery_of(converted[mode]) for mode in _MODES}
    first = plans["qv"]
    summary.add_row("original", f"{first.params_before:,}", "", f"{first.macs_before:,}", f"{before:.1f} %", "1.00 x")
    for mode, surgery in plans.items():
        pair = speed[mode]
        summary.add_row(
            mode,
            f"{surgery.params_after:,}",
            change(surgery.params_before, surgery.params_after),
            f"{surgery.macs_after:,}",
            f"{found[mode]:.1f} %",
            f"{pair.speedup:.2f} x  ({pair.speedup_iqr[0]:.2f}-{pair.speedup_iqr[1]:.2f})",
        )
    console.print(summary)
    console.print(
        "Speed is the median of paired rounds, with its quartiles. What the table shows is true: sharing a weight "
        "(init wq) without training costs nearly all accuracy. A converted model is a start for training."
    )
    return {
        "original": {"params": first.params_before, "macs": first.macs_before, "accuracy": before},
        "modes": {
            mode: {
                "params": plans[mode].params_after,
                "macs": plans[mode].macs_after,
                "accuracy": found[mode],
                "accuracy_reloaded": reloaded[paths[mode]],
                "speedup": speed[mode].speedup,
                "speedup_iqr": list(speed[mode].speedup_iqr),
            }
            for mode in _MODES
        },
        "environment": report.environment.to_dict(),
    }


def _evaluate_fresh(paths: list[str]) -> dict[str, float]:
    """Load saved folders in a new process and evaluate them there."""
    from armour_surgery.errors import FolderError

    done = subprocess.run([sys.executable, "-c", _FRESH, *paths], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise FolderError(f"a fresh process could not load {paths[0]}: {last[0]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result
