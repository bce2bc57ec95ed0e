"""The options that several commands have, spelled and explained once."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from armour_surgery.records import Source
    from armour_surgery.saving.any_model import OwnModels

__all__ = [
    "AsJson",
    "Checkpoint",
    "ClassMap",
    "Device",
    "Example",
    "ImgSize",
    "InChans",
    "Into",
    "MarkdownPage",
    "Model",
    "ModelKwargs",
    "NumClasses",
    "OtherCheckpoint",
    "OtherImgSize",
    "OtherNumClasses",
    "Pretrained",
    "Submodule",
    "check_page",
    "name_for_folder",
    "own_models",
    "page_option",
    "read_model",
    "read_part",
]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm name, timm:NAME, hf-hub:ORG/NAME, local-dir:DIR, hf:ID_OR_DIR, torchvision:NAME, or your own "
        "FILE.py:CALLABLE (a class or a function, called with no arguments); but for inspect and convert also a folder "
        "saved by this tool, here or pushed to hf-hub:ORG/NAME.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; everything else on stderr.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="FILE", help="Weights to load for MODEL (safetensors, or plain weights)."),
]
OtherCheckpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="FILE",
        help="Weights to load, for MODEL, or if that is a saved folder, for the first --vs that is none.",
    ),
]
OtherImgSize = Annotated[
    int | None,
    typer.Option(
        "--img-size", metavar="N", help="Input height and width of MODEL and of --vs, where they are no saved folders."
    ),
]
OtherNumClasses = Annotated[
    int | None,
    typer.Option(
        "--num-classes", metavar="N", help="Classes of MODEL and of --vs, where they are no saved folders; 0: no head."
    ),
]
Pretrained = Annotated[
    bool,
    typer.Option("--pretrained/--no-pretrained", help="Take the library's pretrained weights, or random ones."),
]
ImgSize = Annotated[int | None, typer.Option("--img-size", metavar="N", help="Input height and width.")]
NumClasses = Annotated[int | None, typer.Option("--num-classes", metavar="N", help="Size of the head; 0 for none.")]
InChans = Annotated[int | None, typer.Option("--in-chans", metavar="N", help="Input channels.")]
ModelKwargs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-kwargs",
        metavar="KEY=VALUE",
        help="An argument of the library's builder (hf: an entry of the config), such as depth=6; any number.",
        show_default=False,
    ),
]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        "--class-map",
        metavar="FILE",
        help="Which folder is which class: class names in the model's order, one a line (timm's class maps), or JSON, "
        "a list of them or {name: index}. Default: the names that the model has, else the order of the folders.",
        show_default=False,
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="D", help="Where to run images, with calibration: cpu, cuda, or auto.")
]
Example = Annotated[
    str | None,
    typer.Option(
        "--example",
        metavar="SHAPE",
        help="What the model takes, where nobody knows that: 1,3,224,224, or 'x=1,3,224,224;ids=1,77:long'.",
        show_default=False,
    ),
]
MarkdownPage = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE.md", help="Also write it as a page.", show_default=False)
]
Submodule = Annotated[
    str | None,
    typer.Option(
        "--submodule",
        metavar="FQN",
        help="Only what is below this module, such as model.vision_tower, which is examined by itself; --example is "
        "then what it takes.",
        show_default=False,
    ),
]
Into = Annotated[
    list[str] | None,
    typer.Option(
        "--into",
        metavar="FILE.py:CALLABLE",
        help="For a saved folder of your own model: what makes a fresh one, which gets the weights.",
        show_default=False,
    ),
]


def read_model(
    name: str,
    pretrained: bool,
    checkpoint: Path | None,
    img_size: int | None,
    num_classes: int | None,
    in_chans: int | None,
    model_kwargs: "Sequence[str] | None" = None,
    example: str | None = None,
) -> "tuple[nn.Module, Source]":
    """Load MODEL; a folder of ours is told from an original.

    Raises:
        AlreadyConvertedError: MODEL is a folder that this tool saved.
    """
    from armour_surgery.errors import AlreadyConvertedError
    from armour_surgery.hosts import load_model
    from armour_surgery.hosts.arguments import read_arguments
    from armour_surgery.hosts.examples import read_example
    from armour_surgery.saving.folder import read_plan
    from armour_surgery.saving.occupied import is_saved_folder

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
        arguments=read_arguments(model_kwargs or ()),
        example=read_example(example),
    )


def read_part(model: "nn.Module", fqn: str, example: str | None) -> "nn.Module":
    """The module of a model that `--submodule` names, which takes what `--example` says.

    Raises:
        UsageError: there is no such module; the message lists close names.
    """
    import difflib

    from armour_surgery.errors import UsageError
    from armour_surgery.hosts.examples import keep_example, read_example

    parts = dict(model.named_modules())
    if not fqn or fqn not in parts:
        names = [name for name in parts if name]
        close = (
            difflib.get_close_matches(fqn, names, n=3, cutoff=0.4) or [name for name in names if "." not in name][:3]
        )
        raise UsageError(
            f"--submodule {fqn!r}: {type(model).__name__} has no such module, but {', '.join(close) or 'none at all'}"
        )
    part: nn.Module = parts[fqn]
    keep_example(part, read_example(example))
    return part


def own_models(into: "Sequence[str] | None", example: str | None) -> "OwnModels":
    """What `--into` and `--example` say."""
    from armour_surgery.hosts.examples import read_example
    from armour_surgery.saving.any_model import OwnModels

    return OwnModels(tuple(into or ()), read_example(example))


def check_page(markdown: Path | None) -> None:
    """Refuse a page for `--markdown` that could not be written, before the work.

    Raises:
        UsageError: it is no Markdown, or there is no such folder.
    """
    if markdown is None:
        return
    from armour_surgery.errors import UsageError
    from armour_surgery.report.whole_file import check_target

    if markdown.suffix.lower() != ".md":
        raise UsageError(f"--markdown: the page is Markdown, and {str(markdown)!r} does not end in .md; name it so")
    check_target(markdown, "page")


def page_option(markdown: Path) -> str:
    """How the option is written in the page itself: where it lay on this machine is nobody's business."""
    return f"--markdown {shlex.quote(markdown.name if markdown.is_absolute() else str(markdown))}"


def name_for_folder(model: str) -> str:
    """What a folder that is made from MODEL is called first: MODEL without its library, owner and odd letters."""
    last = model.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return re.sub(r"[^\w.-]+", "-", last).strip("-") or "model"
