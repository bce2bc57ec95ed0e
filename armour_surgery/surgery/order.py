"""What was asked of a surgery, checked once: every stage below `convert` gets it whole."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from armour_surgery.errors import UsageError
from armour_surgery.initialize.processes import ALONE, Processes
from armour_surgery.modes import AUTO, get_mode
from armour_surgery.records import Progress, Sensitivity, Source

__all__ = [
    "CALIBRATION_IMAGES",
    "INITS",
    "SYNTHETIC",
    "Images",
    "Order",
    "Rank",
    "check_options",
    "params_goal",
]

INITS = ("wq", "wq-refit", "joint-svd", "calibrated")
# What becomes of the basis that the weights leave open: it stays, or is chosen so that some weights are the identity.
_GAUGES = ("keep", "fixed")
# How many images `calibrated` uses where nobody says, and which.
CALIBRATION_IMAGES = 256
SYNTHETIC = "synthetic"

_GOAL = re.compile(r"-(?P<percent>\d+(\.\d+)?) ?%|(?P<number>\d+(\.\d+)?) ?(?P<unit>[kKmMgG]?)")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}

# Channels of a head: one number for all sites, or one by site name.
Rank = int | Mapping[str, int]


@dataclass(frozen=True)
class Images:
    """Where calibration images come from, and how many to use at most."""

    source: str | Iterable[Any]
    count: int


@dataclass(frozen=True)
class Order:
    """The arguments of `convert`, checked. `images` are for init `calibrated`, and so are `steps`, by gradient, and
    `device`, where it is computed (None: where the model is). `processes` calibrate together.

    `original` says which weights the model has before (`original.py`).
    """

    mode: str
    init: str = "wq"
    rank: Rank | Literal["auto"] | None = None
    max_loss: float | None = None
    params_goal: int | None = None
    mlp: bool = False
    gauge: str = "keep"
    measured: tuple[Sensitivity, ...] | None = None
    images: Images = Images(SYNTHETIC, CALIBRATION_IMAGES)
    steps: int = 0
    example: dict[str, Any] = field(default_factory=dict)
    source: Source | None = None
    original: dict[str, str] = field(default_factory=dict)
    progress: Progress | None = None
    device: torch.device | None = None
    processes: Processes = ALONE

    @property
    def fixed_rank(self) -> Rank | None:
        """The rank that was given in numbers."""
        return None if isinstance(self.rank, str) else self.rank

    @property
    def fixes_gauge(self) -> bool:
        """Whether the gauge is to be fixed."""
        return self.gauge == "fixed"

    @property
    def weighs_sites(self) -> bool:
        """Whether sites or ranks are to be chosen by what they cost."""
        return self.max_loss is not None or self.params_goal is not None or self.rank == "auto"


def check_options(
    mode: str,
    init: str,
    calibration: object = None,
    rank: object = None,
    reconstruct: object = 0,
    max_loss: object = None,
    params: object = None,
    mlp: bool = False,
    measured: object = None,
    gauge: object = "keep",
    device: object = None,
    distributed: bool = False,
) -> None:
    """Check what can be checked without a model.

    Raises:
        UsageError: there is no such mode, init or gauge, the init uses no images and is given some, or what needs them
            or says where to run them, the mode has no rank and is given one, MLPs are to be narrowed and nothing says
            how far, or a number is none that makes sense.
    """
    _check_init(init)
    if gauge not in _GAUGES:
        raise UsageError(f"unknown gauge {gauge!r}; choose keep or fixed (fewer stored weights, the same function)")
    if init != "calibrated":
        _check_without_images(init, calibration, rank, reconstruct, max_loss, params)
        for option, given in {"device": device is not None, "distributed": distributed}.items():
            if given:
                raise UsageError(
                    f"{option} says where images are run, and init {init!r} runs none; add init 'calibrated', or leave "
                    "it out"
                )
    if max_loss is not None and params is not None:
        raise UsageError(
            f"max_loss {max_loss!r} and params {params!r} are two goals: the smallest model within a loss, or the best "
            "of a size; leave one of them out"
        )
    if mlp and max_loss is None and params is None:
        raise UsageError("mlp needs a goal: max_loss (a loss, such as 0.01) or params (a size, such as -15%)")
    if measured is not None and max_loss is None and params is None and rank != "auto":
        raise UsageError("measured is for a goal: max_loss, params or rank 'auto'; give one, or leave it out")
    if params is not None:
        params_goal(params, 1)
    _check_reconstruct(reconstruct)
    _check_max_loss(max_loss)
    if mode != AUTO:
        get_mode(mode)
    if rank is not None:
        _check_rank(mode, rank)


def params_goal(given: object, present: int) -> int:
    """How many parameters a model is to have: a number, `18M`, or `-15%` of those `present`.

    Raises:
        UsageError: it says none of these.
    """
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    found = _GOAL.fullmatch(given.strip()) if isinstance(given, str) else None
    if found is not None and found["percent"] and 0 < float(found["percent"]) < 100:
        return round(present * (1 - float(found["percent"]) / 100))
    if found is not None and found["number"] and float(found["number"]) > 0:
        return round(float(found["number"]) * _UNITS[(found["unit"] or "").upper()])
    raise UsageError(f"params {given!r} is no size; give a share to save (-15%) or a number of parameters (18M)")


def _check_init(init: str) -> None:
    if init not in INITS:
        raise UsageError(f"unknown init {init!r}; choose one of {', '.join(INITS)}")


def _check_without_images(
    init: str, calibration: object, rank: object, reconstruct: object, max_loss: object, params: object
) -> None:
    if calibration is not None:
        raise UsageError(
            f"init {init!r} uses no images; use init 'calibrated' with calibration images, or leave them out"
        )
    needs_images = {
        "rank auto": rank == "auto",
        "reconstruct": bool(reconstruct),
        "max_loss": max_loss is not None,
        "params": params is not None,
    }
    for option, given in needs_images.items():
        if given:
            raise UsageError(
                f"{option} needs images to measure with, and init {init!r} uses none; add init 'calibrated'"
            )


def _check_reconstruct(steps: object) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise UsageError(f"reconstruct {steps!r} is not a number of steps; 60, say, or 0 for none")


def _check_max_loss(max_loss: object) -> None:
    if max_loss is not None and (not isinstance(max_loss, int | float) or not 0 < max_loss < 2):
        raise UsageError(f"max_loss {max_loss!r} is not between 0 and 2 (1 - cosine of the final features); 0.02, say")


def _check_rank(mode: str, rank: object) -> None:
    if mode != AUTO and not get_mode(mode).has_rank:
        raise UsageError(f"mode {mode!r} has no rank to choose; give a rank with qv or kv, or leave it out")
    if rank == "auto":
        return
    for number in rank.values() if isinstance(rank, Mapping) else [rank]:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UsageError(f"rank {number!r} is not a whole number from 1 to key_dim; 48, say")
