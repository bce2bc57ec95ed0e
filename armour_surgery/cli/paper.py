"""`armour-surgery paper`: the paper's Tables 1 to 4, counted again."""

from typing import TYPE_CHECKING

from armour_surgery.cli.options import AsJson
from armour_surgery.cli.run import command, console_for, print_json

if TYPE_CHECKING:
    from armour_surgery.measure.paper import Cell, Reproduction

__all__ = ["paper"]

_HEADERS = {
    "params": "paper, M",
    "params_change": "change",
    "top1": "top-1",
    "gpu": "GPU im/s",
    "gpu_change": "change",
    "cpu": "CPU im/s",
    "cpu_change": "change",
}


@command
def paper(as_json: AsJson = False) -> None:
    """Count parameters and MACs of every row of the paper's Tables 1 to 4, beside the printed numbers.

    Accuracy and throughput are the paper's own; they were not run here.
    """
    from rich.progress import Progress

    console = console_for(as_json)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("counting", total=None)

        def advance(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=name)

        from armour_surgery.measure.paper import regenerate

        result = regenerate(advance)
    if as_json:
        print_json(result.to_dict())
        return
    # A table of ten columns says nothing when its numbers are cut; a narrow terminal may wrap its lines.
    console.width = max(console.width, 132)
    for table in _tables(result):
        console.print(table)
    notes = dict.fromkeys(cell.note for row in result.rows for cell in row.cells if cell.note)
    for number, note in enumerate(notes, 1):
        console.print(f"[{number}] {note}", style="dim", markup=False)
    console.print(
        "\nParameters, MACs and their ratio are counted on timm's models. Top-1 and throughput are the paper's; "
        "they were not run here.",
        style="dim",
    )


def _tables(result: "Reproduction") -> list[object]:
    from armour_surgery.cli.tables import plain_table
    from armour_surgery.measure.paper_tables import CAPTIONS

    notes = {note: n for n, note in enumerate(dict.fromkeys(c.note for r in result.rows for c in r.cells if c.note), 1)}

    def text(cell: "Cell | None") -> str:
        if cell is None:
            return ""
        mark = f"  \\[{notes[cell.note]}]" if cell.note else ""
        return f"{cell.printed}{mark}"

    tables: list[object] = []
    for number, caption in CAPTIONS.items():
        rows = [row for row in result.rows if row.table == number]
        columns = [name for name in _HEADERS if any(cell.column == name for row in rows for cell in row.cells)]
        table = plain_table(f"Table {number}. {caption}")
        for header in ("model", "mode", "parameters", "MACs, M", "ratio"):
            table.add_column(header, justify="left" if header in ("model", "mode") else "right", no_wrap=True)
        for name in columns:
            table.add_column(_HEADERS[name], justify="right", no_wrap=True)
        for row in rows:
            cells = {cell.column: cell for cell in row.cells}
            table.add_row(
                row.name,
                row.mode,
                f"{row.params:,}",
                f"{row.macs / 1e6:,.1f}",
                f"{row.macs_ratio:.4f}" if row.macs_ratio else "",
                *(text(cells.get(name)) for name in columns),
            )
        tables.append(table)
    return tables
