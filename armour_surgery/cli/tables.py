"""Tables that a person enjoys reading: sites that are alike share a row."""

from collections.abc import Sequence
from statistics import median

from rich import box
from rich.console import JustifyMethod, OverflowMethod
from rich.markup import escape
from rich.table import Table

from armour_surgery.records import AttentionSite, FrontierPoint, RefusedSite, Sensitivity, SitePlan, SurgeryPlan
from armour_surgery.report.wording import change, fidelity_clause, grouped_names, millions, way

__all__ = [
    "cost_table",
    "fidelity_lines",
    "frontier_table",
    "plain_table",
    "refused_lines",
    "sensitivity_table",
    "site_table",
]

# Rows that a table of choices has at most.
_CHOICES = 24
# Sites that are named for their residual.
_WORST = 3
# Letters of the longest bar.
_BAR = 12


def plain_table(title: str | None = None) -> Table:
    """The look that all our tables have."""
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def site_table(sites: Sequence[AttentionSite]) -> tuple[Table, list[str]]:
    """The sites of a model, those that are alike in one row, and the reasons why modes do not fit."""
    table = plain_table()
    for column in ("attention", "heads", "key x value", "q, k, v from", "modes that fit"):
        table.add_column(column, overflow="fold")
    groups: dict[tuple[object, ...], list[AttentionSite]] = {}
    for site in sites:
        groups.setdefault(_likeness(site), []).append(site)
    reasons: list[str] = []
    for alike in groups.values():
        site = alike[0]
        names = grouped_names([member.fqn for member in alike])
        table.add_row(
            names,
            str(site.num_heads or "-"),
            f"{site.key_dim} x {site.value_dim}" if site.key_dim else "-",
            _projections(site),
            ", ".join(site.modes) or f"none ({site.kind})",
        )
        reasons += _reasons(site, names)
    # Sites of other sizes are often refused for the same reason.
    return table, list(dict.fromkeys(reasons))


def _likeness(site: AttentionSite) -> tuple[object, ...]:
    """What sites that share a row have in common: everything that the row and the reasons say, but for the name."""
    return (
        site.kind,
        site.num_heads,
        site.key_dim,
        site.value_dim,
        _local_names(site),
        site.modes,
        tuple(site.refused.items()),
    )


def _local_names(site: AttentionSite) -> tuple[str, ...]:
    """The projections of q, k and v, as they are called inside the site."""
    return tuple(role.fqn[len(site.fqn) :].lstrip(".") for role in (site.q, site.k, site.v) if role)


def _projections(site: AttentionSite) -> str:
    """The projections' names inside the site, a packed one once."""
    return ", ".join(dict.fromkeys(_local_names(site))) or "-"


def _reasons(site: AttentionSite, names: str) -> list[str]:
    """Why modes do not fit. A site that takes none was not followed, and all modes have the same reason."""
    if not site.modes:
        return [f"{names}: {next(iter(site.refused.values()))}"]
    modes_by_reason: dict[str, list[str]] = {}
    for mode, reason in site.refused.items():
        modes_by_reason.setdefault(reason, []).append(mode)
    return [f"not {', '.join(modes)}: {reason}" for reason, modes in modes_by_reason.items()]


def refused_lines(refused: Sequence[RefusedSite]) -> list[str]:
    """Sites that were left alone, grouped by reason."""
    groups: dict[str, list[str]] = {}
    for site in refused:
        groups.setdefault(site.reason, []).append(site.fqn)
    return [f"{grouped_names(names)}: {reason}" for reason, names in groups.items()]


def cost_table(surgery: SurgeryPlan) -> Table:
    """Sites by mode and rank, and the model's cost before and after."""
    table = plain_table()
    _add_columns(table, {"": "left", "before": "right", "after": "right", "change": "right"})
    groups: dict[str, list[SitePlan]] = {}
    for site in surgery.sites:
        groups.setdefault(way(site.mode, site.rank), []).append(site)
    for label, chosen in groups.items():
        names = grouped_names([site.fqn for site in chosen])
        before = sum(site.params_before for site in chosen)
        after = sum(site.params_after for site in chosen)
        table.add_row(f"{names}  ({label})", "", "", "")
        table.add_row("  attention parameters", *_cost_cells(before, after))
    table.add_row("parameters", *_cost_cells(surgery.params_before, surgery.params_after), style="bold")
    table.add_row("MACs per image", *_cost_cells(surgery.macs_before, surgery.macs_after), style="bold")
    return table


def _cost_cells(before: int, after: int) -> tuple[str, str, str]:
    return millions(before), millions(after), change(before, after)


def _add_columns(table: Table, columns: dict[str, JustifyMethod], overflow: OverflowMethod = "ellipsis") -> None:
    for title, side in columns.items():
        table.add_column(title, justify=side, overflow=overflow)


def fidelity_lines(surgery: SurgeryPlan) -> list[str]:
    """How near a converted model is to its original, and which sites lost most; empty where nothing was compared."""
    lines = []
    near = surgery.fidelity
    if near is not None:
        lines.append(f"On {near.images} images ({near.source}) that nothing was fitted to: {fidelity_clause(near)}.")
    residuals = {site.fqn: site.residual for site in surgery.sites if site.residual is not None}
    # After wq a residual only says how far two weights were apart, and of one site there is no median.
    if len(residuals) > 1 and surgery.init != "wq":
        worst = sorted(residuals, key=lambda fqn: -residuals[fqn])[:_WORST]
        listed = ", ".join(f"{fqn} {residuals[fqn]:.3f}" for fqn in worst)
        lines.append(f"Residual of the sites: median {median(residuals.values()):.3f}; the largest: {listed}.")
    return lines


def sensitivity_table(sensitivities: Sequence[Sensitivity]) -> Table:
    """What each site costs alone, in the order given; a site that was tried in several ways is named once."""
    table = plain_table("Each attention converted alone")
    columns: dict[str, JustifyMethod] = {
        "attention": "left",
        "mode": "left",
        "parameters saved": "right",
        "residual": "right",
        "loss": "right",
        "": "left",
    }
    _add_columns(table, columns, overflow="fold")
    largest = max((trial.loss for trial in sensitivities), default=0.0)
    named = None
    for trial in sensitivities:
        table.add_row(
            escape(trial.fqn) if trial.fqn != named else "",
            escape(way(trial.mode, trial.rank)),
            f"{trial.params_saved:,}",
            f"{trial.residual:.4f}",
            f"{trial.loss:.5f}",
            _bar(trial.loss, largest),
        )
        named = trial.fqn
    return table


def frontier_table(points: Sequence[FrontierPoint], params_before: int, chosen: FrontierPoint | None = None) -> Table:
    """Choices from the largest model to the smallest, the `chosen` one in bold with a mark.

    Of more choices than a screen has room for, evenly spaced ones are shown, and always the first, the last, the chosen
    and those that were measured.
    """
    table = plain_table("Parameters against loss")
    columns: dict[str, JustifyMethod] = {
        "": "left",
        "parameters": "right",
        "change": "right",
        "predicted loss": "right",
        "measured loss": "right",
        "converted": "left",
    }
    _add_columns(table, columns, overflow="fold")
    ordered = sorted(points, key=lambda point: -point.params)
    # Rounded up, and 1 where there is no point.
    step = -(-len(ordered) // _CHOICES) or 1
    for place, point in enumerate(ordered):
        evenly_spaced = place % step == 0 or place == len(ordered) - 1
        if not evenly_spaced and point.measured is None and point != chosen:
            continue
        table.add_row(
            ">" if point == chosen else "",
            millions(point.params),
            change(params_before, point.params),
            f"{point.predicted:.5f}",
            f"{point.measured:.5f}" if point.measured is not None else "-",
            escape(_converted(point)),
            style="bold" if point == chosen else None,
        )
    return table


def _converted(point: FrontierPoint) -> str:
    """`blocks.0-3.attn (qv); blocks.7.attn (qv, rank 32)`, or `nothing`."""
    # Sites that are converted alike are named together.
    names_by_way: dict[str, list[str]] = {}
    for fqn, mode, rank in point.sites:
        names_by_way.setdefault(way(mode, rank), []).append(fqn)
    return "; ".join(f"{grouped_names(names)} ({label})" for label, names in names_by_way.items()) or "nothing"


def _bar(value: float, largest: float) -> str:
    return "\u2501" * round(_BAR * max(value, 0.0) / largest) if largest > 0 else ""
