"""Sentences and units that terminal, page and model card share.

Each place has markup of its own, which it adds; where a text differs between places, an argument says so.
"""

from typing import NamedTuple

from armour_surgery.records import Fidelity, SurgeryPlan

__all__ = [
    "NEEDS_TRAINING",
    "UNTIL_TRAINED",
    "FidelityFigures",
    "fidelity_clause",
    "fidelity_figures",
    "needs_training",
]

NEEDS_TRAINING = "It needs training."
UNTIL_TRAINED = "until it is fine-tuned, its accuracy is near chance."


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
