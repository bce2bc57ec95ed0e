"""How alike the projections of each attention are, and what it would cost to make two of them one.

Discovery says which rows of which parameters are Q, K and V; `pairs` compares them; the closed forms of `initialize`
find the best shared weight for each pair.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from armour_surgery.copies import full_copy
from armour_surgery.discover import FoundSite, find_sites
from armour_surgery.errors import TraceError, UsageError
from armour_surgery.initialize.weights import locate, read
from armour_surgery.likeness.pairs import PAIRS, THRESHOLD, SiteRedundancy, compare_pair, why_not
from armour_surgery.modes import AUTO, choose
from armour_surgery.records import AttentionSite, Progress
from armour_surgery.surgery.new_weights import choose_weights
from armour_surgery.surgery.operation import operate, prepare
from armour_surgery.surgery.targets import Example, example_of, refuse_converted, select_sites

__all__ = ["Layer", "compare_layers", "redundancy"]

# The modes that make a pair one, the first that fits: with wide V, Q takes the place of its first channels.
_MODES = {"qk": ("qk",), "kv": ("kv",), "qv": ("qv", "concat-half")}


@dataclass(frozen=True)
class Layer:
    """The weights of one attention: `weights` maps q, k and v to `[H, D, d]` in float64."""

    fqn: str
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class _Sharing:
    """What comes of making two roles one: see `mode`, `residual` and `refused` of `PairRedundancy`."""

    mode: str | None = None
    residual: float | None = None
    refused: str | None = None


def redundancy(
    model: nn.Module,
    *,
    threshold: float = THRESHOLD,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    example_input: Example | None = None,
    progress: Progress | None = None,
) -> list[SiteRedundancy]:
    """For every attention of a model, how alike the weights of Q, K and V are, and what sharing them costs.

    Entry by entry `| |A| - |B| |`, and the percentage of entries where it is below `threshold`: the paper's Figure 1. A
    BatchNorm that follows a projection is folded into it; biases are left out. Where roles differ in width, the first
    channels of each head are compared, those that the concat modes share. Beside that the residual of the best shared
    weight in closed form (`joint-svd`: from the weights alone, tokens taken to be what the LayerNorm before the site
    makes of noise). Random weights give numbers that mean nothing. The model is not changed.

    `include`, `exclude` and `example_input` are as in `convert`; `progress` is called with what is being done, how much
    of it is done, and how much there is.

    Raises:
        UsageError: the weights are on the meta device or no numbers, or the threshold is not above 0.
        AlreadyConvertedError: the model went through surgery, and a projection is gone.
        NoAttentionError, PatternError, TraceError: there is no attention to compare; the message says why.
        ExampleInputError: the model's input is not known, or it did not run on it.

    Source: arXiv 2108.01778, section 3.2 and Figure 1.
    """
    sites, _ = compare_layers(
        model,
        threshold=threshold,
        include=include,
        exclude=exclude,
        example_input=example_input,
        progress=progress,
    )
    return sites


def compare_layers(
    model: nn.Module,
    *,
    threshold: float = THRESHOLD,
    layer: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    example_input: Example | None = None,
    progress: Progress | None = None,
) -> tuple[list[SiteRedundancy], Layer]:
    """`redundancy`, and the weights of one `layer`: its name, or its number from 0; by default the first that can be.

    Raises:
        UsageError: there is no such layer; or see `redundancy`.
        TraceError: it could not be followed.
    """
    refuse_converted(model)
    example = example_of(model, example_input)
    selected = select_sites(find_sites(model, example), include, exclude)
    chosen = _choose_layer(selected, layer)
    weights = {
        found_site.site.fqn: _weights(model, found_site) for found_site in selected if found_site.traced is not None
    }
    sites: dict[str, SiteRedundancy] = {}
    for found_site in selected:
        fqn = found_site.site.fqn
        sites[fqn] = _compare(found_site.site, weights.get(fqn, {}), threshold)
    for number, pair in enumerate(PAIRS):
        if progress is not None:
            progress("finding the best shared weights", number, len(PAIRS))
        for fqn, sharing in _share(model, selected, pair, example).items():
            site = sites[fqn]
            if pair in site.pairs:
                priced = replace(
                    site.pairs[pair], mode=sharing.mode, residual=sharing.residual, refused=sharing.refused
                )
                sites[fqn] = replace(site, pairs={**site.pairs, pair: priced})
    # Last, for what a mode costs is known only now.
    redundancies = [_with_default(found_site.site, sites[found_site.site.fqn]) for found_site in selected]
    return redundancies, Layer(chosen, weights[chosen])


def _choose_layer(selected: list[FoundSite], layer: str | None) -> str:
    names = [found_site.site.fqn for found_site in selected]
    followed = [found_site.site.fqn for found_site in selected if found_site.traced is not None]
    if not followed:
        reason = _any_reason(selected[0].site)
        raise TraceError(f"none of the {len(selected)} attention sites could be followed ({names[0]}: {reason})")
    if layer is None:
        return followed[0]
    name = names[int(layer)] if layer.isdecimal() and int(layer) < len(names) else layer
    if name not in names:
        raise UsageError(
            f"layer {layer!r} is none of the {len(names)} attention sites; give a number from 0 to {len(names) - 1}, "
            f"or a name such as {names[0]!r}"
        )
    if name not in followed:
        reason = _any_reason(selected[names.index(name)].site)
        raise TraceError(f"{name} could not be followed ({reason}); choose another layer, such as {followed[0]!r}")
    return name


def _any_reason(site: AttentionSite) -> str:
    """Why a site could not be followed, which every mode has as its reason."""
    return next(iter(site.refused.values()))


def _weights(model: nn.Module, found_site: FoundSite) -> dict[str, Tensor]:
    """What q, k and v are made with, `[H, D, d]` in float64, without biases."""
    assert found_site.traced is not None
    fqn = found_site.site.fqn
    module = model.get_submodule(fqn)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise UsageError(f"the weights of {fqn} are on the meta device, so there is nothing to compare; load some")
    roles = {"q": found_site.traced.q, "k": found_site.traced.k, "v": found_site.traced.v}
    # The last row is the bias.
    return {letter: read(module, locate(module, role, {}))[:, :-1] for letter, role in roles.items()}


def _compare(site: AttentionSite, weights: dict[str, Tensor], threshold: float) -> SiteRedundancy:
    """The pairs of a site; without `weights`, those of a site that could not be followed, none is compared."""
    pairs, skipped = {}, {}
    for pair in PAIRS:
        reason = why_not(weights, pair) if weights else _any_reason(site)
        if reason is None:
            pairs[pair] = compare_pair(weights, pair, threshold)
        else:
            skipped[pair] = reason
    return SiteRedundancy(site.fqn, site.kind, site.num_heads, site.key_dim, site.value_dim, pairs, skipped)


def _share(model: nn.Module, selected: list[FoundSite], pair: str, example: dict[str, Tensor]) -> dict[str, _Sharing]:
    """By site, what comes of making a pair one."""
    modes: dict[str, str] = {}
    sharings: dict[str, _Sharing] = {}
    for found_site in selected:
        site = found_site.site
        fitting = [mode for mode in _MODES[pair] if mode in site.modes]
        heads = {role.num_heads for role in (site.q, site.k, site.v) if role}
        if not fitting:
            sharings[site.fqn] = _Sharing(refused=site.refused[_MODES[pair][0]])
        elif len(heads) > 1:
            reason = "there is no closed form where several heads of Q share one of K"
            sharings[site.fqn] = _Sharing(fitting[0], refused=reason)
        else:
            modes[site.fqn] = fitting[0]
    operations, refused = prepare(model, [each for each in selected if each.site.fqn in modes], modes)
    for left in refused:
        sharings[left.fqn] = _Sharing(refused=left.reason)
    if operations:
        # The caller may be in inference mode, whose tensors could not become parameters of the copy.
        with torch.inference_mode(False):
            converted = full_copy(model)
            for operation in operations:
                operate(converted, operation, "joint-svd")
            results, _ = choose_weights(model, converted, operations, "joint-svd", example, None, None)
        for result in results:
            sharings[result.fqn] = _Sharing(modes[result.fqn], result.residual)
    return sharings


def _with_default(site: AttentionSite, compared: SiteRedundancy) -> SiteRedundancy:
    """A site with what `convert` would do there if nothing else was asked for."""
    mode, _ = choose(site, AUTO)
    for pair in compared.pairs.values():
        if mode is not None and pair.mode == mode:
            return replace(compared, mode=pair.mode, residual=pair.residual)
    return compared
