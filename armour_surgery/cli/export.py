"""`armour-surgery export MODEL --format F --out PATH`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armour_surgery.cli.options import AsJson, Checkpoint, Example, Into, Model, Pretrained, own_models
from armour_surgery.cli.run import command, console_for, print_json

if TYPE_CHECKING:
    from torch import nn

__all__ = ["export"]


@command
def export(
    model: Model,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="timm, hf: for these libraries after `import armour_surgery`. compat: the original's own shape, for "
            "any timm, transformers or torchvision without this tool. onnx, openvino, pt2 (torch.export): a graph for "
            "any batch size.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH", help="A folder for timm, hf and compat, else FILE.onnx, .xml or .pt2.", show_default=False
        ),
    ],
    deploy: Annotated[
        bool, typer.Option("--deploy", help="Make it ready for inference first (BatchNorm folded, ...).")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="For onnx: weights of matrix products in 8 bits.")] = False,
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code", help="For hf: with a modeling file, for trust_remote_code=True without this tool."
        ),
    ] = False,
    images: Annotated[
        str, typer.Option(metavar="IMAGES", help="What outputs are compared on: a folder of photos, or synthetic.")
    ] = "synthetic",
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    into: Into = None,
    example: Example = None,
    as_json: AsJson = False,
) -> None:
    """Write MODEL for other tools, load it there, and say how far its outputs are from the model's."""
    console = console_for(as_json)
    with console.status("loading PyTorch"):
        from armour_surgery.exporting.formats import check_export
        from armour_surgery.exporting.formats import export as run_export
        from armour_surgery.saving.any_model import Asked, load_any
    check_export(out, format, deploy=deploy, int8=int8, remote_code=remote_code)
    own = own_models(into, example)
    with console.status("loading the model"):
        loaded, _ = load_any(model, pretrained=pretrained, asked=Asked(checkpoint=checkpoint), own=own)
        fresh = _fresh(into) if format == "compat" else None
    with console.status(f"writing {format}, and loading it again"):
        result = run_export(
            loaded,
            out,
            format=format,
            deploy=deploy,
            int8=int8,
            remote_code=remote_code,
            images=images,
            into=fresh,
            name=model,
        )
    if as_json:
        print_json(result.to_dict())
        return
    console.print(
        f"{result.out}: {result.bytes / 2**20:.1f} MiB, outputs within {result.max_relative_error:.1e} of the model's "
        f"(relative; {result.checked_with}, {images} images)",
        markup=False,
        soft_wrap=True,
    )


def _fresh(into: list[str] | None) -> "nn.Module | None":
    """A model of the user's own without the conversion."""
    if not into:
        return None
    from armour_surgery.hosts import load_model

    return load_model(into[0])[0]
