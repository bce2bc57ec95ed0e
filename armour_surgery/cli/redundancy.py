"""`armour-surgery redundancy MODEL --out FIGURE.png`: the paper's Figure 1, for any model."""

from pathlib import Path
from typing import Annotated

import typer

from armour_surgery.cli.options import (
    AsJson,
    Checkpoint,
    Example,
    ImgSize,
    InChans,
    Model,
    ModelKwargs,
    NumClasses,
    Pretrained,
    read_model,
)
from armour_surgery.cli.progress import progress_bar
from armour_surgery.cli.run import command, console_for, print_json

__all__ = ["redundancy"]

_RANDOM = "random weights: these numbers say nothing about a trained model"


@command
def redundancy(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FIGURE.png", help="Draw it: .png, .svg or .pdf.", show_default=False),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="FQN|N",
            help="The attention to draw in detail: its name, or its number from 0. Default: the first.",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(metavar="X", help="Entries that differ by less than this count as alike.")
    ] = 0.01,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    model_kwargs: ModelKwargs = None,
    example: Example = None,
    as_json: AsJson = False,
) -> None:
    """Show how alike the weights of Q, K and V are in every attention of MODEL, and what sharing them costs.

    Entry by entry | |Q| - |K| |, | |K| - |V| | and | |Q| - |V| |, and the share of entries below a threshold, as in the
    paper's Figure 1; beside it the residual of the best shared weight, from the weights alone.
    """
    console = console_for(as_json)
    if out is not None:
        from armour_surgery.report.style import check_figure

        check_figure(out)
    with console.status("loading the model"):
        from armour_surgery.likeness.compare import compare_layers

        host, source = read_model(model, pretrained, checkpoint, img_size, num_classes, in_chans, model_kwargs, example)
    if source.library == "own" and checkpoint is None:
        weights = "own"
    elif checkpoint is not None:
        weights = str(checkpoint)
    else:
        weights = "pretrained" if pretrained else "random"
    with progress_bar(console, "comparing weights") as tell:
        sites, detail = compare_layers(host, threshold=threshold, layer=layer, progress=tell)
    if out is not None:
        from armour_surgery.likeness.figure import redundancy_figure
        from armour_surgery.report.style import save_figure

        title = f"{model}, {detail.fqn}" + (f"\n({_RANDOM})" if weights == "random" else "")
        save_figure(out, redundancy_figure(sites, detail.fqn, detail.weights, threshold, title))
    if as_json:
        print_json(
            {
                "model": model,
                "weights": weights,
                "threshold": threshold,
                "layer": detail.fqn,
                "out": str(out) if out is not None else None,
                "sites": [site.to_dict() for site in sites],
            }
        )
        return
    from rich.markup import escape

    from armour_surgery.cli.tables import Shown
    from armour_surgery.likeness.table import redundancy_table

    console.print(f"[bold]{escape(model)}[/bold]: {len(sites)} attention sites in a {type(host).__name__}")
    if weights == "random":
        console.print(f"  {_RANDOM}; leave out --no-pretrained, or bring some with --checkpoint", style="bold")
    view = redundancy_table(sites, threshold)
    console.print(Shown(view))
    for line in view.notes:
        console.print(line, style="dim", markup=False)
    if out is not None:
        console.print(f"Drawn ({detail.fqn} in detail): {out}", markup=False, soft_wrap=True)
