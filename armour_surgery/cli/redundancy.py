"""`armour-surgery redundancy MODEL --out FIGURE.png`: the paper's Figure 1, for any model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from armour_surgery.likeness.pairs import PairRedundancy, SiteRedundancy

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

    console.print(f"[bold]{escape(model)}[/bold]: {len(sites)} attention sites in a {type(host).__name__}")
    if weights == "random":
        console.print(f"  {_RANDOM}; leave out --no-pretrained, or bring some with --checkpoint", style="bold")
    console.print(_table(sites, threshold))
    for line in _notes(sites):
        console.print(line, style="dim", markup=False)
    if out is not None:
        console.print(f"Drawn ({detail.fqn} in detail): {out}", markup=False, soft_wrap=True)


def _table(sites: "Sequence[SiteRedundancy]", threshold: float) -> "Table":
    from rich.markup import escape

    from armour_surgery.cli.tables import plain_table
    from armour_surgery.likeness.pairs import PAIRS
    from armour_surgery.report.style import short_names

    table = plain_table(f"Entries closer than {threshold:g} in % / by chance, and residuals")
    names, pattern = short_names([site.fqn for site in sites])
    numbers = [str(number) for number in range(len(sites))]
    # `--layer` takes numbers; where the short names are these numbers, one column says both.
    numbered = names != numbers
    if numbered:
        table.add_column("#", justify="right", no_wrap=True)
    table.add_column(escape(pattern), overflow="fold")
    for between in (", ", "="):
        for pair in PAIRS:
            table.add_column(_spelled(pair, between), justify="right", no_wrap=True)
    for number, name, site in zip(numbers, names, sites, strict=True):
        first = [number, escape(name)] if numbered else [escape(name)]
        compared = [site.pairs.get(pair) for pair in PAIRS]
        table.add_row(*first, *map(_share, compared), *map(_residual, compared))
    return table


def _spelled(pair: str, between: str) -> str:
    return between.join(pair.upper())


def _share(pair: "PairRedundancy | None") -> str:
    return f"{pair.share:.1f}/{pair.share_by_chance:.1f}" if pair else "-"


def _residual(pair: "PairRedundancy | None") -> str:
    return f"{pair.residual:.3f}" if pair and pair.residual is not None else "-"


def _notes(sites: "Sequence[SiteRedundancy]") -> list[str]:
    """What a reader has to know about the table; each line once."""
    from armour_surgery.report.wording import grouped_names

    lines = [
        "By chance: the same entries in random order. Residual: what the best shared weight (joint-svd, from the "
        "weights alone) loses of logits and values, relative to their size."
    ]
    sites_by_remark: dict[str, list[str]] = {}
    for site in sites:
        for remark in _remarks(site):
            sites_by_remark.setdefault(remark, []).append(site.fqn)
    for remark, names in sites_by_remark.items():
        lines.append(f"{grouped_names(names)}: {remark}")
    refused = [pair for site in sites for pair in site.pairs.values() if pair.refused is not None]
    if refused:
        lines.append("-: no mode makes the two one there; `armour-surgery inspect` says why.")
    return lines


def _remarks(site: "SiteRedundancy") -> list[str]:
    """Which pairs of a site were not compared, or not all of their channels."""
    remarks = [f"{_spelled(pair, ' and ')} were not compared: {reason}" for pair, reason in site.skipped.items()]
    wider = "V is" if site.value_dim > site.key_dim else "Q and K are"
    shared = ", those that concat-half shares" if site.mode == "concat-half" else ""
    widest = max(site.key_dim, site.value_dim)
    # A set: pairs of which equally many were compared share a remark.
    for channels in {pair.channels for pair in site.pairs.values() if pair.channels < widest}:
        remarks.append(f"{wider} wider; the first {channels} channels of each head were compared{shared}")
    return remarks
