"""`armour-surgery paper`: the paper's Tables 1 to 4, counted and timed again."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armour_surgery.cli.options import AsJson
from armour_surgery.cli.run import command, console_for, print_json
from armour_surgery.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from armour_surgery.paper.views import View

__all__ = ["paper"]

_BUDGET = 240.0


@command
def paper(
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure throughput, on the CPU and on a GPU if there is one.")
    ] = True,
    budget: Annotated[
        float, typer.Option(metavar="SECONDS", min=1.0, help="How long to measure throughput; counting comes on top.")
    ] = _BUDGET,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Also write it as a page.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Regenerate the paper's Tables 1 to 4 beside the printed numbers: parameters and MACs exactly, throughput here.

    Needs no network. Accuracy is the paper's own, with the recipe that would repeat it.
    """
    from rich.progress import Progress

    console = console_for(as_json)
    if markdown is not None:
        from armour_surgery.report.whole_file import check_target

        if markdown.suffix.lower() != ".md":
            raise UsageError(f"--markdown: the page is Markdown, and {str(markdown)!r} does not end in .md; name it so")
        check_target(markdown, "page")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("counting", total=None)

        def advance(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=name)

        from armour_surgery.benchmarking.speed import keep_memory
        from armour_surgery.paper import throughput, views
        from armour_surgery.paper.reproduction import regenerate

        if speed:
            keep_memory()
        result = regenerate(advance, budget_s=budget, devices=throughput.devices() if speed else ())
    if markdown is not None:
        from armour_surgery.report.whole_file import write_whole

        options = ["--no-speed"] if not speed else [f"--budget {budget:g}"] if budget != _BUDGET else []
        shown = markdown.name if markdown.is_absolute() else str(markdown)
        written = " ".join(["armour-surgery paper", *options, f"--markdown {shlex.quote(shown)}"])
        write_whole(markdown, views.markdown_page(result, written).encode(), "page")
    if as_json:
        print_json(result.to_dict())
        return
    for view in views.views(result):
        console.print(_table(view))
    for number, note in enumerate(views.notes(result), 1):
        console.print(f"[{number}] {note}", style="dim", markup=False)
    console.print()
    for line in views.remarks(result):
        console.print(line, style="dim", markup=False)
    if markdown is not None:
        console.print(f"Written: {markdown}", markup=False, soft_wrap=True)


def _table(view: "View") -> "Table":
    from rich.markup import escape

    from armour_surgery.cli.tables import plain_table

    table = plain_table(view.caption)
    table.padding = (0, 1, 0, 0)
    for place, header in enumerate(view.headers):
        left = place == 0 or header in ("mode", "recipe")
        table.add_column(header, justify="left" if left else "right", no_wrap=True)
    for row in view.rows:
        table.add_row(*map(escape, row))
    return table
