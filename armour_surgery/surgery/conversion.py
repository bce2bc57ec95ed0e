"""The spine: find the sites, choose a mode for each, rewrite them, and keep the plan on the model.

`plan` says what would happen, `convert` does it. Every stage hands over records (`records.py`, `traced.py`) and knows
none of the others.
"""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from armour_surgery import hosts
from armour_surgery.altered import has_hooks, names_below
from armour_surgery.copies import has_weights, meta_copy
from armour_surgery.devices import usable_device
from armour_surgery.discover import find_sites
from armour_surgery.discover.dataflow import follow_model
from armour_surgery.discover.mlps import mlps_in
from armour_surgery.errors import ArmourError, NothingToConvertError, UsageError
from armour_surgery.initialize.processes import Processes
from armour_surgery.measure.cost import count_params
from armour_surgery.modes import AUTO, MODES, choose
from armour_surgery.notes import ArmourWarning
from armour_surgery.patching import on_cpu_by_default
from armour_surgery.progress import told
from armour_surgery.records import AttentionSite, Progress, Sensitivity, Source, SurgeryPlan
from armour_surgery.surgery.finite import refuse_not_finite
from armour_surgery.surgery.mlps import Narrowing, units_in_order
from armour_surgery.surgery.new_weights import to_read_again
from armour_surgery.surgery.operation import Prepared, prepare
from armour_surgery.surgery.order import CALIBRATION_IMAGES, SYNTHETIC, Images, Order, Rank, check_options, params_goal
from armour_surgery.surgery.original import tensor_digests
from armour_surgery.surgery.perform import perform, surgery_of
from armour_surgery.surgery.refusals import nothing_fits
from armour_surgery.surgery.selection import convert_within
from armour_surgery.surgery.sensitivity import measure_mlps, measure_sites
from armour_surgery.surgery.targets import (
    Example,
    check_names,
    example_of,
    leave_words_alone,
    left_by_patterns,
    patterns,
    refuse_converted,
    select_sites,
)
from armour_surgery.traced import FoundMlp, FoundSite, SeenSite
from armour_surgery.views import Sensitivities, Sites

__all__ = ["convert", "inspect", "plan", "sensitivities"]

Calibration = str | Iterable[Any]


@on_cpu_by_default
def inspect(model: nn.Module, *, example_input: Example | None = None) -> list[AttentionSite]:
    """Every attention of a model: its projections and sizes, which modes fit, and why the others do not.

    The model is neither run nor changed.

    Raises:
        UsageError: a wrapper is around the model (DataParallel, torch.compile); pass the model itself.
        ExampleInputError: nobody knows what to feed the model; pass `example_input`.
        DiscoveryError: it cannot run without its weights, because something was done to its modules.
        NoAttentionError: nothing in it is attention.
    """
    refuse_converted(model)
    seen = find_sites(model, example_of(model, example_input))
    # What `auto` would do is tried out as `convert` does: of another mode it is known that its formula fits.
    left = {site.fqn: site.reason for site in prepare(model, seen, AUTO).refused}
    return Sites(_kept(_described(model, site), left.get(site.fqn)) for site in seen)


def _kept(site: AttentionSite, reason: str | None) -> AttentionSite:
    """A site without the mode that `auto` takes, if there is a reason why it cannot be done."""
    mode, _ = choose(site, AUTO)
    if mode is None or reason is None:
        return site
    modes = tuple(other for other in site.modes if other != mode)
    return replace(site, modes=modes, refused={**site.refused, mode: reason})


def _described(model: nn.Module, site: SeenSite) -> AttentionSite:
    """A site as users see it; one that could not be followed has no sizes, and one reason for every mode."""
    if isinstance(site, FoundSite):
        hooked = any(has_hooks(model.get_submodule(name)) for name in names_below(model, site.fqn)[1:])
        return _without_hooked(model, site) if hooked else site.site
    return AttentionSite(site.fqn, "unknown", 0, 0, 0, None, None, None, refused=dict.fromkeys(MODES, site.reason))


def _without_hooked(model: nn.Module, found: FoundSite) -> AttentionSite:
    """A site with hooks inside, without the modes in which one of them would be on what gets narrower."""
    refused = dict(found.site.refused)
    for mode in found.site.modes:
        for left in prepare(model, [found], mode).refused:
            refused[mode] = left.reason
    return replace(found.site, modes=tuple(mode for mode in found.site.modes if mode not in refused), refused=refused)


@on_cpu_by_default
def plan(
    model: nn.Module,
    mode: str = AUTO,
    *,
    init: str = "wq",
    rank: Rank | None = None,
    gauge: str = "keep",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    example_input: Example | None = None,
    source: Source | None = None,
) -> SurgeryPlan:
    """What `convert` with the same arguments would do. Works on a copy without weights, so it costs no memory.

    Residuals are None in it: there are no weights to compare.
    """
    check_options(mode, init, None, rank, gauge=gauge)
    refuse_converted(model)
    order = Order(
        mode=mode,
        init=init,
        rank=rank,
        gauge=gauge,
        example=example_of(model, example_input),
        source=source or _describe(model)[0],
        original=tensor_digests(model),
    )
    prepared = _prepare(model, order, include, exclude)
    return surgery_of(perform(meta_copy(model), prepared, order, inplace=True))


@on_cpu_by_default
def convert(
    model: nn.Module,
    mode: str = AUTO,
    *,
    init: str = "wq",
    calibration: Calibration | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    reconstruct: int = 0,
    max_loss: float | None = None,
    params: int | str | None = None,
    mlp: bool = False,
    measured: Iterable[Sensitivity] | None = None,
    rank: Rank | Literal["auto"] | None = None,
    gauge: str = "keep",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    inplace: bool = False,
    device: str | torch.device | None = None,
    distributed: bool = False,
    example_input: Example | None = None,
    source: Source | None = None,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """Rewrite a model's attention so that fewer projections do the work.

    Returns a new model of the same class (the same object with `inplace`); only its attention modules change, into
    instances of subclasses of their own class. Parameters that the mode does not touch are bit-identical. What was
    done is on `.surgery`.

    Args:
        mode: `auto` (qv where V is as wide as Q, concat-half where it is wider, kv where only that fits) or a name
            from `modes.MODES`.
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
            is 1 - the mean cosine of the final features' tokens to the original's on held-out images. What each site
            costs is measured, under `auto` for `qv` and for `kv` where both fit.
        params: with `calibrated`, instead, the best model with so many parameters at most: a number, "18M", or "-15%".
        mlp: with one of these, also let MLPs have fewer hidden channels (multiples of 8), where that costs least. Those
            that the others replace worst stay, and the second layer is fitted anew. An MLP is two projections, and
            between them nothing but functions of single channels (an activation, a gate, a BatchNorm).
        measured: for one of these goals, what `sensitivities` with the same arguments returned, or another model's
            `.surgery.sensitivities`: it is not measured again, so that several sizes cost one measurement.
        rank: with modes `qv` and `kv`, how many channels Q, K and V of every head get, in place of key_dim; the output
            projection reads as many. One number for all sites, or one by site name (others keep what they have), or
            "auto" (with `calibrated`): multiples of 8, as few as `max_loss` allows, or without it, as cost a tenth
            more than full ranks do, or a loss of 0.001.
            Logits keep their scale. The channels that stay are those best for the logits (`wq`, `wq-refit`), or for
            logits and values. Sites whose channels are not free (a norm of queries and keys, rotary positions, an
            activation before the output projection) are left alone and listed in `.surgery.refused`.
        gauge: a conversion leaves the basis of every head open. `fixed` chooses it, after the weights, so that in the
            projection that serves twice (V's in `qk`) what reads a block of channels is the identity, which need not
            be stored: H d^2 parameters fewer at each site, and nothing lost but rounding. It is for float32; in
            bfloat16 and float16 a warning says what rounding comes to. Sites whose basis is not free, as for a rank,
            are left alone and listed in `.surgery.refused`.
        device: with `calibrated`, where to compute (`cuda`, or `auto`: a GPU if there is one); None is where the model
            is. The model stays where it is, and its blocks come to the device one by one, so it may be larger than
            that. With `inplace`, a model needs no memory for a second one.
        distributed: with `calibrated`, split the images over the processes of torch's process group. All of them call
            this with the same arguments, and all get the same model, that of one process but for rounding.
        include: patterns of site names (`blocks.0*`, `*.attn`); None takes all. `exclude` wins over it.
        example_input: what to run the (weightless) model on, if it is of no known library: a tensor, a shape
            with the batch first, or keyword arguments for its forward, nested or not (what a processor gives). Numbers
            count where the model looks at them. A name like `vision_tower:pixel_values` runs that submodule alone; so
            do models of transformers that mix images with words, where no example is given. Without `include`, `auto`
            leaves their text model as it is.
        source: how to build the model again, where the caller knows it (`save` needs it).
        progress: True shows a bar (tqdm, also in notebooks); a function is called with what is being done, how much of
            it is done, and how much there is.

    Raises:
        UsageError: a wrapper is around the model, unknown mode, init or gauge, `calibration`, `reconstruct`,
            `max_loss` or rank "auto" for an init that uses no images, a rank that a site does not have, a device that
            is not here, or `distributed` without a process group or with other weights in one of them.
        CalibrationError: the images are missing, of another kind than the model takes, or too few.
        AlreadyConvertedError: the model went through surgery before.
        NoAttentionError, NothingToConvertError, PatternError: nothing to do; the message says why.
        NotFiniteError: a weight that has to be read is NaN, infinite, or so large that products with it are.
        ExampleInputError: the model's input is not known, or it did not run on it.
        DiscoveryError: it cannot run without its weights, because something was done to its modules.
    """
    check_options(
        mode, init, calibration, rank, reconstruct, max_loss, params, mlp, measured, gauge, device, distributed
    )
    refuse_converted(model)
    problem: str | None = None
    if source is None:
        source, problem = _describe(model)
    with told(progress) as tell, Processes.together(distributed) as processes:
        order = Order(
            mode=mode,
            init=init,
            rank=rank,
            max_loss=max_loss,
            params_goal=None if params is None else params_goal(params, count_params(model)),
            mlp=mlp,
            gauge=gauge,
            measured=None if measured is None else tuple(measured),
            images=Images(SYNTHETIC if calibration is None else calibration, calibration_images),
            steps=reconstruct,
            example=example_of(model, example_input),
            source=source,
            original=tensor_digests(model),
            progress=tell,
            device=_place(device),
            processes=processes,
        )
        if order.original != processes.first(order.original):
            raise UsageError(
                f"process {processes.rank} of {processes.world} has a {type(model).__name__} with other weights than "
                "the first; give all of them the same, or set the same seed where some are random"
            )
        prepared = _prepare(model, order, include, exclude)
        if problem is not None:
            # Now, and not by `save`, after days of training.
            warnings.warn(problem, ArmourWarning, stacklevel=3)  # past `on_cpu_by_default`
        if order.weighs_sites and has_weights(model):
            return convert_within(model, prepared, order, inplace=inplace)
        # Without weights there is nothing to weigh by: MLPs keep what they have.
        return perform(model, replace(prepared, mlps=[]), order, inplace=inplace)


def _prepare(
    model: nn.Module, order: Order, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> Prepared:
    """What can be done to a model; its weights are looked at, and nothing is changed."""
    sites, mlps, units = _selected(model, order, include, exclude)
    check_names(order.fixed_rank, sites)
    if order.mode == AUTO and include is None:
        sites = leave_words_alone(model, sites)
    refit = order.init != "wq"
    prepared = prepare(model, sites, order.mode, order.fixed_rank, refit=refit, gauge=order.fixes_gauge)
    if not prepared.operations and not mlps:
        raise nothing_fits(model, order.mode, prepared.refused)
    prepared = replace(prepared, mlps=[Narrowing(mlp, mlp.hidden) for mlp in mlps], units=units)
    found = [operation.found for operation in prepared.operations]
    refuse_not_finite(model, found, computing=refit or order.fixes_gauge or order.rank is not None)
    return prepared


def _selected(
    model: nn.Module, order: Order, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> tuple[list[SeenSite], list[FoundMlp], dict[str, str]]:
    """The sites that the patterns leave; where they are asked for, MLPs too, and the block that each of these is in."""
    # They may be iterables that can be read once.
    include, exclude = None if include is None else patterns(include), patterns(exclude)
    found = find_sites(model, order.example)
    if not order.mlp:
        return select_sites(found, include, exclude), [], {}
    flow = follow_model(model, order.example)
    every = mlps_in(model, flow)
    if not every:
        warnings.warn(
            f"mlp found no MLP in {type(model).__name__} that can have fewer channels: between its projections lies "
            "more than functions of single channels (a LayerNorm, a convolution over neighbors); attention alone is "
            "weighed",
            ArmourWarning,
            stacklevel=5,  # past `on_cpu_by_default`
        )
    sites = select_sites(found, include, exclude, [mlp.fqn for mlp in every])
    mlps = [mlp for mlp in every if left_by_patterns(mlp.fqn, include, exclude)]
    followed = [site for site in found if isinstance(site, FoundSite)]
    return sites, mlps, units_in_order(model, flow, followed, every)


@on_cpu_by_default
def sensitivities(
    model: nn.Module,
    mode: str = AUTO,
    *,
    calibration: Calibration = SYNTHETIC,
    calibration_images: int = CALIBRATION_IMAGES,
    rank: Literal["auto"] | None = None,
    mlp: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    device: str | torch.device | None = None,
    distributed: bool = False,
    example_input: Example | None = None,
    progress: Progress | bool | None = None,
) -> list[Sensitivity]:
    """What converting each site alone wins and costs, measured on images; arguments and errors as of `convert`.

    Under `auto`, `qv` and `kv` are tried where both fit, and for wide V `concat-half` and `concat-full`. With rank
    "auto", every rank that is a multiple of 8 is predicted too, and with `mlp` what MLPs with fewer hidden channels
    cost. The model is not changed.
    """
    check_options(mode, "calibrated", calibration, rank)
    refuse_converted(model)
    with told(progress) as tell, torch.inference_mode(False), Processes.together(distributed) as processes:
        order = Order(
            mode=mode,
            init="calibrated",
            images=Images(calibration, calibration_images),
            mlp=mlp,
            example=example_of(model, example_input),
            progress=tell,
            device=_place(device),
            processes=processes,
        )
        order = replace(order, images=to_read_again(model, order.example, order.images))
        sites, mlps, units = _selected(model, order, include, exclude)
        refuse_not_finite(model, [site for site in sites if isinstance(site, FoundSite)], computing=True)
        options = measure_sites(model, sites, order, ranks=rank == "auto")
        options += measure_mlps(model, mlps, units, order)
    if not options:
        raise NothingToConvertError(
            f"mode {mode!r} fits none of the {len(sites)} attention sites of {type(model).__name__}; `armour-surgery "
            "inspect` lists the modes that fit"
        )
    return Sensitivities(options)


def _place(device: str | torch.device | None) -> torch.device | None:
    return None if device is None else usable_device(device, f"device {str(device)!r}")


def _describe(model: nn.Module) -> tuple[Source | None, str | None]:
    """How to build the model again, and why nobody can although its library is known.

    Without either it is a model of no library, or `save` explains what it needs.
    """
    try:
        source, difference = hosts.compared(model)
    except ArmourError:
        return None, None
    if difference is None:
        return source, None
    if hosts.is_users_class(model):
        return None, None  # saved as a model of no library
    return None, (
        f"what comes of this {type(model).__name__} cannot be saved, since {source.library} builds another one "
        f"({source.architecture}): {difference}. If it is a part of a model, put it back and save the whole; if it was "
        "built with arguments that it does not show, pass them to save as model_args; if it was changed afterwards "
        "(pruned heads), keep its state_dict()"
    )
