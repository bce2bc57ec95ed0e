"""`armour-surgery eval MODEL --data DATA`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armour_surgery.cli.options import (
    AsJson,
    ClassMap,
    Example,
    Into,
    Model,
    OtherCheckpoint,
    OtherImgSize,
    OtherNumClasses,
    Pretrained,
    own_models,
)
from armour_surgery.cli.run import command, console_of_first_rank, print_json

if TYPE_CHECKING:
    from rich.console import Console

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
    into: Into = None,
    example: Example = None,
    checkpoint: OtherCheckpoint = None,
    vs_checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--vs-checkpoint",
            metavar="FILE",
            help="Weights to load for --vs; --checkpoint is then for MODEL.",
            show_default=False,
        ),
    ] = None,
    img_size: OtherImgSize = None,
    num_classes: OtherNumClasses = None,
    pretrained: Pretrained = True,
    class_map: ClassMap = None,
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
    console = console_of_first_rank(as_json)
    with console.status("loading PyTorch"):
        from armour_surgery.recover.distributed import distributed
        from armour_surgery.recover.evaluation import Options
        from armour_surgery.recover.evaluation import evaluate as run
        from armour_surgery.saving.any_model import Asked

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
            asked=Asked(checkpoint, img_size, num_classes),
            vs_checkpoint=vs_checkpoint,
            class_map=class_map,
            own=own_models(into, example),
        )
    with distributed(device) as process, console.status("evaluating"):
        evaluated = run(model, data, process, vs=vs, options=options)
    # JSON does not go through the console, which is quiet in all other processes.
    if not process.first:
        return
    if as_json:
        print_json(evaluated.to_dict())
    else:
        _tell(console, evaluated)


def _numbers(option: str, text: str | None) -> list[float] | None:
    from armour_surgery.errors import UsageError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not numbers joined by commas; write for example 0.5,0.5,0.5") from error


def _tell(console: "Console", evaluated: "Evaluated") -> None:
    _tell_scores(console, evaluated)
    if evaluated.vs is not None:
        _tell_scores(console, evaluated.vs)
        console.print(f"same first choice on {evaluated.agreement:.2f} % of the images")
    unreadable = evaluated.unreadable
    if unreadable:
        console.print(
            f"{len(unreadable)} images could not be read and were left out; the first: {unreadable[0]}",
            markup=False,
            soft_wrap=True,
        )
    if evaluated.confusion is not None:
        console.print(f"Confusion plot: {evaluated.confusion}", markup=False, soft_wrap=True)


def _tell_scores(console: "Console", scores: "Evaluated") -> None:
    real = f", ReaL {scores.real['top1']:.2f} % of {scores.real['images']:,}" if scores.real else ""
    console.print(
        f"{scores.model}: top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} %, {scores.images:,} images{real}",
        markup=False,
        soft_wrap=True,
    )
