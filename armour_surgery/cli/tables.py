"""Tables that a person enjoys reading: sites that are alike share a row."""

from collections.abc import Sequence
from statistics import median

from rich import box
from rich.markup import escape
from rich.table import Table

from armour_surgery.records import AttentionSite, FrontierPoint, RefusedSite, Sensitivity, SitePlan, SurgeryPlan
from armour_surgery.report.wording import change, grouped_names, way

__all__ = [
    "cost_table",
    "fidelity_lines",
    "frontier_table",
    "millions",
    "plain_table",
    "refused_lines",
    "sensitivity_table",
    "site_table",
]

# Rows that a table of choices has at most.
_CHOICES = 24
_BAR = 12


def plain_table(title: str | None = None) -> Table:
    """The look that all our tables have."""
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def millions(count: int) -> str:
    """A count in millions or billions, as papers print it."""
    return f"{count / 1e9:,.4f} G" if count >= 1e9 else f"{count / 1e6:,.3f} M"


def _alike(site: AttentionSite) -> tuple[object, ...]:
    local = tuple(role.fqn[len(site.fqn) + 1 :] for role in (site.q, site.k, site.v) if role)
    return (
        site.kind,
        site.num_heads,
        site.key_dim,
        site.value_dim,
        local,
        site.modes,
        tuple(site.refused.items()),
    )


def site_table(sites: Sequence[AttentionSite]) -> tuple[Table, list[str]]:
    """The sites of a model, those that are alike in one row, and the reasons why modes do not fit."""
    table = plain_table()
    for column in ("attention", "heads", "key x value", "q, k, v from", "modes that fit"):
        table.add_column(column, overflow="fold")
    groups: dict[tuple[object, ...], list[AttentionSite]] = {}
    for site in sites:
        groups.setdefault(_alike(site), []).append(site)
    reasons: list[str] = []
    for group in groups.values():
        site = group[0]
        names = grouped_names([one.fqn for one in group])
        table.add_row(
            names,
            str(site.num_heads or "-"),
            f"{site.key_dim} x {site.value_dim}" if site.key_dim else "-",
            _projections(site),
            ", ".join(site.modes) or f"none ({site.kind})",
        )
        if not site.modes:
            reasons.append(f"{names}: {next(iter(site.refused.values()))}")
        by_reason: dict[str, list[str]] = {}
        for mode, reason in site.refused.items() if site.modes else ():
            by_reason.setdefault(reason, []).append(mode)
        reasons += [f"not {', '.join(modes)}: {reason}" for reason, modes in by_reason.items()]
    return table, list(dict.fromkeys(reasons))


def _projections(site: AttentionSite) -> str:
    """The projections' names inside the site, a packed one once."""
    names = [role.fqn[len(site.fqn) :].lstrip(".") for role in (site.q, site.k, site.v) if role]
    return ", ".join(dict.fromkeys(names)) or "-"


def refused_lines(refused: Sequence[RefusedSite]) -> list[str]:
    """Sites that were left alone, grouped by reason."""
    groups: dict[str, list[str]] = {}
    for site in refused:
        groups.setdefault(site.reason, []).append(site.fqn)
    return [f"{grouped_names(names)}: {reason}" for reason, names in groups.items()]


def cost_table(surgery: SurgeryPlan) -> Table:
    """Sites by mode and rank, and the model's cost before and after."""
    table = plain_table()
    for column, side in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    groups: dict[str, list[SitePlan]] = {}
    for site in surgery.sites:
        groups.setdefault(way(site.mode, site.rank), []).append(site)
    for label, chosen in groups.items():
        table.add_row(f"{grouped_names([site.fqn for site in chosen])}  ({label})", "", "", "")
        before, after = sum(s.params_before for s in chosen), sum(s.params_after for s in chosen)
        table.add_row("  attention parameters", millions(before), millions(after), change(before, after))
    for label, before, after in (
        ("parameters", surgery.params_before, surgery.params_after),
        ("MACs per image", surgery.macs_before, surgery.macs_after),
    ):
        table.add_row(label, millions(before), millions(after), change(before, after), style="bold")
    return table


def fidelity_lines(surgery: SurgeryPlan) -> list[str]:
    """How near a converted model is to its original, and which sites lost most; empty where nothing was compared."""
    lines = []
    near = surgery.fidelity
    if near is not None:
        same = f", same first choice on {near.agreement:.1f} %" if near.agreement is not None else ""
        lines.append(
            f"On {near.images} images ({near.source}) that nothing was fitted to: cosine to the original's features "
            f"{near.cosine:.4f}, SQNR {near.sqnr_db:.1f} dB{same}."
        )
    known = [(site.residual, site.fqn) for site in surgery.sites if site.residual is not None]
    if len(known) > 1 and surgery.init != "wq":
        worst = sorted(known, key=lambda one: -one[0])[:3]
        listed = ", ".join(f"{fqn} {residual:.3f}" for residual, fqn in worst)
        middle = median(residual for residual, _ in known)
        lines.append(f"Residual of the sites: median {middle:.3f}; the largest: {listed}.")
    return lines


def sensitivity_table(sensitivities: Sequence[Sensitivity]) -> Table:
    """What each site costs alone, in the order given; a site that was tried in several ways is named once."""
    table = plain_table("Each attention converted alone")
    for column, side in (("attention", "left"), ("mode", "left"), ("parameters saved", "right"), ("residual", "right"),
                         ("loss", "right"), ("", "left")):  # fmt: skip
        table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
    largest = max((one.loss for one in sensitivities), default=0.0)
    named = None
    for one in sensitivities:
        table.add_row(
            escape(one.fqn) if one.fqn != named else "",
            escape(way(one.mode, one.rank)),
            f"{one.params_saved:,}",
            f"{one.residual:.4f}",
            f"{one.loss:.5f}",
            _bar(one.loss, largest),
        )
        named = one.fqn
    return table


def frontier_table(points: Sequence[FrontierPoint], params_before: int, chosen: FrontierPoint | None = None) -> Table:
    """Choices from the largest model to the smallest, the `chosen` one in bold with a mark.

    Of more choices than a screen has room for, evenly spaced ones are shown, and always the first, the last, the chosen
    and those that were measured.
    """
    table = plain_table("Parameters against loss")
    for column, side in (("", "left"), ("parameters", "right"), ("change", "right"), ("predicted loss", "right"),
                         ("measured loss", "right"), ("converted", "left")):  # fmt: skip
        table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
    ordered = sorted(points, key=lambda point: -point.params)
    step = -(-len(ordered) // _CHOICES) or 1
    for place, point in enumerate(ordered):
        shown = place % step == 0 or place == len(ordered) - 1 or point.measured is not None or point == chosen
        if not shown:
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
    """`blocks.0-3.attn (qv), blocks.7.attn (qv, rank 32)`, or `nothing`."""
    ways: dict[str, list[str]] = {}
    for fqn, mode, rank in point.sites:
        ways.setdefault(way(mode, rank), []).append(fqn)
    return "; ".join(f"{grouped_names(names)} ({way})" for way, names in ways.items()) or "nothing"


def _bar(value: float, largest: float) -> str:
    return "\u2501" * round(_BAR * max(value, 0.0) / largest) if largest > 0 else ""
