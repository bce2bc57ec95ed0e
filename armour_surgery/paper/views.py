"""The paper's tables for people: what was printed and what was found here, side by side, as text and as a page."""

from collections.abc import Iterable
from dataclasses import dataclass

from armour_surgery.paper.printed import CAPTIONS
from armour_surgery.paper.reproduction import Cell, ReproducedRow, Reproduction

__all__ = ["View", "markdown_page", "notes", "remarks", "views"]

_TITLE = "Armour's Tables 1 to 4, again"
_DEVICES = {"cpu": "CPU", "cuda": "GPU"}
# Where recipes lie, seen from docs/.
_RECIPES = "../recipes"


@dataclass(frozen=True)
class View:
    """One table: a caption, names of columns, and rows of text. `recipes` says that the last column names recipes."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    recipes: bool = False


def views(result: Reproduction) -> list[View]:
    """For each of the paper's tables one about sizes and one about throughput; then one about accuracy.

    `[1]` marks what the first of the `notes` explains.
    """
    marks = {note: f" [{number}]" for number, note in enumerate(notes(result), 1)}
    found = []
    for number, caption in CAPTIONS.items():
        rows = [row for row in result.rows if row.table == number]
        if rows:
            found += [_sizes(f"Table {number}. {caption}", rows, marks), _speeds(number, rows, marks)]
    return [*found, _accuracies(result.rows)]


def notes(result: Reproduction) -> list[str]:
    """What explains the cells that are not simply the same, each once."""
    cells = (cell for row in result.rows for cell in row.cells)
    return list(dict.fromkeys(_note(cell) for cell in cells if cell.status in ("explained", "differs")))


def remarks(result: Reproduction) -> list[str]:
    """How the numbers came about."""
    lines = ["Parameters and MACs (of one image) are counted on timm's models. Cells of the paper are as printed."]
    for device, here in result.environments.items():
        lines.append(
            f"{_DEVICES[device]} here: {here.processor}, {here.cores} cores, {here.threads} threads, "
            f"torch {here.torch}, timm {here.timm}, {here.system}."
        )
    if result.environments:
        lines.append(
            "Eager mode, float32, random weights, BatchNorm not folded. Networks took turns with the one without a "
            "mode; ratio: the median over rounds of how many times faster they were than it, with the quartiles. "
            "EfficientNet-B0 took turns with DeiT-Ti. The paper's machines were one NVIDIA V100 and one Intel Xeon "
            "E5-2686."
        )
    else:
        lines.append("Throughput is the paper's; it was not run here.")
    if "cuda" not in result.environments:
        lines.append("No GPU was used.")
    lines.append("Accuracy is the paper's: no run on ImageNet is recorded here. A recipe is what would repeat it.")
    return lines


def markdown_page(result: Reproduction, command: str) -> str:
    """All of it as Markdown, for a page in docs/. `command` is what made it."""
    parts = [f"# {_TITLE}", "\n".join(remarks(result)), f"```\n{command}\n```"]
    for view in views(result):
        parts += [f"## {view.caption}", _markdown_table(view)]
    explained = [f"[{number}] {note}" for number, note in enumerate(notes(result), 1)]
    return "\n\n".join([*parts, *(["## Notes"] if explained else []), *explained]) + "\n"


def _markdown_table(view: View) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def linked(row: tuple[str, ...]) -> tuple[str, ...]:
        name = row[-1]
        return (*row[:-1], f"[{name}]({_RECIPES}/{name}.yaml)" if view.recipes and name != "-" else name)

    sides = ["---", *("---:" for _ in view.headers[1:])]
    return "\n".join([line(view.headers), line(sides), *(line(linked(row)) for row in view.rows)])


def _note(cell: Cell) -> str:
    return f"the paper prints {cell.printed}: {cell.note}" if cell.column.endswith("_change") else cell.note


def _sizes(caption: str, rows: list[ReproducedRow], marks: dict[str, str]) -> View:
    changes = any(cell.column == "params_change" for row in rows for cell in row.cells)
    headers = ("model", "mode", "parameters", "paper, M", *(["change"] if changes else []), "MACs, M", "ratio")
    lines = []
    for row in rows:
        cells = {cell.column: cell for cell in row.cells}
        change = [_printed(cells.get("params_change"), marks)] if changes else []
        ratio = f"{row.macs_ratio:.4f}" if row.macs_ratio else "-"
        size = (f"{row.params:,}", _printed(cells.get("params"), marks), *change, f"{row.macs / 1e6:,.1f}", ratio)
        lines.append((row.name, row.mode or "-", *size))
    return View(caption, headers, tuple(lines))


def _speeds(number: int, rows: list[ReproducedRow], marks: dict[str, str]) -> View:
    devices = [device for device in _DEVICES if any(device in row.speed for row in rows)]
    columns = [name for name in ("gpu", "cpu") if any(cell.column == name for row in rows for cell in row.cells)]
    headers = ["model"]
    for device in devices:
        headers += ["batch", f"{_DEVICES[device]} im/s", "ratio", "quartiles"]
    headers += ["MACs", *(f"paper's {name.upper()}" for name in columns)]
    lines = []
    for row in rows:
        line = [row.name]
        for device in devices:
            line += _measured(row, device)
        line.append(f"{row.macs_ratio:.3f}" if row.macs_ratio else "-")
        lines.append((*line, *(_of_the_paper(row, name, marks) for name in columns)))
    return View(f"Table {number}, throughput and ratios", tuple(headers), tuple(lines))


def _measured(row: ReproducedRow, device: str) -> list[str]:
    speed = row.speed[device]
    ratio, quartiles = "-", "-"
    if speed.ratio is not None and speed.ratio_iqr is not None:
        ratio, quartiles = f"{speed.ratio:.3f}", "{:.2f}-{:.2f}".format(*speed.ratio_iqr)
    return [str(speed.batch_size), _short(speed.images_per_s), ratio, quartiles]


def _short(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"


def _of_the_paper(row: ReproducedRow, column: str, marks: dict[str, str]) -> str:
    cells = {cell.column: cell for cell in row.cells}
    if column not in cells:
        return "-"
    ratio = f" {row.paper_ratio[column]:.3f}" if column in row.paper_ratio else ""
    change = cells.get(f"{column}_change")
    return f"{cells[column].printed}{ratio}{marks.get(_note(change), '') if change else ''}"


def _accuracies(rows: Iterable[ReproducedRow]) -> View:
    lines = []
    for row in rows:
        cell = next((cell for cell in row.cells if cell.column == "top1"), None)
        if cell is not None:
            lines.append((row.name, cell.printed, cell.ours, row.recipe or "-"))
    return View("ImageNet top-1", ("model", "paper", "here", "recipe"), tuple(lines), recipes=True)


def _printed(cell: Cell | None, marks: dict[str, str]) -> str:
    return f"{cell.printed}{marks.get(_note(cell), '')}" if cell is not None else "-"
