"""How alike the projections of each attention are, and what it would cost to make two of them one.

Discovery says which rows of which parameters are Q, K and V; `measure.redundancy` compares them; the closed forms of
`initialize` find the best shared weight for each pair.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from armour_surgery.copies import full_copy
from armour_surgery.discover import FoundSite, find_sites
from armour_surgery.errors import TraceError, UsageError
from armour_surgery.initialize.weights import locate, read
from armour_surgery.likeness.pairs import PAIRS, THRESHOLD, PairRedundancy, SiteRedundancy, compare_pair, why_not
from armour_surgery.modes import AUTO, choose
from armour_surgery.records import Progress
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
    return compare_layers(
        model,
        threshold=threshold,
        include=include,
        exclude=exclude,
        example_input=example_input,
        progress=progress,
    )[0]


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
    found = select_sites(find_sites(model, example), include, exclude)
    chosen = _choose_layer(found, layer)
    weights = {one.site.fqn: _weights(model, one) for one in found if one.traced is not None}
    sites = {one.site.fqn: _compare(one, weights.get(one.site.fqn, {}), threshold) for one in found}
    for number, pair in enumerate(PAIRS):
        if progress is not None:
            progress("finding the best shared weights", number, len(PAIRS))
        for fqn, (mode, residual, refused) in _shared(model, found, pair, example).items():
            site = sites[fqn]
            if pair in site.pairs:
                one = replace(site.pairs[pair], mode=mode, residual=residual, refused=refused)
                sites[fqn] = replace(site, pairs={**site.pairs, pair: one})
    return [_with_default(one, sites[one.site.fqn]) for one in found], Layer(chosen, weights[chosen])


def _choose_layer(found: list[FoundSite], layer: str | None) -> str:
    names = [one.site.fqn for one in found]
    followed = [one.site.fqn for one in found if one.traced is not None]
    if not followed:
        reason = next(iter(found[0].site.refused.values()))
        raise TraceError(f"none of the {len(found)} attention sites could be followed ({names[0]}: {reason})")
    if layer is None:
        return followed[0]
    name = names[int(layer)] if layer.isdecimal() and int(layer) < len(names) else layer
    if name not in names:
        raise UsageError(
            f"layer {layer!r} is none of the {len(names)} attention sites; give a number from 0 to {len(names) - 1}, "
            f"or a name such as {names[0]!r}"
        )
    if name not in followed:
        reason = next(iter(found[names.index(name)].site.refused.values()))
        raise TraceError(f"{name} could not be followed ({reason}); choose another layer, such as {followed[0]!r}")
    return name


def _weights(model: nn.Module, one: FoundSite) -> dict[str, Tensor]:
    """What q, k and v are made with, `[H, D, d]` in float64, without biases."""
    assert one.traced is not None
    module = model.get_submodule(one.site.fqn)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise UsageError(
            f"the weights of {one.site.fqn} are on the meta device, so there is nothing to compare; load some"
        )
    roles = {"q": one.traced.q, "k": one.traced.k, "v": one.traced.v}
    return {letter: read(module, locate(module, role, {}))[:, :-1] for letter, role in roles.items()}


def _compare(one: FoundSite, weights: dict[str, Tensor], threshold: float) -> SiteRedundancy:
    site = one.site
    reasons = {pair: why_not(weights, pair) if weights else next(iter(site.refused.values())) for pair in PAIRS}
    pairs = {pair: compare_pair(weights, pair, threshold) for pair, reason in reasons.items() if reason is None}
    skipped = {pair: reason for pair, reason in reasons.items() if reason is not None}
    return SiteRedundancy(site.fqn, site.kind, site.num_heads, site.key_dim, site.value_dim, pairs, skipped)


def _shared(
    model: nn.Module, found: list[FoundSite], pair: str, example: dict[str, Tensor]
) -> dict[str, tuple[str | None, float | None, str | None]]:
    """By site: the mode that makes a pair one, the residual of the best shared weight, and why there is none."""
    modes: dict[str, str] = {}
    made: dict[str, tuple[str | None, float | None, str | None]] = {}
    for one in found:
        fitting = [mode for mode in _MODES[pair] if mode in one.site.modes]
        heads = {role.num_heads for role in (one.site.q, one.site.k, one.site.v) if role}
        if not fitting:
            made[one.site.fqn] = None, None, one.site.refused[_MODES[pair][0]]
        elif len(heads) > 1:
            made[one.site.fqn] = fitting[0], None, "there is no closed form where several heads of Q share one of K"
        else:
            modes[one.site.fqn] = fitting[0]
    operations, refused = prepare(model, [one for one in found if one.site.fqn in modes], modes)
    for left in refused:
        made[left.fqn] = None, None, left.reason
    if operations:
        with torch.inference_mode(False):
            converted = full_copy(model)
            for operation in operations:
                operate(converted, operation, "joint-svd")
            results, _ = choose_weights(model, converted, operations, "joint-svd", example, None, None)
        for result in results:
            made[result.fqn] = modes[result.fqn], result.residual, None
    return made


def _with_default(one: FoundSite, site: SiteRedundancy) -> SiteRedundancy:
    mode, _ = choose(one.site, AUTO)
    taken: PairRedundancy | None = next((pair for pair in site.pairs.values() if mode and pair.mode == mode), None)
    return replace(site, mode=taken.mode, residual=taken.residual) if taken else site
