"""The spine: find the sites, choose a mode for each, rewrite them, and keep the plan on the model.

`plan` says what would happen, `convert` does it. Every stage hands over records (`sites.py`, `traced.py`) and knows
none of the others.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from armour_surgery import hosts
from armour_surgery.copies import meta_copy
from armour_surgery.discover import find_sites
from armour_surgery.errors import ArmourError, NothingToConvertError, SchemaError, UsageError
from armour_surgery.modes import AUTO, choose_rank, get_mode
from armour_surgery.records import AttentionSite, Sensitivity, Source, SurgeryPlan
from armour_surgery.surgery.new_weights import Images, Progress
from armour_surgery.surgery.operation import Operation, Outcomes, layout_of, operate, prepare, rewrite_alike
from armour_surgery.surgery.perform import Order, perform, surgery_of
from armour_surgery.surgery.selection import convert_within, measure_sites
from armour_surgery.surgery.targets import Example, Rank, check_names, example_of, refuse_converted, select_sites

__all__ = ["INITS", "check_options", "convert", "inspect", "plan", "replay", "sensitivities", "surgery_of"]

INITS = ("wq", "wq-refit", "joint-svd", "calibrated")
CALIBRATION_IMAGES = 256
SYNTHETIC = "synthetic"
Calibration = str | Iterable[Any]


def inspect(model: nn.Module, *, example_input: Example | None = None) -> list[AttentionSite]:
    """Every attention of a model: its projections and sizes, which modes fit, and why the others do not.

    The model is neither run nor changed.

    Raises:
        ExampleInputError: nobody knows what to feed the model; pass `example_input`.
        NoAttentionError: nothing in it is attention.
    """
    refuse_converted(model)
    return [found.site for found in find_sites(model, example_of(model, example_input))]


def plan(
    model: nn.Module,
    mode: str = AUTO,
    *,
    init: str = "wq",
    rank: Rank | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    example_input: Example | None = None,
    source: Source | None = None,
) -> SurgeryPlan:
    """What `convert` with the same arguments would do. Works on a copy without weights, so it costs no memory.

    Residuals are None in it: there are no weights to compare.
    """
    refuse_converted(model)
    converted = convert(
        meta_copy(model, buffers=rank is None),  # whether a rank can be chosen is tried out with numbers
        mode,
        init=init,
        rank=rank,
        include=include,
        exclude=exclude,
        inplace=True,
        example_input=example_of(model, example_input),
        source=source,
    )
    return surgery_of(converted)


def convert(
    model: nn.Module,
    mode: str = AUTO,
    *,
    init: str = "wq",
    calibration: Calibration | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    reconstruct: int = 0,
    max_loss: float | None = None,
    rank: Rank | Literal["auto"] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    inplace: bool = False,
    example_input: Example | None = None,
    source: Source | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Rewrite a model's attention so that fewer projections do the work.

    Returns a new model of the same class (the same object with `inplace`); only its attention modules change, into
    instances of subclasses of their own class. Parameters that the mode does not touch are bit-identical. What was
    done is on `.surgery`.

    Args:
        mode: `auto` (qv where V is as wide as Q, concat-half where it is wider) or a name from `modes.MODES`.
            Sites that the mode does not fit are left alone and listed in `.surgery.refused`.
        init: how the shared weight is chosen. `wq`: it is Q's, everything else as it was, and the model needs training.
            `wq-refit`: the output projection is fitted to it. `joint-svd`: the best weight for both its purposes, from
            the weights alone. `calibrated`: from images, site by site, with the layers after each site fitted too.
        calibration: images for `calibrated`, labels play no part: any iterable of preprocessed batches
            `[B, C, H, W]` or of (images, labels), a folder of images, a dataset of timm, or "synthetic" (the default),
            which draws them.
        calibration_images: how many of them to use at most.
        reconstruct: with `calibrated`, so many small steps by gradient afterwards, every block for itself, on other
            crops of the images where there are some; kept only if held-out images agree.
        max_loss: with `calibrated`, convert only as many sites as fit this budget, the most rewarding first. The loss
            is 1 - the mean cosine of the final features' tokens to the original's on held-out images.
        rank: with modes `qv` and `kv`, how many channels Q, K and V of every head get, in place of key_dim; the output
            projection reads as many. One number for all sites, or one by site name (others keep what they have), or
            "auto" (with `calibrated`): multiples of 8, as few as `max_loss` allows, or without it, as cost a tenth
            more than full ranks do, or a loss of 0.001.
            Logits keep their scale. The channels that stay are those best for the logits (`wq`, `wq-refit`), or for
            logits and values. Sites whose channels are not free (a norm of queries and keys, rotary positions, an
            activation before the output projection) are left alone and listed in `.surgery.refused`.
        include: patterns of site names (`blocks.0*`, `*.attn`); None takes all. `exclude` wins over it.
        example_input: what to run the (weightless) model on, if it is of no known library: a tensor, a shape
            with the batch first, or keyword arguments for its forward.
        source: how to build the model again, where the caller knows it (`save` needs it).
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        UsageError: unknown mode or init, `calibration`, `reconstruct`, `max_loss` or rank "auto" for an init that uses
            no images, or a rank that a site does not have.
        CalibrationError: the images are missing, of another kind than the model takes, or too few.
        AlreadyConvertedError: the model went through surgery before.
        NoAttentionError, NothingToConvertError, PatternError: nothing to do; the message says why.
        ExampleInputError: the model's input is not known, or it did not run on it.
    """
    check_options(mode, init, calibration, rank, reconstruct, max_loss)
    refuse_converted(model)
    example = example_of(model, example_input)
    found = select_sites(find_sites(model, example), include, exclude)
    images = Images(SYNTHETIC if calibration is None else calibration, calibration_images)
    order = Order(
        mode,
        init,
        images if init == "calibrated" else None,
        reconstruct,
        example,
        source or _describe(model),
        progress,
    )
    searching = max_loss is not None or rank == "auto"
    fixed = None if isinstance(rank, str) else rank
    check_names(fixed, found)
    operations, refused = prepare(model, found, mode, fixed)
    if not operations:
        reasons = dict.fromkeys(f"{one.fqn}: {one.reason}" for one in refused)
        listed = "; ".join(list(reasons)[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
        raise NothingToConvertError(
            f"mode {mode!r} fits none of the {len(found)} attention sites of {type(model).__name__}: {listed}. "
            "`armour-surgery inspect` lists the modes that fit"
        )
    if searching and not any(parameter.is_meta for parameter in model.parameters()):
        return convert_within(
            model, found, operations, refused, order, max_loss, fixed, automatic=rank == "auto", inplace=inplace
        )
    return perform(model, operations, refused, order, inplace=inplace)


def sensitivities(
    model: nn.Module,
    mode: str = AUTO,
    *,
    calibration: Calibration = SYNTHETIC,
    calibration_images: int = CALIBRATION_IMAGES,
    rank: Literal["auto"] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    example_input: Example | None = None,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """What converting each site alone wins and costs, measured on images; arguments and errors as of `convert`.

    Under `auto`, wide V is tried in `concat-half` and in `concat-full`. With rank "auto", every rank that is a multiple
    of 8 is predicted too. The model is not changed.
    """
    check_options(mode, "calibrated", calibration, rank)
    refuse_converted(model)
    example = example_of(model, example_input)
    found = select_sites(find_sites(model, example), include, exclude)
    order = Order(mode, "calibrated", Images(calibration, calibration_images), 0, example, None, progress)
    with torch.inference_mode(False):
        options = measure_sites(model, found, order, ranks=rank == "auto")
    if not options:
        raise NothingToConvertError(
            f"mode {mode!r} fits none of the {len(found)} attention sites of {type(model).__name__}; `armour-surgery "
            "inspect` lists the modes that fit"
        )
    return options


def replay(host: nn.Module, surgery: SurgeryPlan) -> nn.Module:
    """Do a recorded surgery again on a freshly built host, in place; its weights come afterwards.

    Raises:
        SchemaError: the plan names a site that the host does not have, or a mode that does not fit there.
        UsageError: the plan gives a site a rank that it cannot have.
    """
    own = next((p.dtype for p in host.parameters() if p.is_floating_point()), torch.float32)
    example = {}
    for name, shape, recorded in surgery.example:
        # A fresh build is in float32, whatever the converted model was cast to.
        dtype: torch.dtype = getattr(torch, recorded)
        example[name] = torch.empty(shape, dtype=own if dtype.is_floating_point else dtype, device="meta")
    found = {one.site.fqn: one for one in find_sites(host, example)}
    done: Outcomes = {}
    operations = []
    for site in surgery.sites:
        one = found.get(site.fqn)
        if one is None or site.mode not in one.site.modes:
            reason = one.site.refused.get(site.mode, "there is no such mode") if one else "it has no such attention"
            raise SchemaError(f"the plan converts {site.fqn!r} to {site.mode!r}, but in {type(host).__name__} {reason}")
        rank = choose_rank(one.site, site.mode, site.rank)
        rewritten, cls = rewrite_alike(host, one, site.mode, rank, done, check=False)
        if layout_of(rewritten) != site.layout:
            raise SchemaError(
                f"the plan keeps the channels of {site.fqn!r} in an order that this version of armour-surgery does not "
                "produce; load the folder with the version that saved it"
            )
        operations.append(Operation(site.fqn, site.mode, rank, rewritten, cls, one))
    for operation in operations:
        operate(host, operation, surgery.init)
    host.surgery = surgery  # type: ignore[assignment]
    hosts.mark_converted(host)
    return host


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


def _describe(model: nn.Module) -> Source | None:
    """How to build the model again; None where that is not known (then `save` explains what it needs)."""
    try:
        return hosts.describe(model)
    except ArmourError:
        return None
