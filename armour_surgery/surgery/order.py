"""What was asked of a surgery, checked once: every stage below `convert` gets it whole."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from armour_surgery.errors import UsageError
from armour_surgery.modes import AUTO, get_mode
from armour_surgery.records import Progress, Source

__all__ = ["INITS", "Images", "Order", "check_options"]


@dataclass(frozen=True)
class Images:
    """Where calibration images come from, and how many to use at most."""

    source: str | Iterable[Any]
    count: int


@dataclass(frozen=True)
class Order:
    """How an operation is done: the arguments of `convert`, checked."""

    mode: str
    init: str
    images: Images | None
    steps: int
    example: dict[str, Tensor]
    source: Source | None
    progress: Progress | None


INITS = ("wq", "wq-refit", "joint-svd", "calibrated")
CALIBRATION_IMAGES = 256
SYNTHETIC = "synthetic"


def check_options(
    mode: str,
    init: str,
    calibration: object = None,
    rank: object = None,
    reconstruct: object = 0,
    max_loss: object = None,
) -> None:
    """Check what can be checked without a model.

    Raises:
        UsageError: there is no such mode or init, the init uses no images and is given some or what needs them, the
            mode has no rank and is given one, or a number is none that makes sense.
    """
    if calibration is not None and init in INITS and init != "calibrated":
        raise UsageError(
            f"init {init!r} uses no images; use init 'calibrated' with calibration images, or leave them out"
        )
    needs_images = {"rank auto": rank == "auto", "reconstruct": bool(reconstruct), "max_loss": max_loss is not None}
    for option, given in needs_images.items():
        if given and init in INITS and init != "calibrated":
            raise UsageError(
                f"{option} needs images to measure with, and init {init!r} uses none; add init 'calibrated'"
            )
    if isinstance(reconstruct, bool) or not isinstance(reconstruct, int) or reconstruct < 0:
        raise UsageError(f"reconstruct {reconstruct!r} is not a number of steps; 60, say, or 0 for none")
    if max_loss is not None and (not isinstance(max_loss, int | float) or not 0 < max_loss < 2):
        raise UsageError(f"max_loss {max_loss!r} is not between 0 and 2 (1 - cosine of the final features); 0.02, say")
    if mode != AUTO:
        get_mode(mode)
    if init not in INITS:
        raise UsageError(f"unknown init {init!r}; choose one of {', '.join(INITS)}")
    if rank is not None and mode != AUTO and not get_mode(mode).has_rank:
        raise UsageError(f"mode {mode!r} has no rank to choose; give a rank with qv or kv, or leave it out")
    for value in rank.values() if isinstance(rank, Mapping) else [rank]:
        if rank is not None and rank != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"rank {value!r} is not a whole number from 1 to key_dim; 48, say")
