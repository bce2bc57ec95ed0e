"""The spine: find the sites, choose a mode for each, rewrite them, and keep the plan on the model.

`plan` says what would happen, `convert` does it. Every stage hands over records (`sites.py`, `traced.py`) and knows
none of the others.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import nn

from armour_surgery import hosts
from armour_surgery.calibration import Images, Progress, choose_weights
from armour_surgery.discover import FoundSite, find_sites
from armour_surgery.errors import (
    AlreadyConvertedError,
    ArmourError,
    ExampleInputError,
    NothingToConvertError,
    PatternError,
    SchemaError,
    UsageError,
)
from armour_surgery.measure.cost import CostReport, count_macs, count_params
from armour_surgery.meta import full_copy, meta_copy
from armour_surgery.modes import AUTO, choose_rank, get_mode
from armour_surgery.operation import Operation, Outcomes, layout_of, operate, prepare, rewrite_alike
from armour_surgery.rewrite import ArmourAttention
from armour_surgery.sites import AttentionSite, SitePlan, Source, SurgeryPlan

__all__ = ["INITS", "check_options", "convert", "inspect", "plan", "replay", "surgery_of"]

INITS = ("wq", "wq-refit", "joint-svd", "calibrated")
CALIBRATION_IMAGES = 256
SYNTHETIC = "synthetic"
Calibration = str | Iterable[Any]
Rank = int | Mapping[str, int]
Example = dict[str, torch.Tensor] | torch.Tensor | tuple[int, ...]


def inspect(model: nn.Module, *, example_input: Example | None = None) -> list[AttentionSite]:
    """Every attention of a model: its projections and sizes, which modes fit, and why the others do not.

    The model is neither run nor changed.

    Raises:
        ExampleInputError: nobody knows what to feed the model; pass `example_input`.
        NoAttentionError: nothing in it is attention.
    """
    _refuse_converted(model)
    return [found.site for found in find_sites(model, _example(model, example_input))]


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
    _refuse_converted(model)
    converted = convert(
        meta_copy(model, buffers=rank is None),  # whether a rank can be chosen is tried out with numbers
        mode,
        init=init,
        rank=rank,
        include=include,
        exclude=exclude,
        inplace=True,
        example_input=_example(model, example_input),
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
    rank: Rank | None = None,
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
        rank: with modes `qv` and `kv`, how many channels Q, K and V of every head get, in place of key_dim; the output
            projection reads as many. One number for all sites, or one by site name (others keep what they have).
            Logits keep their scale. The channels that stay are those best for the logits (`wq`, `wq-refit`), or for
            logits and values. Sites whose channels are not free (a norm of queries and keys, rotary positions, an
            activation before the output projection) are left alone and listed in `.surgery.refused`.
        include: patterns of site names (`blocks.0*`, `*.attn`); None takes all. `exclude` wins over it.
        example_input: what to run the (weightless) model on, if it is of no known library: a tensor, a shape
            with the batch first, or keyword arguments for its forward.
        source: how to build the model again, where the caller knows it (`save` needs it).
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        UsageError: unknown mode or init, `calibration` for an init that uses no images, or a rank that a site does
            not have.
        CalibrationError: the images are missing, of another kind than the model takes, or too few.
        AlreadyConvertedError: the model went through surgery before.
        NoAttentionError, NothingToConvertError, PatternError: nothing to do; the message says why.
        ExampleInputError: the model's input is not known, or it did not run on it.
    """
    check_options(mode, init, calibration, rank)
    _refuse_converted(model)
    example = _example(model, example_input)
    found = _select(find_sites(model, example), include, exclude)
    _check_names(rank, found)
    source = source or _describe(model)
    operations, refused = prepare(model, found, mode, rank)
    if not operations:
        reasons = dict.fromkeys(f"{one.fqn}: {one.reason}" for one in refused)
        listed = "; ".join(list(reasons)[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
        raise NothingToConvertError(
            f"mode {mode!r} fits none of the {len(found)} attention sites of {type(model).__name__}: {listed}. "
            "`armour-surgery inspect` lists the modes that fit"
        )
    before, params_before = count_macs(model, example), count_params(model)
    with torch.inference_mode(False):  # tensors made in inference mode could never be trained
        # `wq` takes rows as they are, unless fewer than a head has are to stay.
        solved = [one for one in operations if init != "wq" or one.rank is not None]
        original = full_copy(model) if inplace and solved else model
        result = model if inplace else full_copy(model)
        sites = [operate(result, operation, init) for operation in operations]
        fidelity = None
        if solved and not any(parameter.is_meta for parameter in model.parameters()):
            images = Images(calibration or SYNTHETIC, calibration_images) if init == "calibrated" else None
            chosen, fidelity = choose_weights(original, result, solved, init, example, images, progress)
            by_name = {one.fqn: one for one in chosen}
            sites = [
                replace(site, residual=by_name[site.fqn].residual, steps=by_name[site.fqn].steps)
                if site.fqn in by_name
                else site
                for site in sites
            ]
    after = count_macs(result, example)
    result.surgery = SurgeryPlan(  # type: ignore[assignment]
        mode=mode,
        init=init,
        sites=tuple(_with_macs(site, before, after) for site in sites),
        refused=tuple(refused),
        params_before=params_before,
        params_after=count_params(result),
        macs_before=before.macs,
        macs_after=after.macs,
        example=tuple((name, tuple(value.shape), str(value.dtype)[6:]) for name, value in example.items()),
        source=source,
        fidelity=fidelity,
    )
    hosts.mark_converted(result)
    return result


def surgery_of(model: nn.Module) -> SurgeryPlan:
    """What was done to a converted model.

    Raises:
        UsageError: the model is not converted.
    """
    surgery = getattr(model, "surgery", None)
    if not isinstance(surgery, SurgeryPlan):
        raise UsageError(f"this {type(model).__name__} is not converted; pass what convert() returned")
    return surgery


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


def check_options(mode: str, init: str, calibration: object = None, rank: object = None) -> None:
    """Check what can be checked without a model.

    Raises:
        UsageError: there is no such mode or init, the init uses no images and is given some, or the mode has no rank
            and is given one.
    """
    if calibration is not None and init in INITS and init != "calibrated":
        raise UsageError(
            f"init {init!r} uses no images; use init 'calibrated' with calibration images, or leave them out"
        )
    if mode != AUTO:
        get_mode(mode)
    if init not in INITS:
        raise UsageError(f"unknown init {init!r}; choose one of {', '.join(INITS)}")
    if rank is not None and mode != AUTO and not get_mode(mode).has_rank:
        raise UsageError(f"mode {mode!r} has no rank to choose; give a rank with qv or kv, or leave it out")
    for value in rank.values() if isinstance(rank, Mapping) else [rank]:
        if rank is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"rank {value!r} is not a whole number from 1 to key_dim; 48, say")


def _check_names(rank: Rank | None, found: list[FoundSite]) -> None:
    """Refuse ranks for sites that there are not."""
    names = [one.site.fqn for one in found]
    unknown = [name for name in rank if name not in names] if isinstance(rank, Mapping) else []
    if unknown:
        raise PatternError(
            f"rank names {unknown[0]!r}, which is none of the {len(names)} attention sites to convert, such as "
            f"{names[0]!r}"
        )


def _refuse_converted(model: nn.Module) -> None:
    done = next((name for name, module in model.named_modules() if isinstance(module, ArmourAttention)), None)
    if done is not None or hasattr(model, "surgery"):
        raise AlreadyConvertedError(
            f"{type(model).__name__} is converted already ({done or 'it carries a surgery plan'}). Convert the "
            "original model, with everything that you want in one call"
        )


def _example(model: nn.Module, given: Example | None) -> dict[str, torch.Tensor]:
    """Keyword arguments on the meta device."""
    if given is None:
        return hosts.example_input(model)
    if isinstance(given, tuple):
        given = _of_shape(given)
    if isinstance(given, torch.Tensor):
        given = {list(signature(type(model).forward).parameters)[1]: given}
    tensors = isinstance(given, dict) and all(isinstance(value, torch.Tensor) for value in given.values())
    if not tensors or all(value.ndim == 0 for value in given.values()):
        raise ExampleInputError(
            f"example_input is {given!r}; pass a tensor, a shape (batch, channels, height, width), or a dictionary "
            "from argument names to tensors"
        )
    example = {}
    for name, value in given.items():
        # Axes of size one hide which axis is which; a batch of two costs nothing on the meta device.
        shape = (max(2, value.shape[0]), *value.shape[1:]) if value.ndim else ()
        example[name] = torch.empty(shape, dtype=value.dtype, device="meta")
    return example


def _of_shape(shape: tuple[int, ...]) -> torch.Tensor:
    whole = all(isinstance(size, int) and size > 0 for size in shape)
    if len(shape) != 4 or not whole or math.prod(shape) > 2**40:
        raise ExampleInputError(f"example_input {shape!r} is not a shape (batch, channels, height, width)")
    return torch.empty(shape, device="meta")


def _describe(model: nn.Module) -> Source | None:
    """How to build the model again; None where that is not known (then `save` explains what it needs)."""
    try:
        return hosts.describe(model)
    except ArmourError:
        return None


def _patterns(given: str | Iterable[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _select(
    found: list[FoundSite], include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> list[FoundSite]:
    """The sites that the patterns leave. A pattern also matches everything below a module that it matches."""

    def matches(fqn: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(fqn, pattern) or fnmatch.fnmatchcase(fqn, f"{pattern}.*")

    names = [one.site.fqn for one in found]
    wanted = None if include is None else _patterns(include)
    unwanted = _patterns(exclude)
    for pattern in [*(wanted or ()), *unwanted]:
        if not any(matches(name, pattern) for name in names):
            raise PatternError(
                f"pattern {pattern!r} matches none of the {len(names)} attention sites, which are named like "
                f"{names[0]!r} and {names[-1]!r}"
            )
    chosen = [
        one
        for one in found
        if (wanted is None or any(matches(one.site.fqn, pattern) for pattern in wanted))
        and not any(matches(one.site.fqn, pattern) for pattern in unwanted)
    ]
    if not chosen:
        raise PatternError(
            f"include {wanted if wanted is not None else 'everything'} and exclude {unwanted} leave none of the "
            f"{len(names)} attention sites"
        )
    return chosen


def _with_macs(site: SitePlan, before: CostReport, after: CostReport) -> SitePlan:
    return replace(site, macs_before=before.by_module.get(site.fqn, 0), macs_after=after.by_module.get(site.fqn, 0))
