"""`armour-surgery inspect MODEL`."""

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armour_surgery.cli.options import (
    AsJson,
    Checkpoint,
    Device,
    Example,
    ImgSize,
    InChans,
    Model,
    ModelKwargs,
    NumClasses,
    Submodule,
    read_model,
    read_part,
)
from armour_surgery.cli.progress import progress_bar
from armour_surgery.cli.run import command, console_of_first_rank, print_json
from armour_surgery.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from armour_surgery.records import Sensitivity

__all__ = ["inspect"]


@command
def inspect(
    model: Model,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGES",
            help="Measure what converting each site costs, on a folder of images, a timm dataset, or synthetic.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="With --calib: draw it.", show_default=False)
    ] = None,
    device: Device = "auto",
    checkpoint: Checkpoint = None,
    pretrained: Annotated[
        bool | None,
        typer.Option(
            "--pretrained/--no-pretrained",
            help="Load the pretrained weights. Default: only with --calib.",
            show_default=False,
        ),
    ] = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    model_kwargs: ModelKwargs = None,
    submodule: Submodule = None,
    example: Example = None,
    as_json: AsJson = False,
) -> None:
    """Show every attention of MODEL: its projections and sizes, which modes fit, and why others do not.

    Structure is all it looks at, so it needs no weights and no network. With --calib it converts every site alone and
    measures what the model loses.
    """
    console = console_of_first_rank(as_json)
    if console.quiet and calib is None:
        return  # torchrun's first process does it
    if device != "auto" and calib is None:
        raise UsageError(f"--device {device} is where --calib runs images; add --calib IMAGES, synthetic say")
    if plot is not None and calib is None:
        raise UsageError("--plot draws what --calib measures; add --calib IMAGES, synthetic say")
    if plot is not None:
        # Before the work: minutes of measuring are not to end in a file that cannot be written.
        from armour_surgery.report.style import check_figure

        check_figure(plot)
    with console.status("building the model"):
        from armour_surgery import inspect as inspect_model

        wanted = calib is not None if pretrained is None else pretrained
        whole = None if submodule is not None else example
        host, _ = read_model(model, wanted, checkpoint, img_size, num_classes, in_chans, model_kwargs, whole)
        if submodule is not None:
            host = read_part(host, submodule, example)
    with console.status("following q, k and v"):
        sites = inspect_model(host)
    measured = _measure(console, host, calib, device) if calib is not None else []
    if console.quiet:
        return
    if submodule is not None:
        from armour_surgery.surgery.parts import name_in_whole

        sites = [replace(site, fqn=name_in_whole(submodule, site.fqn)) for site in sites]
        measured = [replace(site, fqn=name_in_whole(submodule, site.fqn)) for site in measured]
    if plot is not None:
        from armour_surgery.report.figures import sensitivity_figure
        from armour_surgery.report.style import save_figure

        save_figure(plot, sensitivity_figure(measured, model))
    if as_json:
        document: dict[str, Any] = {"model": model, "sites": [site.to_dict() for site in sites]}
        if calib is not None:
            document["sensitivities"] = list(map(asdict, measured))
        print_json(document)
        return
    from rich.markup import escape

    from armour_surgery.cli.tables import Shown, sensitivity_table
    from armour_surgery.views import site_table

    view = site_table(sites)
    console.print(f"[bold]{escape(model)}[/bold]: {len(sites)} attention sites in a {type(host).__name__}")
    console.print(Shown(view, caption=False))
    for reason in view.notes:
        console.print(f"  {reason}", style="dim", markup=False)
    if measured:
        console.print(sensitivity_table(measured))
        console.print(
            "loss: 1 - the mean cosine of the model's final features to the original's, that site alone converted and "
            f"calibrated ({calib}).",
            style="dim",
            markup=False,
        )
    if plot is not None:
        console.print(f"Drawn: {plot}", markup=False, soft_wrap=True)
    if any(site.modes for site in sites):
        given = [model]
        for option, value in (("--submodule", submodule), ("--example", example)):
            given += [option, value] if value is not None else []
        for argument in model_kwargs or ():
            given += ["--model-kwargs", argument]
        console.print(f"\nNext: armour-surgery convert {shlex.join(given)}", markup=False, soft_wrap=True)


def _measure(console: "Console", model: "nn.Module", calib: str, device: str) -> "list[Sensitivity]":
    from armour_surgery.recover.distributed import distributed, share_weights
    from armour_surgery.surgery.conversion import sensitivities

    with distributed(device, option="--device") as process, progress_bar(console, "measuring sites") as tell:
        share_weights(model)
        several = process.world > 1
        return sensitivities(model, calibration=calib, device=process.device, distributed=several, progress=tell)
