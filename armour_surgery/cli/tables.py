"""Tables that a person enjoys reading: sites that are alike share a row."""

import re
from collections.abc import Sequence

from rich import box
from rich.table import Table

from armour_surgery.sites import AttentionSite, RefusedSite, SitePlan, SurgeryPlan

__all__ = ["change", "cost_table", "grouped_names", "millions", "plain_table", "refused_lines", "site_table"]


def plain_table(title: str | None = None) -> Table:
    """The look that all our tables have."""
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def millions(count: int) -> str:
    """A count in millions or billions, as papers print it."""
    return f"{count / 1e9:,.4f} G" if count >= 1e9 else f"{count / 1e6:,.3f} M"


def change(before: float, after: float) -> str:
    """A relative change in percent."""
    return f"{100 * (after - before) / before:+.1f} %" if before else "-"


def grouped_names(names: Sequence[str]) -> str:
    """`blocks.0.attn`, `blocks.1.attn`, ... as `blocks.0-1.attn`; numbers that are not in a row stay a list."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        groups.setdefault(tuple(re.split(r"\d+", name)), []).append(tuple(map(int, re.findall(r"\d+", name))))
    return ", ".join(_one_group(texts, numbers) for texts, numbers in groups.items())


def _one_group(texts: tuple[str, ...], numbers: list[tuple[int, ...]]) -> str:
    name = texts[0]
    for place, text in enumerate(texts[1:]):
        name += _span(sorted({entry[place] for entry in numbers})) + text
    return name


def _span(values: list[int]) -> str:
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


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
        groups.setdefault(f"{site.mode}, rank {site.rank}" if site.rank else site.mode, []).append(site)
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
