"""The table of `each_class.py`: a row for each class of attention module, and below it what was refused or fails."""

from collections import Counter
from collections.abc import Iterable, Mapping

from armour_surgery.coverage.summary import versions

__all__ = ["CHECKS", "class_table"]

CHECKS = ("copy", "load 1", "load 3", "train", "compile", "deploy")


def class_table(rows: Iterable[Mapping[str, str]], wanted: Mapping[str, int], command: str, about: str) -> str:
    """A page of Markdown, made by `command`; `wanted` says how many classes each library has, `about` what was done."""
    rows = list(rows)
    held = ", ".join(f"{package} {number}" for package, number in versions().items())
    headers = ("library", "class", "architecture", *CHECKS)
    lines = ["# A model of each class", "", f"Made by `{command}`, with {held}.", "", _count(rows, wanted), "", about]
    lines += [f"| {' | '.join(headers)} |", "|" + " --- |" * len(headers)]
    notes = []
    for row in rows:
        short = [row[key].partition(":")[0] for key in headers]
        lines.append(f"| {' | '.join(short)} |")
        said: dict[str, list[str]] = {}
        for key in CHECKS:
            if ":" in row[key]:
                said.setdefault(row[key], []).append(key)  # often one reason for all
        notes += [f"- {row['class']}, {', '.join(keys)}: {reason}" for reason, keys in said.items()]
    return "\n".join([*lines, "", *notes]) + "\n"


def _count(rows: list[Mapping[str, str]], wanted: Mapping[str, int]) -> str:
    """How many classes went through all checks, of how many."""
    whole = [row for row in rows if not any(row[key].startswith("not examined") for key in CHECKS)]
    found = Counter(row["library"] for row in whole)
    parts = ", ".join(f"{found[library]} of {library}'s {count}" for library, count in wanted.items())
    failing = sum(any(row[key].startswith("FAILS") for key in CHECKS) for row in whole)
    return f"Examined: {len(whole)} of {sum(wanted.values())} classes ({parts}), of which {failing} fail in something."
