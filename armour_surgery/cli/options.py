"""The options that several commands have, spelled and explained once."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn

    from armour_surgery.records import Source

__all__ = [
    "AsJson",
    "Checkpoint",
    "ImgSize",
    "InChans",
    "Model",
    "NumClasses",
    "Pretrained",
    "name_for_folder",
    "read_model",
]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm name, timm:NAME, hf-hub:ORG/NAME, local-dir:DIR, hf:ID_OR_DIR, torchvision:NAME; but for inspect "
        "and convert also a folder saved by this tool.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; everything else on stderr.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="FILE", help="Weights to load (safetensors, or plain weights)."),
]
Pretrained = Annotated[
    bool,
    typer.Option("--pretrained/--no-pretrained", help="Take the library's pretrained weights, or random ones."),
]
ImgSize = Annotated[int | None, typer.Option("--img-size", metavar="N", help="Input height and width.")]
NumClasses = Annotated[int | None, typer.Option("--num-classes", metavar="N", help="Size of a new head.")]
InChans = Annotated[int | None, typer.Option("--in-chans", metavar="N", help="Input channels.")]


def read_model(
    name: str,
    pretrained: bool,
    checkpoint: Path | None,
    img_size: int | None,
    num_classes: int | None,
    in_chans: int | None,
) -> "tuple[nn.Module, Source]":
    """Load MODEL; a folder of ours is told from an original.

    Raises:
        AlreadyConvertedError: MODEL is a folder that this tool saved.
    """
    from armour_surgery.errors import AlreadyConvertedError
    from armour_surgery.hosts import load_model
    from armour_surgery.saving.folder import is_saved_folder, read_plan

    if is_saved_folder(name):
        plan = read_plan(name)
        origin = plan.source.name if plan.source else "the original"
        raise AlreadyConvertedError(f"{name} is converted already (from {origin}, mode {plan.mode}); name the original")
    return load_model(
        name,
        pretrained=pretrained,
        checkpoint=checkpoint,
        img_size=img_size,
        num_classes=num_classes,
        in_chans=in_chans,
    )


def name_for_folder(model: str) -> str:
    """What a folder that is made from MODEL is called first: MODEL without its library, owner and odd letters."""
    last = model.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return re.sub(r"[^\w.-]+", "-", last).strip("-") or "model"
