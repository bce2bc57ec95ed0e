"""The paper's tables again: parameters and multiply-accumulates counted exactly, next to what was printed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

from armour_surgery.measure.cost import count_folded_params, count_macs, count_params
from armour_surgery.measure.paper_tables import CAPTIONS, COLUMNS, ROWS, PaperRow
from armour_surgery.sites import Source, SurgeryPlan

__all__ = ["Cell", "ReproducedRow", "Reproduction", "regenerate"]

# Our count gives the cell's number, another count that is told gives it, no count does, or it was not run.
SAME, EXPLAINED, DIFFERS, PAPER = "same", "explained", "differs", "paper"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Cell:
    """One printed number beside ours.

    `ours` is rounded to the printed digits, or "not run". `status` is "same" (ours is what was printed),
    "explained" (the printed number follows from another count, which `note` gives), "differs" (it does
    not), or "paper" (the paper's own measurement, which this package has not repeated).
    """

    column: str
    printed: str
    ours: str
    status: str
    note: str = ""


@dataclass(frozen=True)
class ReproducedRow:
    """One row of the paper, rebuilt. `params` and `macs` (for one image) are exact.

    `macs_ratio` is the baseline's MACs over this row's, the speed-up that arithmetic alone allows; None for a
    baseline. `params_folded` is what is left of `params` after BatchNorm folding.
    """

    table: int
    name: str
    model: str
    mode: str
    params: int
    params_folded: int
    macs: int
    macs_ratio: float | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Reproduction:
    """Every row of Tables 1 to 4, in the paper's order."""

    rows: tuple[ReproducedRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary: the tables with their rows, the cells of each by column."""
        return {
            "paper": "arXiv 2108.01778",
            "tables": [
                {
                    "table": table,
                    "caption": caption,
                    "rows": [_row_to_dict(row) for row in self.rows if row.table == table],
                }
                for table, caption in CAPTIONS.items()
            ],
        }


@dataclass(frozen=True)
class _Cost:
    params: int
    folded: int
    macs: int


def regenerate(progress: Callable[[int, int, str], None] | None = None) -> Reproduction:
    """Build the network of every row and count it. No weight is ever allocated; it takes under a minute.

    `progress` is called with the number of rows that are done, their total, and the name of the next.
    """
    costs: dict[tuple[str, str], _Cost] = {}
    rows = []
    for number, row in enumerate(ROWS):
        if progress is not None:
            progress(number, len(ROWS), row.name)
        baseline = _baseline(row)
        for part in (baseline, row):
            if (part.model, part.mode) not in costs:
                costs[part.model, part.mode] = _cost(part.model, part.mode)
        cost, base = costs[row.model, row.mode], costs[baseline.model, baseline.mode]
        rows.append(
            ReproducedRow(
                table=row.table,
                name=row.name,
                model=row.model,
                mode=row.mode,
                params=cost.params,
                params_folded=cost.folded,
                macs=cost.macs,
                macs_ratio=base.macs / cost.macs if row.mode else None,
                cells=tuple(_cell(column, row, baseline, cost, base) for column in COLUMNS if getattr(row, column)),
            )
        )
    return Reproduction(tuple(rows))


def _baseline(row: PaperRow) -> PaperRow:
    return next(other for other in ROWS if (other.table, other.model, other.mode) == (row.table, row.model, ""))


def _cost(name: str, mode: str) -> _Cost:
    # Imported here: of all measuring, only this needs what comes before it.
    from armour_surgery.conversion import convert
    from armour_surgery.hosts import build, example_input

    source = Source(library="timm", architecture=name)
    model = build(source)
    if not mode:
        macs = count_macs(model, example_input(model, batch_size=1)).macs
    else:
        model = convert(model, mode=mode, inplace=True, source=source)
        macs = cast(SurgeryPlan, model.surgery).macs_after
    return _Cost(count_params(model), count_folded_params(model), macs)


def _cell(column: str, row: PaperRow, baseline: PaperRow, cost: _Cost, base: _Cost) -> Cell:
    printed: str = getattr(row, column)
    if column == "params":
        return _params_cell(printed, cost)
    if column == "params_change":
        return _params_change_cell(printed, row, baseline, cost, base)
    if column.endswith("_change"):
        source = column.removesuffix("_change")
        return _throughput_change_cell(column, printed, getattr(baseline, source), getattr(row, source))
    return Cell(column, printed, NOT_RUN, PAPER)


def _params_cell(printed: str, cost: _Cost) -> Cell:
    digits = _digits(printed)
    ours = f"{cost.params / 1e6:.{digits}f}"
    if ours == printed:
        return Cell("params", printed, ours, SAME)
    if f"{cost.folded / 1e6:.{digits}f}" == printed:
        note = (
            f"counted for inference, every BatchNorm folded into its neighbor as LeViT's speed test does: "
            f"{cost.folded:,}; as trained: {cost.params:,}"
        )
        return Cell("params", printed, ours, EXPLAINED, note)
    return Cell("params", printed, ours, DIFFERS, f"{cost.params:,} as trained, {cost.folded:,} with BatchNorm folded")


def _params_change_cell(printed: str, row: PaperRow, baseline: PaperRow, cost: _Cost, base: _Cost) -> Cell:
    change = cost.params / base.params - 1
    ours = _percent(change)
    if ours == printed:
        return Cell("params_change", printed, ours, SAME)
    rounded = _percent(_number(row.params) / _number(baseline.params) - 1)
    exact = f"{cost.params - base.params:,} of {base.params:,} is {100 * change:.2f}%"
    if rounded == printed:
        note = f"worked out from the rounded cells ({row.params} and {baseline.params}); {exact}"
        return Cell("params_change", printed, ours, EXPLAINED, note)
    return Cell("params_change", printed, ours, DIFFERS, exact)


def _throughput_change_cell(column: str, printed: str, before: str, after: str) -> Cell:
    """Whether a printed speed-up is the ratio of the two printed throughputs, or could be before rounding."""
    ours = _percent(_number(after) / _number(before) - 1)
    if ours == printed:
        return Cell(column, printed, ours, SAME, "from the paper's own throughputs")
    half_before, half_after = (0.5 * 10 ** -_digits(text) for text in (before, after))
    low = 100 * ((_number(after) - half_after) / (_number(before) + half_before) - 1)
    high = 100 * ((_number(after) + half_after) / (_number(before) - half_before) - 1)
    target, half = float(printed.rstrip("%")), 0.5 * 10 ** -_digits(printed)
    note = (
        f"the paper's own throughputs, {before} and {after}, give {ours}; "
        f"before rounding, from {low:+.2f}% to {high:+.2f}%"
    )
    explained = low < target + half and high > target - half
    return Cell(column, printed, ours, EXPLAINED if explained else DIFFERS, note)


def _percent(change: float) -> str:
    return f"{100 * change:+.1f}%"


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _digits(text: str) -> int:
    return len(text.rstrip("%").partition(".")[2])


def _row_to_dict(row: ReproducedRow) -> dict[str, Any]:
    data = asdict(row)
    del data["table"]
    data["cells"] = {
        cell.column: {"printed": cell.printed, "ours": cell.ours, "status": cell.status, "note": cell.note}
        for cell in row.cells
    }
    return data
