"""Sentences and units that terminal, page and model card share."""

import re
from collections.abc import Sequence

__all__ = ["change", "grouped_names", "way"]


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


def way(mode: str, rank: int | None) -> str:
    """How a site is converted."""
    return f"{mode}, rank {rank}" if rank is not None else mode
