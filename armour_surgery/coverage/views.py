"""Tables of a survey, for the terminal and for the page."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from armour_surgery.coverage.examine import plain_reason
from armour_surgery.coverage.outcome import Outcome, SiteKind
from armour_surgery.coverage.summary import Coverage
from armour_surgery.tabular import Table

__all__ = ["architecture_table", "class_table", "failures", "library_table", "page"]

_EXPLAINED = (
    "An architecture is built without weights, and its attention is found and converted.",
    "",
    "- *attention*: it computes softmax(QK)V somewhere; a gate or a pooling that is a softmax is not that.",
    "- *auto*: mode `auto` converts at least one of its sites, with `qv`, `concat-half` or `kv`; *any*: some mode does."
    " DETR and its like add positions to queries and keys alone, so that `qk` alone fits, which `auto` does not take.",
    "- *exact*: of every kind of site that converts, one module was given random float64 weights in which the merged "
    "projections are equal. Converted, it computed the same within 1e-9, in eval and in train mode. Every mode is tried"
    " on one site of each kind of code, and the mode that `auto` takes on every number of heads and channels of it,"
    " with fewer windows and tokens, and smaller images, where a module takes such.",
    "- *errors*: it could not be built, or did not run on what it was fed.",
)


@dataclass
class _Class:
    """What became of the attention modules of one class."""

    architectures: int = 0
    auto: int = 0
    some: int = 0
    modes: dict[str, None] = field(default_factory=dict)
    exact: bool = True
    reasons: dict[str, None] = field(default_factory=dict)

    def add(self, kinds: list[SiteKind]) -> None:
        """Count the sites of this class that one architecture has."""
        self.architectures += 1
        self.auto += any(kind.auto for kind in kinds)
        self.some += any(kind.modes for kind in kinds)
        for kind in kinds:
            self.modes.update(dict.fromkeys(kind.modes))
            self.exact = self.exact and kind.exact
            if kind.reason:
                self.reasons[plain_reason(kind.reason)] = None


def library_table(coverage: Coverage) -> Table:
    """One row a library."""
    rows: list[tuple[str, ...]] = []
    for library in coverage.outcomes:
        count = coverage.count(library)
        share = f"{100 * count.convert_auto / count.with_attention:.1f} %" if count.with_attention else "-"
        numbers = (count.architectures, count.with_attention, count.convert_auto)
        rest = (count.convert_any, count.exact, len(count.failed))
        rows.append((library, *map(str, numbers), share, *map(str, rest)))
    headers = ("library", "all", "attention", "auto", "share", "any mode", "exact", "errors")
    return Table("Architectures", headers, rows, frozenset(range(1, 8)))


def class_table(coverage: Coverage, library: str) -> Table:
    """One row a class of attention modules: in how many architectures it is, and in how many it converts."""
    classes: dict[str, _Class] = {}
    for outcome in coverage.outcomes[library]:
        alike: dict[str, list[SiteKind]] = {}
        for kind in outcome.kinds:
            alike.setdefault(kind.host, []).append(kind)
        for host, kinds in alike.items():
            classes.setdefault(host, _Class()).add(kinds)
    rows: list[tuple[str, ...]] = []
    for host, found in sorted(classes.items(), key=lambda item: (-item[1].architectures, item[0])):
        exact = ("yes" if found.exact else "NO") if found.modes else "-"
        rows.append((host, str(found.architectures), str(found.auto), str(found.some), exact, _listed(found.modes)))
    headers = ("class", "models", "auto", "any", "exact", "modes")
    return Table(f"{library}: classes of attention modules", headers, rows, frozenset((1, 2, 3)))


def architecture_table(coverage: Coverage, library: str, *, all_of_them: bool) -> Table:
    """One row an architecture with attention, or of those alone that `auto` leaves as they are."""
    rows: list[tuple[str, ...]] = []
    for outcome in coverage.outcomes[library]:
        if outcome.attention and (all_of_them or not outcome.convert_auto):
            sites = sum(kind.count for kind in outcome.kinds)
            converted = sum(kind.count for kind in outcome.kinds if kind.auto)
            exact = ("yes" if outcome.exact else "NO") if outcome.convert_any else "-"
            rows.append((outcome.name, f"{converted} of {sites}", exact, _listed(_modes_of(outcome)) or "none"))
    caption = f"{library}: architectures" + ("" if all_of_them else " that auto leaves as they are")
    return Table(caption, ("architecture", "auto", "exact", "modes"), rows)


def _modes_of(outcome: Outcome) -> list[str]:
    modes: dict[str, None] = {}
    for kind in outcome.kinds:
        modes.update(dict.fromkeys(kind.modes))
    return list(modes)


def _listed(modes: Iterable[str]) -> str:
    return ", ".join(modes)


def failures(coverage: Coverage, library: str) -> list[str]:
    """What is wrong, a line each: promises that are not kept, differences, and architectures that are not examined."""
    lines = []
    for outcome in coverage.outcomes[library]:
        if outcome.error:
            lines.append(f"{outcome.name}: {outcome.error}")
        for kind in outcome.kinds:
            where = f"{outcome.name}, {kind.fqn} ({kind.host})"
            for mode in kind.broken:
                lines.append(f"{where}: inspect says that {mode} fits, and convert refuses it: {kind.refused[mode]}")
            for mode, reason in kind.failed.items():
                lines.append(f"{where}: {mode} fits, and does not work: {reason}")
            for mode, difference in kind.modes.items():
                if difference is not None and not kind.exact and mode not in kind.failed:
                    lines.append(f"{where}: {mode} differs by {difference:.1e}")
    return lines


def page(coverage: Coverage, command: str, title: str) -> str:
    """The whole survey as Markdown; `command` is what made it."""
    held = ", ".join(f"{name} {number}" for name, number in coverage.versions.items())
    lines = [
        f"# {title}",
        "",
        f"Made by `{command}`, with {held}.",
        "",
        *_EXPLAINED,
        "",
        *_markdown(library_table(coverage)),
    ]
    for library in coverage.outcomes:
        lines += ["", f"## {library}", ""]
        refused = coverage.count(library).refused
        if refused:
            lines += ["Why `auto` leaves architectures as they are, with their number:", ""]
            lines += [f"- {number}: {reason}" for reason, number in refused.items()]
            lines.append("")
        if wrong := failures(coverage, library):
            lines += ["What went wrong:", "", *(f"- {line}" for line in wrong), ""]
        lines += [*_markdown(class_table(coverage, library)), ""]
        lines += _markdown(architecture_table(coverage, library, all_of_them=True))
    return "\n".join(lines) + "\n"


def _markdown(table: Table) -> list[str]:
    marks = ["---:" if place in table.right else "---" for place in range(len(table.headers))]
    rows = [table.headers, marks, *table.rows]
    return [table.caption + ":", "", *("| " + " | ".join(row) + " |" for row in rows)]
