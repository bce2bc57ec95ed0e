"""Sentences and units that terminal, page and model card share.

Each place has markup of its own, which it adds; where a text differs between places, an argument says so.
"""

from typing import NamedTuple

from armour_surgery.records import Fidelity, SurgeryPlan
from armour_surgery.spelled import names_only

__all__ = [
    "ENOUGH_IMAGES",
    "GRADES",
    "NEEDS_TRAINING",
    "UNTIL_TRAINED",
    "FidelityFigures",
    "Grade",
    "fidelity_clause",
    "fidelity_figures",
    "grade_of",
    "measured_on",
    "needs_training",
    "verdict",
]

NEEDS_TRAINING = "It needs training."
UNTIL_TRAINED = "until it is fine-tuned, its accuracy is near chance."


class Grade(NamedTuple):
    """What may be said of a converted model whose features and first choices are at least so near to the original's.

    `cosine` and `agreement` (in percent, where there is a head) are as in `Fidelity`.
    """

    cosine: float
    agreement: float
    said: str


# From the nearest on; a model gets the first that both of its numbers reach. Why these bounds: docs/decisions.md.
GRADES = (
    Grade(0.99, 95.0, "It computes nearly what the original does, and can be used as it is or fine-tuned from here."),
    Grade(
        0.95,
        90.0,
        "It is close to the original, and some accuracy may be lost (a point or two where that was tried): evaluate it "
        "before you use it, or fine-tune it.",
    ),
    Grade(0.8, 70.0, "It resembles the original, but is not to be relied on: fine-tune it before you use it."),
    Grade(-1.0, 0.0, "It is far from the original: it needs training."),
)
# Of fewer images than these a single one moves the share of equal first choices by more than the best grade allows.
ENOUGH_IMAGES = 16
# As the calibration calls images that are drawn instead of read.
_DRAWN = "synthetic"


class FidelityFigures(NamedTuple):
    """The numbers of a `Fidelity` with their units, as they are printed everywhere; `agreement` is None without one."""

    cosine: str
    sqnr: str
    agreement: str | None


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


def measured_on(fidelity: Fidelity) -> str:
    """How many images a fidelity was measured on, and of which source: photos by their folder's name, or drawn ones."""
    count = f"{fidelity.images} held-out image{'s' if fidelity.images != 1 else ''}"
    sources = names_only(fidelity.source).split(",")
    if set(sources) == {_DRAWN}:
        return f"{count}, drawn and no photos"
    named = ", ".join("drawn ones" if source == _DRAWN else source for source in sources)
    return f"{count} ({named})"


def grade_of(fidelity: Fidelity) -> Grade:
    """The first of the `GRADES` that a model is near enough for."""
    for grade in GRADES:
        if fidelity.cosine >= grade.cosine and (fidelity.agreement is None or fidelity.agreement >= grade.agreement):
            return grade
    return GRADES[-1]  # also where the numbers are none


def verdict(fidelity: Fidelity) -> str:
    """What a converted model is good for, as far as it was measured, and what is left to find out."""
    grade = grade_of(fidelity)
    if grade is not GRADES[0]:
        return grade.said
    if fidelity.images < ENOUGH_IMAGES:
        return (
            "It computes nearly what the original does, as far as so few images can tell "
            f"({fidelity.images}): calibrate with more, or evaluate it before you use it."
        )
    if set(fidelity.source.split(",")) == {_DRAWN}:
        return (
            "On drawn images it computes nearly what the original does; what it does on photos was not measured: "
            "calibrate with some, or evaluate it before you use it."
        )
    return grade.said
