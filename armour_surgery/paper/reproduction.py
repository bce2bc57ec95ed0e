"""The paper's tables again: parameters and multiply-accumulates counted exactly, throughput measured, beside the paper.

Networks are timed together with those that they are held against, and counted at the same time.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from torch import nn

from armour_surgery.benchmarking.environment import Environment
from armour_surgery.measure.cost import count_folded_params, count_macs, count_params
from armour_surgery.paper.printed import CAPTIONS, COLUMNS, RECIPES, ROWS, PaperRow
from armour_surgery.paper.throughput import Network, RowSpeed, time_group
from armour_surgery.records import Progress, Source, SurgeryPlan

__all__ = ["Cell", "ReproducedRow", "Reproduction", "regenerate"]

# Our count gives the cell's number, another count that is told gives it, no count does, it was not run, or it was
# measured here, on another machine than the paper's.
SAME, EXPLAINED, DIFFERS, PAPER, MEASURED = "same", "explained", "differs", "paper", "measured"
NOT_RUN = "not run"
# The column of the paper in which a device's throughput stands.
_COLUMNS = {"cpu": "cpu", "cuda": "gpu"}


@dataclass(frozen=True)
class Cell:
    """One printed number beside ours.

    `ours` is rounded to the printed digits, or "not run". `status` is "same" (ours is what was printed),
    "explained" (the printed number follows from another count, which `note` gives), "differs" (it does
    not), "paper" (the paper's own measurement, which was not repeated), or "measured" (it was, on this machine).
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
    baseline. `params_folded` is what is left of `params` after BatchNorm folding. `paper_ratio` is the paper's
    throughput over that of the row it is held against, on its `gpu` and its `cpu`; `speed` is what was measured here,
    by device. `recipe` names the shipped recipe that trains the row as the paper did, "" where there is none.
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
    recipe: str = ""
    paper_ratio: dict[str, float] = field(default_factory=dict)
    speed: dict[str, RowSpeed] = field(default_factory=dict)


@dataclass(frozen=True)
class Reproduction:
    """Every row of Tables 1 to 4, in the paper's order. `environments` has each device that was timed on."""

    rows: tuple[ReproducedRow, ...]
    environments: dict[str, Environment] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary: the tables with their rows, the cells of each by column."""
        tables = []
        for number, caption in CAPTIONS.items():
            rows = [_row_to_dict(row) for row in self.rows if row.table == number]
            tables.append({"table": number, "caption": caption, "rows": rows})
        return {
            "paper": "arXiv 2108.01778",
            "environment": {device: place.to_dict() for device, place in self.environments.items()},
            "tables": tables,
        }


@dataclass(frozen=True)
class _Cost:
    """What a network costs: parameters, parameters after BatchNorm folding, and MACs of one image."""

    params: int
    folded: int
    macs: int


def regenerate(
    progress: Progress | None = None,
    *,
    budget_s: float = 0.0,
    devices: Sequence[str] = (),
) -> Reproduction:
    """Build the network of every row and count it; with `devices`, also time it there, for `budget_s` seconds in all.

    To count, no weight is ever allocated; it takes under a minute. The budget is for timing alone, and a little more is
    used where the slowest networks' two rounds need it. `progress` is called with the name of the next network, the
    number of those that are done, and their total.
    """
    tell = progress or (lambda what, finished, total: None)
    groups = _groups()
    total, done = sum(map(len, groups)), 0
    costs: dict[Network, _Cost] = {}
    speeds: dict[Network, dict[str, RowSpeed]] = {}
    environments: dict[str, Environment] = {}
    left = budget_s
    # One group after the other: no more of them are in memory than are timed together.
    for members in groups:
        networks: dict[Network, nn.Module] = {}
        hosts: dict[str, nn.Module] = {}
        for number, (name, mode) in enumerate(members):
            tell(f"{name} {mode}".strip(), done + number, total)
            networks[name, mode], costs[name, mode] = _build(name, mode, hosts)
        reference = members[0]
        for place, device in enumerate(devices):
            tell(f"timing {reference[0]} on {device}", done, total)
            # A share of what is left, not of all: what one group leaves over is there for the others. It is the group's
            # part of all timings that are still to come, a timing being a network on a device.
            to_come = (total - done) * len(devices) - place * len(members)
            share = left * len(members) / to_come
            started = time.perf_counter()
            measured, environments[device] = time_group(
                networks, _image(networks), costs[reference].macs, device, share
            )
            left = max(0.0, left - (time.perf_counter() - started))
            for network, speed in measured.items():
                speeds.setdefault(network, {})[device] = speed
        done += len(members)
    return Reproduction(tuple(_row(row, costs, speeds) for row in ROWS), environments)


def _groups() -> list[list[Network]]:
    """Networks that are timed together; the others are held against the first."""
    groups: dict[str, list[Network]] = {}
    for row in ROWS:
        reference = _reference(row).model
        members = groups.setdefault(reference, [(reference, "")])
        # Rows that differ in training alone have the same network.
        if (row.model, row.mode) not in members:
            members.append((row.model, row.mode))
    return list(groups.values())


def _baseline(row: PaperRow) -> PaperRow:
    """The row of the same table and model in which nothing is converted."""
    return next(other for other in ROWS if (other.table, other.model, other.mode) == (row.table, row.model, ""))


def _reference(row: PaperRow) -> PaperRow:
    """What a row's throughput is held against: its baseline, or for a model of its own kind the table's first one."""
    for other in ROWS:
        if other.model == row.model and other.mode:
            return _baseline(row)
    return _baseline(next(other for other in ROWS if other.table == row.table))


def _build(name: str, mode: str, hosts: dict[str, nn.Module]) -> tuple[nn.Module, _Cost]:
    """A network without weights, and what it costs. `hosts` keeps unconverted ones, by name."""
    # Imported here: of all measuring, only this needs what comes before it.
    from armour_surgery.hosts import build, example_input
    from armour_surgery.surgery.conversion import convert

    source = Source(library="timm", architecture=name)
    # Built once for all modes: `convert` leaves a host as it is.
    if name not in hosts:
        hosts[name] = build(source)
    model = hosts[name]
    if mode:
        model = convert(model, mode=mode, source=source)
        macs = cast(SurgeryPlan, model.surgery).macs_after
    else:
        macs = count_macs(model, example_input(model, batch_size=1)).macs
    return model, _Cost(count_params(model), count_folded_params(model), macs)


def _image(networks: Mapping[Network, nn.Module]) -> tuple[int, ...]:
    from armour_surgery.hosts import example_input

    network = next(iter(networks.values()))
    images = next(iter(example_input(network).values()))
    return tuple(images.shape[1:])


def _row(row: PaperRow, costs: Mapping[Network, _Cost], speeds: Mapping[Network, dict[str, RowSpeed]]) -> ReproducedRow:
    baseline, reference = _baseline(row), _reference(row)
    cost, base = costs[row.model, row.mode], costs[baseline.model, ""]
    speed = speeds.get((row.model, row.mode), {})
    ratios = {}
    for column in _COLUMNS.values():
        own, other = getattr(row, column), getattr(reference, column)
        if own and other and row is not reference:
            ratios[column] = _number(own) / _number(other)
    cells = [_cell(column, row, baseline, cost, base, speed) for column in COLUMNS if getattr(row, column)]
    return ReproducedRow(
        table=row.table,
        name=row.name,
        model=row.model,
        mode=row.mode,
        params=cost.params,
        params_folded=cost.folded,
        macs=cost.macs,
        macs_ratio=base.macs / cost.macs if row.mode else None,
        cells=tuple(cells),
        recipe=RECIPES.get(row.name, "") if row.top1 else "",
        paper_ratio=ratios,
        speed=speed,
    )


def _cell(
    column: str, row: PaperRow, baseline: PaperRow, cost: _Cost, base: _Cost, speed: Mapping[str, RowSpeed]
) -> Cell:
    printed: str = getattr(row, column)
    if column == "params":
        return _params_cell(printed, cost)
    if column == "params_change":
        return _params_change_cell(printed, row, baseline, cost, base)
    if column.endswith("_change"):
        source = column.removesuffix("_change")
        return _throughput_change_cell(column, printed, getattr(baseline, source), getattr(row, source))
    for device, measured in speed.items():
        if _COLUMNS[device] == column:
            return Cell(column, printed, f"{measured.images_per_s:,.1f}", MEASURED)
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
    # A printed number stands for all that round to it: half of its last digit to each side. The printed speed-up is
    # explained if any two throughputs that round to the printed ones have a ratio that rounds to it.
    half_before, half_after = _half_digit(before), _half_digit(after)
    low = 100 * ((_number(after) - half_after) / (_number(before) + half_before) - 1)
    high = 100 * ((_number(after) + half_after) / (_number(before) - half_before) - 1)
    target, half = float(printed.rstrip("%")), _half_digit(printed)
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
    """Digits after the point."""
    return len(text.rstrip("%").partition(".")[2])


def _half_digit(text: str) -> float:
    return float(0.5 * 10 ** -_digits(text))


def _row_to_dict(row: ReproducedRow) -> dict[str, Any]:
    data = asdict(row)
    # The table stands above its rows, and a cell's column before the cell.
    del data["table"]
    data["cells"] = {cell.pop("column"): cell for cell in data["cells"]}
    return data
