"""`armour-surgery inspect MODEL`."""

import shlex

from armour_surgery.cli.options import (
    AsJson,
    Checkpoint,
    ImgSize,
    InChans,
    Model,
    NumClasses,
    Pretrained,
    read_model,
)
from armour_surgery.cli.run import command, console_for, print_json

__all__ = ["inspect"]


@command
def inspect(
    model: Model,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    as_json: AsJson = False,
) -> None:
    """Show every attention of MODEL: its projections and sizes, which modes fit, and why others do not.

    Structure is all it looks at, so it needs no weights and no network.
    """
    console = console_for(as_json)
    with console.status("building the model"):
        from armour_surgery import inspect as inspect_model

        host, _ = read_model(model, pretrained, checkpoint, img_size, num_classes, in_chans)
    with console.status("following q, k and v"):
        sites = inspect_model(host)
    if as_json:
        print_json({"model": model, "sites": [site.to_dict() for site in sites]})
        return
    from rich.markup import escape

    from armour_surgery.cli.tables import site_table

    table, reasons = site_table(sites)
    console.print(f"[bold]{escape(model)}[/bold]: {len(sites)} attention sites in a {type(host).__name__}")
    console.print(table)
    for reason in reasons:
        console.print(f"  {reason}", style="dim", markup=False)
    fitting = [site for site in sites if site.modes]
    if fitting:
        console.print(f"\nNext: armour-surgery convert {shlex.quote(model)}", markup=False, soft_wrap=True)
