"""`armour-surgery paper`: the paper's Tables 1 to 4, counted and timed again."""

from pathlib import Path
from typing import Annotated

import typer

from armour_surgery.cli.options import AsJson, MarkdownPage, check_page, page_option
from armour_surgery.cli.progress import progress_bar
from armour_surgery.cli.run import command, console_for, print_json

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
    markdown: MarkdownPage = None,
    as_json: AsJson = False,
) -> None:
    """Regenerate the paper's Tables 1 to 4 beside the printed numbers: parameters and MACs exactly, throughput here.

    Needs no network. Accuracy is the paper's own, with the recipe that would repeat it.
    """
    console = console_for(as_json)
    check_page(markdown)
    with progress_bar(console, "counting") as tell:
        from armour_surgery.benchmarking.speed import keep_memory
        from armour_surgery.paper import throughput, views
        from armour_surgery.paper.reproduction import regenerate

        if speed:
            keep_memory()
        result = regenerate(tell, budget_s=budget, devices=throughput.devices() if speed else ())
    if not console.is_terminal:
        # What is written to a file starts with an empty line; it did before there was one bar for all commands.
        console.print()
    if markdown is not None:
        from armour_surgery.report.whole_file import write_whole

        page = views.markdown_page(result, _command_line(speed, budget, markdown))
        write_whole(markdown, page.encode(), "page")
    if as_json:
        print_json(result.to_dict())
        return
    from armour_surgery.cli.tables import Shown

    for view in views.views(result):
        console.print(Shown(view.table()))
    for number, note in enumerate(views.notes(result), 1):
        console.print(f"[{number}] {note}", style="dim", markup=False)
    console.print()
    for line in views.remarks(result):
        console.print(line, style="dim", markup=False)
    if markdown is not None:
        console.print(f"Written: {markdown}", markup=False, soft_wrap=True)


def _command_line(speed: bool, budget: float, markdown: Path) -> str:
    """The command that makes the same page, for whoever reads the page; without options that are as by default."""
    words = ["armour-surgery paper"]
    if not speed:
        words.append("--no-speed")
    elif budget != _BUDGET:
        words.append(f"--budget {budget:g}")
    words.append(page_option(markdown))
    return " ".join(words)
