"""The redundancy of all attentions as a table, for sessions and terminals."""

from collections.abc import Sequence

from armour_surgery.likeness.pairs import PAIRS, THRESHOLD, PairRedundancy, SiteRedundancy
from armour_surgery.spelled import grouped_names, short_names
from armour_surgery.tabular import Listing, Table

__all__ = ["Redundancies", "redundancy_table"]


class Redundancies(Listing[SiteRedundancy]):
    """Attentions and how alike their weights are, as `redundancy` returns them."""

    def __init__(self, sites: Sequence[SiteRedundancy] = (), threshold: float = THRESHOLD) -> None:
        super().__init__(sites)
        self.threshold = threshold

    def table(self) -> Table:
        """A row for each attention."""
        return redundancy_table(self, self.threshold)


def redundancy_table(sites: Sequence[SiteRedundancy], threshold: float) -> Table:
    """A row for each attention: shares of alike entries and residuals of the three pairs, and what they mean."""
    names, pattern = short_names([site.fqn for site in sites])
    numbers = [str(number) for number in range(len(sites))]
    headers = [pattern]
    for between in (", ", "="):
        headers += [_spelled(pair, between) for pair in PAIRS]
    # `--layer` takes numbers; where the short names are these numbers, one column says both.
    numbered = names != numbers
    if numbered:
        headers.insert(0, "#")
    rows: list[tuple[str, ...]] = []
    for number, name, site in zip(numbers, names, sites, strict=True):
        first = (number, name) if numbered else (name,)
        compared = [site.pairs.get(pair) for pair in PAIRS]
        rows.append((*first, *map(_share, compared), *map(_residual, compared)))
    caption = f"Entries closer than {threshold:g} in % / by chance, and residuals"
    right = frozenset(range(len(headers))) - {headers.index(pattern)}
    return Table(caption, tuple(headers), rows, right, tuple(_notes(sites)))


def _spelled(pair: str, between: str) -> str:
    return between.join(pair.upper())


def _share(pair: PairRedundancy | None) -> str:
    return f"{pair.share:.1f}/{pair.share_by_chance:.1f}" if pair else "-"


def _residual(pair: PairRedundancy | None) -> str:
    return f"{pair.residual:.3f}" if pair and pair.residual is not None else "-"


def _notes(sites: Sequence[SiteRedundancy]) -> list[str]:
    """What a reader has to know about the table; each line once."""
    lines = [
        "By chance: the same entries in random order. Residual: what the best shared weight (joint-svd, from the "
        "weights alone) loses of logits and values, relative to their size."
    ]
    sites_by_remark: dict[str, list[str]] = {}
    for site in sites:
        for remark in _remarks(site):
            sites_by_remark.setdefault(remark, []).append(site.fqn)
    for remark, names in sites_by_remark.items():
        lines.append(f"{grouped_names(names)}: {remark}")
    refused = [pair for site in sites for pair in site.pairs.values() if pair.refused is not None]
    if refused:
        lines.append("-: no mode makes the two one there; `armour-surgery inspect` says why.")
    return lines


def _remarks(site: SiteRedundancy) -> list[str]:
    """Which pairs of a site were not compared, or not all of their channels."""
    remarks = [f"{_spelled(pair, ' and ')} were not compared: {reason}" for pair, reason in site.skipped.items()]
    wider = "V is" if site.value_dim > site.key_dim else "Q and K are"
    shared = ", those that concat-half shares" if site.mode == "concat-half" else ""
    widest = max(site.key_dim, site.value_dim)
    # A set: pairs of which equally many were compared share a remark.
    for channels in {pair.channels for pair in site.pairs.values() if pair.channels < widest}:
        remarks.append(f"{wider} wider; the first {channels} channels of each head were compared{shared}")
    return remarks
