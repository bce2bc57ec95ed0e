"""What records look like to people: the tables of sites, plans and sensitivities, for sessions and terminals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from armour_surgery.spelled import change, grouped_names, millions, names_only, way
from armour_surgery.tabular import Listing, Table

if TYPE_CHECKING:
    from armour_surgery.records import AttentionSite, MlpPlan, RefusedSite, Sensitivity, SitePlan, SurgeryPlan

__all__ = [
    "Sensitivities",
    "Sites",
    "gauge_lines",
    "mlp_row",
    "plan_table",
    "refused_lines",
    "sensitivity_table",
    "site_table",
    "sites_by_way",
]


class Sites(Listing["AttentionSite"]):
    """The attentions of a model, as `inspect` returns them."""

    def table(self) -> Table:
        """Sites that are alike share a row."""
        return site_table(self)


class Sensitivities(Listing["Sensitivity"]):
    """What converting each site alone wins and costs, as `sensitivities` returns it."""

    def table(self) -> Table:
        """A row for each way that was tried."""
        return sensitivity_table(self)


def site_table(sites: "Sequence[AttentionSite]") -> Table:
    """The sites of a model, those that are alike in one row, and the reasons why modes do not fit."""
    groups: dict[tuple[object, ...], list[AttentionSite]] = {}
    for site in sites:
        groups.setdefault(_likeness(site), []).append(site)
    rows: list[tuple[str, ...]] = []
    reasons: list[str] = []
    for alike in groups.values():
        site = alike[0]
        names = grouped_names([member.fqn for member in alike])
        row = (
            names,
            str(site.num_heads or "-"),
            f"{site.key_dim} x {site.value_dim}" if site.key_dim else "-",
            ", ".join(dict.fromkeys(_local_names(site))) or "-",
            ", ".join(site.modes) or f"none ({site.kind})",
        )
        rows.append(row)
        reasons += _reasons(site, names)
    headers = ("attention", "heads", "key x value", "q, k, v from", "modes that fit")
    # Sites of other sizes are often refused for the same reason.
    caption = f"{len(sites)} attention site{'s' if len(sites) != 1 else ''}"
    return Table(caption, headers, rows, frozenset((1, 2)), tuple(dict.fromkeys(reasons)))


def _likeness(site: "AttentionSite") -> tuple[object, ...]:
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


def _local_names(site: "AttentionSite") -> tuple[str, ...]:
    """The projections of q, k and v, as they are called inside the site."""
    return tuple(role.fqn[len(site.fqn) :].lstrip(".") for role in (site.q, site.k, site.v) if role)


def _reasons(site: "AttentionSite", names: str) -> list[str]:
    """Why modes do not fit. A site that takes none was not followed, and all modes have the same reason."""
    if not site.modes:
        return [f"{names}: {reason}" for reason in list(site.refused.values())[:1]]
    modes_by_reason: dict[str, list[str]] = {}
    for mode, reason in site.refused.items():
        modes_by_reason.setdefault(reason, []).append(mode)
    return [f"not {', '.join(modes)}: {reason}" for reason, modes in modes_by_reason.items()]


def plan_table(surgery: "SurgeryPlan") -> Table:
    """A plan: what is done to which sites, what the model costs before and after, and what is left as it is."""
    rows: list[tuple[str, ...]] = []
    for label, alike in sites_by_way(surgery.sites).items():
        before = sum(site.params_before for site in alike)
        after = sum(site.params_after for site in alike)
        numbers = (millions(before), millions(after), change(before, after), _residuals(alike))
        rows.append((grouped_names([site.fqn for site in alike]), label, *numbers))
    if surgery.mlps:
        before, after, label = mlp_row(surgery)
        numbers = (millions(before), millions(after), change(before, after), _residuals(surgery.mlps))
        rows.append((grouped_names([mlp.fqn for mlp in surgery.mlps]), label, *numbers))
    notes = [
        _cost("model: parameters", surgery.params_before, surgery.params_after),
        _cost("model: MACs per image", surgery.macs_before, surgery.macs_after),
    ]
    near = surgery.fidelity
    if near is not None:
        notes.append(
            f"cosine to the original {near.cosine:.4f}, on {near.images} held-out images ({names_only(near.source)})"
        )
    if surgery.trained is not None:
        notes.append(surgery.trained)
    notes += gauge_lines(surgery)
    notes += [f"left alone: {line}" for line in refused_lines(surgery.refused)]
    total = len(surgery.sites) + len(surgery.refused)
    caption = f"SurgeryPlan: {len(surgery.sites)} of {total} sites, mode {surgery.mode}, init {surgery.init}"
    headers = ("attention", "mode", "parameters", "after", "change", "residual")
    return Table(caption, headers, rows, frozenset((2, 3, 4, 5)), tuple(notes))


def sites_by_way(sites: "Sequence[SitePlan]") -> "dict[str, list[SitePlan]]":
    """Sites that are converted alike, by mode and rank."""
    groups: dict[str, list[SitePlan]] = {}
    for site in sites:
        groups.setdefault(way(site.mode, site.rank), []).append(site)
    return groups


def _cost(label: str, before: int, after: int) -> str:
    return f"{label} {millions(before)} -> {millions(after)} ({change(before, after)})"


def mlp_row(surgery: "SurgeryPlan") -> tuple[int, int, str]:
    """Of all narrowed MLPs together the parameters before and after, and how many hidden channels they have."""
    before = sum(mlp.params_before for mlp in surgery.mlps)
    after = sum(mlp.params_after for mlp in surgery.mlps)
    kept = sum(mlp.hidden_after for mlp in surgery.mlps)
    return before, after, f"{kept:,} of {sum(mlp.hidden_before for mlp in surgery.mlps):,} hidden channels"


def _residuals(sites: "Sequence[SitePlan | MlpPlan]") -> str:
    """The smallest and the largest, or the one that there is."""
    values = sorted(f"{site.residual:.3f}" for site in sites if site.residual is not None)
    if not values:
        return "-"
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def gauge_lines(surgery: "SurgeryPlan") -> list[str]:
    """At how many sites the gauge was fixed, and which of those that were asked keep theirs; nothing if none was."""
    asked = [site for site in surgery.sites if site.gauge is not None]
    kept = [site for site in asked if site.gauge is not None and site.gauge.start is None]
    if not asked:
        return []
    lines = [f"gauge fixed at {len(asked) - len(kept)} of {len(surgery.sites)} sites"]
    if kept:
        lines.append(f"{grouped_names([site.fqn for site in kept])}: no block of channels is conditioned well enough")
    return lines


def refused_lines(refused: "Sequence[RefusedSite]") -> list[str]:
    """Sites that were left alone, grouped by reason."""
    groups: dict[str, list[str]] = {}
    for site in refused:
        groups.setdefault(site.reason, []).append(site.fqn)
    return [f"{grouped_names(names)}: {reason}" for reason, names in groups.items()]


def sensitivity_table(sensitivities: "Sequence[Sensitivity]") -> Table:
    """What each site costs alone, in the order given; a site that was tried in several ways is named once."""
    rows: list[tuple[str, ...]] = []
    named = None
    for trial in sensitivities:
        name = trial.fqn if trial.fqn != named else ""
        numbers = (f"{trial.params_saved:,}", f"{trial.residual:.4f}", f"{trial.loss:.5f}")
        rows.append((name, way(trial.mode, trial.rank), *numbers))
        named = trial.fqn
    headers = ("attention", "mode", "parameters saved", "residual", "loss")
    return Table("Each attention converted alone", headers, rows, frozenset((2, 3, 4)))
