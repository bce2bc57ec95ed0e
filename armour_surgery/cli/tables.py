"""Tables that a person enjoys reading, at any width of a terminal: numbers stay whole, names give way."""

from collections.abc import Mapping, Sequence
from statistics import median

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from armour_surgery import views
from armour_surgery.records import FrontierPoint, Sensitivity, SurgeryPlan
from armour_surgery.report.wording import fidelity_clause, measured_on
from armour_surgery.spelled import change, grouped_names, millions, way
from armour_surgery.tabular import Table

__all__ = ["Shown", "cost_table", "fidelity_lines", "frontier_table", "sensitivity_table"]

# Rows that a table of choices has at most.
_CHOICES = 24
# Sites that are named for their residual.
_WORST = 3
# Letters of the longest bar.
_BAR = 12
# And where names need the room.
_SHORT_BAR = 6


class Shown:
    """A table as wide as the terminal allows; `styles` are those of rows, by number."""

    def __init__(self, view: Table, styles: Mapping[int, str] | None = None, *, caption: bool = True) -> None:
        self.view = view
        self._styles = styles or {}
        self._caption = view.caption if caption else ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        layout = self.view.laid_out(options.max_width)
        yield Text(f"{self._caption}\n" if self._caption else "", "bold")
        yield Text("\n".join(layout.head), "bold", no_wrap=True)
        yield Text(layout.rule("\u2500"), no_wrap=True)
        for number, row in enumerate(layout.rows):
            yield Text("\n".join(row), self._styles.get(number, ""), no_wrap=True)
        yield Text("")


def cost_table(surgery: SurgeryPlan) -> Shown:
    """Sites by mode and rank, and the model's cost before and after."""
    rows: list[tuple[str, ...]] = []
    for label, alike in views.sites_by_way(surgery.sites).items():
        names = grouped_names([site.fqn for site in alike])
        before = sum(site.params_before for site in alike)
        after = sum(site.params_after for site in alike)
        rows.append((f"{names}  ({label})", "", "", ""))
        # A space that is not broken at sets the line under the one that it is a part of.
        rows.append(("\u00a0\u00a0attention parameters", *_cost_cells(before, after)))
    if surgery.mlps:
        before, after, label = views.mlp_row(surgery)
        rows.append((f"{grouped_names([mlp.fqn for mlp in surgery.mlps])}  ({label})", "", "", ""))
        rows.append(("\u00a0\u00a0MLP parameters", *_cost_cells(before, after)))
    rows.append(("parameters", *_cost_cells(surgery.params_before, surgery.params_after)))
    rows.append(("MACs per image", *_cost_cells(surgery.macs_before, surgery.macs_after)))
    headers = ("", "before", "after", "change")
    bold = dict.fromkeys((len(rows) - 2, len(rows) - 1), "bold")
    return Shown(Table("", headers, rows, frozenset((1, 2, 3))), bold)


def _cost_cells(before: int, after: int) -> tuple[str, str, str]:
    return millions(before), millions(after), change(before, after)


def fidelity_lines(surgery: SurgeryPlan) -> list[str]:
    """How near a converted model is to its original, and which sites lost most; empty where nothing was compared."""
    lines = []
    near = surgery.fidelity
    if near is not None:
        lines.append(f"On {measured_on(near)}: {fidelity_clause(near)}.")
    residuals = {site.fqn: site.residual for site in surgery.sites if site.residual is not None}
    # After wq a residual only says how far two weights were apart, and of one site there is no median.
    if len(residuals) > 1 and surgery.init != "wq":
        worst = sorted(residuals, key=lambda fqn: -residuals[fqn])[:_WORST]
        listed = ", ".join(f"{fqn} {residuals[fqn]:.3f}" for fqn in worst)
        lines.append(f"Residual of the sites: median {median(residuals.values()):.3f}; the largest: {listed}.")
    return lines


def sensitivity_table(sensitivities: Sequence[Sensitivity]) -> Shown:
    """What each site costs alone, with bars; see `views.sensitivity_table`."""
    view = views.sensitivity_table(sensitivities)
    largest = max((trial.loss for trial in sensitivities), default=0.0)
    rows = [(*row, _bar(trial.loss, largest)) for row, trial in zip(view.rows, sensitivities, strict=True)]
    headers = (*view.headers, "")
    return Shown(Table(view.caption, headers, rows, view.right, whole=frozenset((len(headers) - 1,)), spare=1))


def frontier_table(points: Sequence[FrontierPoint], params_before: int, chosen: FrontierPoint | None = None) -> Shown:
    """Choices from the largest model to the smallest, the `chosen` one in bold with a mark.

    Of more choices than a screen has room for, evenly spaced ones are shown, and always the first, the last, the chosen
    and those that were measured.
    """
    ordered = sorted(points, key=lambda point: -point.params)
    # Rounded up, and 1 where there is no point.
    step = -(-len(ordered) // _CHOICES) or 1
    rows: list[tuple[str, ...]] = []
    bold: dict[int, str] = {}
    for place, point in enumerate(ordered):
        evenly_spaced = place % step == 0 or place == len(ordered) - 1
        if not evenly_spaced and point.measured is None and point != chosen:
            continue
        if point == chosen:
            bold[len(rows)] = "bold"
        row = (
            ">" if point == chosen else "",
            millions(point.params),
            change(params_before, point.params),
            f"{point.predicted:.5f}",
            f"{point.measured:.5f}" if point.measured is not None else "-",
            _converted(point),
            _bar(point.predicted, ordered[-1].predicted, _SHORT_BAR),
        )
        rows.append(row)
    headers = ("", "parameters", "change", "predicted loss", "measured loss", "converted", "")
    view = Table("Parameters against loss", headers, rows, frozenset((1, 2, 3, 4)), whole=frozenset((6,)), spare=1)
    return Shown(view, bold)


def _converted(point: FrontierPoint) -> str:
    """`blocks.0-3.attn (qv); blocks.7.attn (qv, rank 32)`, or `nothing`."""
    # Sites that are converted alike are named together.
    names_by_way: dict[str, list[str]] = {}
    for fqn, mode, rank in point.sites:
        names_by_way.setdefault(way(mode, rank), []).append(fqn)
    return "; ".join(f"{grouped_names(names)} ({label})" for label, names in names_by_way.items()) or "nothing"


def _bar(value: float, largest: float, letters: int = _BAR) -> str:
    return "\u2501" * round(letters * max(value, 0.0) / largest) if largest > 0 else ""
