"""Sentences and units that terminal, page and model card share.

Each place has markup of its own, which it adds; where a text differs between places, an argument says so.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from armour_surgery.records import Fidelity, SurgeryPlan

__all__ = [
    "NEEDS_TRAINING",
    "UNTIL_TRAINED",
    "FidelityFigures",
    "change",
    "fidelity_clause",
    "fidelity_figures",
    "grouped_names",
    "millions",
    "needs_training",
    "way",
]

NEEDS_TRAINING = "It needs training."
UNTIL_TRAINED = "until it is fine-tuned, its accuracy is near chance."


class FidelityFigures(NamedTuple):
    """The numbers of a `Fidelity` with their units, as they are printed everywhere; `agreement` is None without one."""

    cosine: str
    sqnr: str
    agreement: str | None


def change(before: float, after: float, of_nothing: str = "-") -> str:
    """A relative change in percent; `of_nothing` where there was nothing before."""
    return f"{100 * (after - before) / before:+.1f} %" if before else of_nothing


def millions(count: int, digits_of_billions: int = 4) -> str:
    """A count in millions or billions, as papers print it."""
    return f"{count / 1e9:,.{digits_of_billions}f} G" if count >= 1e9 else f"{count / 1e6:,.3f} M"


def way(mode: str, rank: int | None, separator: str = ", ") -> str:
    """How a site is converted: the mode, and the rank where the site has fewer channels than it could."""
    return f"{mode}{separator}rank {rank}" if rank is not None else mode


def needs_training(surgery: SurgeryPlan) -> bool:
    """Whether a converted model is of no use before it is trained.

    `wq` gives the network weights that were made for another role. All other ways to choose weights come near to what
    the network computed before, and where a fidelity was measured, that tells more than the way.
    """
    return surgery.init == "wq" and surgery.fidelity is None


def fidelity_figures(fidelity: Fidelity) -> FidelityFigures:
    """The numbers, rounded and with their units."""
    agreement = f"{fidelity.agreement:.1f} %" if fidelity.agreement is not None else None
    return FidelityFigures(f"{fidelity.cosine:.4f}", f"{fidelity.sqnr_db:.1f} dB", agreement)


def fidelity_clause(fidelity: Fidelity) -> str:
    """How near a model is to its original: the part of the sentence that names the numbers."""
    figures = fidelity_figures(fidelity)
    same = f", same first choice on {figures.agreement}" if figures.agreement is not None else ""
    return f"cosine to the original's features {figures.cosine}, SQNR {figures.sqnr}{same}"


def grouped_names(names: Sequence[str]) -> str:
    """`blocks.0.attn`, `blocks.1.attn`, ... as `blocks.0-1.attn`; numbers that are not in a row stay a list."""
    # Names with the same text between their numbers belong together.
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        texts = tuple(re.split(r"\d+", name))
        numbers = tuple(map(int, re.findall(r"\d+", name)))
        groups.setdefault(texts, []).append(numbers)
    return ", ".join(_group_name(texts, numbers) for texts, numbers in groups.items())


def _group_name(texts: tuple[str, ...], numbers: list[tuple[int, ...]]) -> str:
    """One name for a group. `texts` are what is before, between and after the numbers that each of its names has."""
    name = texts[0]
    for text, values in zip(texts[1:], zip(*numbers, strict=True), strict=True):
        name += _spans(sorted(set(values))) + text
    return name


def _spans(values: list[int]) -> str:
    """`0-2,5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
