"""The paper's tables for people: what was printed and what was found here, side by side, as text and as a page."""

from collections.abc import Sequence
from dataclasses import dataclass

from armour_surgery.paper.printed import CAPTIONS
from armour_surgery.paper.reproduction import Cell, ReproducedRow, Reproduction
from armour_surgery.tabular import Table

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

    def table(self) -> Table:
        """The same with its names to the left and its numbers to the right."""
        names = ("model", "mode", "recipe")
        right = frozenset(place for place, header in enumerate(self.headers) if header not in names)
        return Table(self.caption, self.headers, list(self.rows), right)


def views(result: Reproduction) -> list[View]:
    """For each of the paper's tables one about sizes and one about throughput; then one about accuracy.

    `[1]` marks what the first of the `notes` explains.
    """
    marks = {note: f" [{number}]" for number, note in enumerate(notes(result), 1)}
    listed = []
    for number, caption in CAPTIONS.items():
        rows = [row for row in result.rows if row.table == number]
        if rows:
            listed += [_sizes(f"Table {number}. {caption}", rows, marks), *_speeds(number, rows, marks)]
    return [*listed, _accuracies(result.rows)]


def notes(result: Reproduction) -> list[str]:
    """What explains the cells that are not simply the same, each once."""
    explained: dict[str, None] = {}  # an ordered set
    for row in result.rows:
        for cell in row.cells:
            if cell.status in ("explained", "differs"):
                explained[_note(cell)] = None
    return list(explained)


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
    if explained:
        parts += ["## Notes", *explained]
    return "\n\n".join(parts) + "\n"


def _markdown_table(view: View) -> str:
    # Names to the left, numbers to the right.
    sides = ["---", *["---:"] * (len(view.headers) - 1)]
    lines = [_markdown_line(view.headers), _markdown_line(sides)]
    for row in view.rows:
        cells = list(row)
        if view.recipes and cells[-1] != "-":
            cells[-1] = f"[{cells[-1]}]({_RECIPES}/{cells[-1]}.yaml)"
        lines.append(_markdown_line(cells))
    return "\n".join(lines)


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _note(cell: Cell) -> str:
    """A cell's note. That of a change says what was printed, which no column of these tables does."""
    return f"the paper prints {cell.printed}: {cell.note}" if cell.column.endswith("_change") else cell.note


def _sizes(caption: str, rows: Sequence[ReproducedRow], marks: dict[str, str]) -> View:
    # Only some of the paper's tables have this column.
    changes = _has_column(rows, "params_change")
    headers = ["model", "mode", "parameters", "paper, M", "MACs, M", "ratio"]
    if changes:
        headers.insert(4, "change")
    lines = []
    for row in rows:
        cells = _cells(row)
        line = [row.name, row.mode or "-", f"{row.params:,}", _printed(cells.get("params"), marks)]
        if changes:
            line.append(_printed(cells.get("params_change"), marks))
        line += [f"{row.macs / 1e6:,.1f}", f"{row.macs_ratio:.4f}" if row.macs_ratio else "-"]
        lines.append(tuple(line))
    return View(caption, tuple(headers), tuple(lines))


def _speeds(number: int, rows: Sequence[ReproducedRow], marks: dict[str, str]) -> list[View]:
    """One table, or where two devices were timed one for each: a terminal has no room for both side by side."""
    timed: set[str] = set()
    for row in rows:
        timed.update(row.speed)
    devices = [device for device in _DEVICES if device in timed]
    columns = [column for column in ("gpu", "cpu") if _has_column(rows, column)]
    caption = f"Table {number}, throughput and ratios"
    if len(devices) < 2:
        return [_speed_view(caption, rows, marks, devices, columns)]
    listed = []
    for device in devices:
        of_its_kind = [column for column in columns if column.upper() == _DEVICES[device]]
        listed.append(_speed_view(f"{caption}, {_DEVICES[device]}", rows, marks, [device], of_its_kind))
    return listed


def _speed_view(
    caption: str,
    rows: Sequence[ReproducedRow],
    marks: dict[str, str],
    devices: Sequence[str],
    columns: Sequence[str],
) -> View:
    headers = ["model"]
    for device in devices:
        headers += ["batch", f"{_DEVICES[device]} im/s", "ratio", "quartiles"]
    headers.append("MACs")
    headers += [f"paper's {column.upper()}" for column in columns]
    lines = []
    for row in rows:
        line = [row.name]
        for device in devices:
            line += _measured(row, device)
        line.append(f"{row.macs_ratio:.3f}" if row.macs_ratio else "-")
        line += [_of_the_paper(row, column, marks) for column in columns]
        lines.append(tuple(line))
    return View(caption, tuple(headers), tuple(lines))


def _cells(row: ReproducedRow) -> dict[str, Cell]:
    return {cell.column: cell for cell in row.cells}


def _has_column(rows: Sequence[ReproducedRow], column: str) -> bool:
    return any(column in _cells(row) for row in rows)


def _measured(row: ReproducedRow, device: str) -> list[str]:
    speed = row.speed[device]
    ratio, quartiles = "-", "-"
    if speed.ratio is not None and speed.ratio_iqr is not None:
        low, high = speed.ratio_iqr
        ratio, quartiles = f"{speed.ratio:.3f}", f"{low:.2f}-{high:.2f}"
    return [str(speed.batch_size), _short(speed.images_per_s), ratio, quartiles]


def _short(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"


def _of_the_paper(row: ReproducedRow, column: str, marks: dict[str, str]) -> str:
    cells = _cells(row)
    if column not in cells:
        return "-"
    ratio = f" {row.paper_ratio[column]:.3f}" if column in row.paper_ratio else ""
    change = cells.get(f"{column}_change")
    mark = marks.get(_note(change), "") if change else ""
    return f"{cells[column].printed}{ratio}{mark}"


def _accuracies(rows: Sequence[ReproducedRow]) -> View:
    lines = []
    for row in rows:
        cell = _cells(row).get("top1")
        if cell is not None:
            lines.append((row.name, cell.printed, cell.ours, row.recipe or "-"))
    return View("ImageNet top-1", ("model", "paper", "here", "recipe"), tuple(lines), recipes=True)


def _printed(cell: Cell | None, marks: dict[str, str]) -> str:
    return f"{cell.printed}{marks.get(_note(cell), '')}" if cell is not None else "-"
