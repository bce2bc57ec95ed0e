"""`armour-surgery eval MODEL --data DATA`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armour_surgery.cli.options import AsJson, Checkpoint, Model, Pretrained
from armour_surgery.cli.run import command, console_for, print_json

if TYPE_CHECKING:
    from armour_surgery.recover.evaluation import Evaluated

__all__ = ["evaluate"]


@command
def evaluate(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="Labelled images: a folder (val/ by class), a folder with Fashion-MNIST's files, digits, or a timm "
            "dataset PREFIX/NAME:FOLDER.",
            show_default=False,
        ),
    ],
    vs: Annotated[
        str | None,
        typer.Option("--vs", metavar="MODEL", help="Compare with this one, image by image.", show_default=False),
    ] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="The split, where it is not called val.", show_default=False)
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            "--crop-pct",
            min=0.05,
            max=1.0,
            help="Share of the resized image that the crop keeps; 0.875 as DeiT and LeViT evaluate. Default: the "
            "model's.",
            show_default=False,
        ),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Mean per channel. Default: the model's.", show_default=False)
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Deviation per channel. Default: the model's.", show_default=False),
    ] = None,
    real: Annotated[bool, typer.Option("--real", help="Also count by ImageNet's ReaL labels (those in timm).")] = False,
    confusion: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw which class is taken for which.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images at once.")] = 64,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Processes that read images.")] = 0,
    device: Annotated[str, typer.Option(metavar="D", help="cpu, cuda, or auto.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Count how often MODEL's first choice, and its first five, are right; every image once, also under torchrun."""
    console = console_for(as_json)
    console.quiet = os.environ.get("RANK", "0") != "0"
    with console.status("loading PyTorch"):
        from armour_surgery.recover.distributed import distributed
        from armour_surgery.recover.evaluation import Options
        from armour_surgery.recover.evaluation import evaluate as run

        options = Options(
            split=split,
            crop_pct=crop_pct,
            mean=_numbers("--mean", mean),
            std=_numbers("--std", std),
            real=real,
            confusion=confusion,
            batch_size=batch_size,
            workers=workers,
            pretrained=pretrained,
            checkpoint=checkpoint,
        )
    with distributed(device) as process, console.status("evaluating"):
        found = run(model, data, process, vs=vs, options=options)
    if not process.first:
        return
    if as_json:
        print_json(found.to_dict())
    else:
        _tell(console, found)


def _numbers(option: str, text: str | None) -> list[float] | None:
    from armour_surgery.errors import UsageError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not numbers joined by commas; write for example 0.5,0.5,0.5") from error


def _tell(console: Any, found: "Evaluated") -> None:
    def line(name: str, scores: "Evaluated") -> None:
        real = f", ReaL {scores.real['top1']:.2f} % of {scores.real['images']:,}" if scores.real else ""
        console.print(
            f"{name}: top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} %, {scores.images:,} images{real}",
            markup=False,
            soft_wrap=True,
        )

    line(found.model, found)
    if found.vs is not None:
        line(found.vs.model, found.vs)
        console.print(f"same first choice on {found.agreement:.2f} % of the images")
    if found.unreadable:
        console.print(
            f"{len(found.unreadable)} images could not be read and were left out; the first: {found.unreadable[0]}",
            markup=False,
            soft_wrap=True,
        )
    if found.confusion is not None:
        console.print(f"Confusion plot: {found.confusion}", markup=False, soft_wrap=True)
