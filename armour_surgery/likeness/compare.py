"""How alike the projections of each attention are, and what it would cost to make two of them one.

Discovery says which rows of which parameters are Q, K and V; `pairs.py` compares them; the closed forms of
`initialize` find the best shared weight for each pair.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from armour_surgery.copies import full_copy, has_weights
from armour_surgery.discover import find_sites
from armour_surgery.errors import TraceError, UsageError
from armour_surgery.initialize.weights import locate, read
from armour_surgery.likeness.pairs import PAIRS, THRESHOLD, PairRedundancy, SiteRedundancy, compare_pair, why_not
from armour_surgery.likeness.table import Redundancies
from armour_surgery.modes import AUTO, choose
from armour_surgery.patching import on_cpu_by_default
from armour_surgery.progress import told
from armour_surgery.records import AttentionSite, Progress, RefusedSite
from armour_surgery.surgery.new_weights import choose_weights
from armour_surgery.surgery.operation import operate, prepare
from armour_surgery.surgery.order import Order
from armour_surgery.surgery.targets import Example, example_of, refuse_converted, select_sites
from armour_surgery.traced import FoundSite, SeenSite

__all__ = ["Layer", "compare_layers", "redundancy"]

# The modes that make a pair one, the first that fits: with wide V, Q or K takes the place of its first channels.
_MODES = {"qk": ("qk",), "kv": ("kv", "concat-key"), "qv": ("qv", "concat-half")}


@dataclass(frozen=True)
class Layer:
    """The weights of one attention: `weights` maps q, k and v to `[H, D, d]` in float64."""

    fqn: str
    weights: dict[str, Tensor]


@on_cpu_by_default
def redundancy(
    model: nn.Module,
    *,
    threshold: float = THRESHOLD,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    example_input: Example | None = None,
    progress: Progress | bool | None = None,
) -> list[SiteRedundancy]:
    """For every attention of a model, how alike the weights of Q, K and V are, and what sharing them costs.

    Entry by entry `| |A| - |B| |`, and the percentage of entries where it is below `threshold`: the paper's Figure 1. A
    BatchNorm that follows a projection is folded into it; biases are left out. Where roles differ in width, the first
    channels of each head are compared, those that the concat modes share. Beside that the residual of the best shared
    weight in closed form (`joint-svd`: from the weights alone, tokens taken to be what the LayerNorm before the site
    makes of noise). Random weights give numbers that mean nothing. The model is not changed.

    `include`, `exclude`, `example_input` and `progress` are as in `convert`.

    Raises:
        UsageError: the weights are on the meta device or no numbers, or the threshold is not above 0.
        AlreadyConvertedError: the model went through surgery, and a projection is gone.
        NoAttentionError, PatternError, TraceError: there is no attention to compare; the message says why.
        ExampleInputError: the model's input is not known, or it did not run on it.

    Source: arXiv 2108.01778, section 3.2 and Figure 1.
    """
    with told(progress) as tell:
        sites, _ = compare_layers(
            model,
            threshold=threshold,
            include=include,
            exclude=exclude,
            example_input=example_input,
            progress=tell,
        )
    return Redundancies(sites, threshold)


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
    seen = [_with_three_weights(site) for site in select_sites(find_sites(model, example), include, exclude)]
    chosen = _choose_layer(seen, layer)
    followed = [site for site in seen if isinstance(site, FoundSite)]
    weights = {site.fqn: _weights(model, site) for site in followed}
    compared: dict[str, SiteRedundancy] = {}
    for site in seen:
        if isinstance(site, FoundSite):
            compared[site.fqn] = _compare(site.site, weights[site.fqn], threshold)
        else:
            compared[site.fqn] = SiteRedundancy(site.fqn, "unknown", 0, 0, 0, {}, dict.fromkeys(PAIRS, site.reason))
    for number, pair in enumerate(PAIRS):
        if progress is not None:
            progress("finding the best shared weights", number, len(PAIRS))
        for fqn, sharing in _shared(model, followed, pair, example).items():
            pairs = compared[fqn].pairs
            if pair in pairs:
                with_sharing = replace(
                    pairs[pair], mode=sharing.mode, residual=sharing.residual, refused=sharing.refused
                )
                compared[fqn] = replace(compared[fqn], pairs={**pairs, pair: with_sharing})
    # Last, for what a mode costs is known only now.
    for site in followed:
        compared[site.fqn] = _with_default(site, compared[site.fqn])
    return list(compared.values()), Layer(chosen, weights[chosen])


def _with_three_weights(site: SeenSite) -> SeenSite:
    """The site, refused where there are no weights of Q to compare others with."""
    if isinstance(site, FoundSite) and site.traced.unprojected:
        return RefusedSite(site.fqn, site.traced.unprojected)
    return site


def _choose_layer(seen: list[SeenSite], layer: str | None) -> str:
    names: list[str] = []
    followed: list[str] = []
    reasons: dict[str, str] = {}
    for site in seen:
        names.append(site.fqn)
        if isinstance(site, RefusedSite):
            reasons[site.fqn] = site.reason
        else:
            followed.append(site.fqn)
    if not followed:
        raise TraceError(f"none of the {len(seen)} attention sites could be followed ({names[0]}: {reasons[names[0]]})")
    if layer is None:
        return followed[0]
    name = names[int(layer)] if layer.isdecimal() and int(layer) < len(names) else layer
    if name not in names:
        raise UsageError(
            f"layer {layer!r} is none of the {len(names)} attention sites; give a number from 0 to {len(names) - 1}, "
            f"or a name such as {names[0]!r}"
        )
    if name in reasons:
        raise TraceError(
            f"{name} could not be followed ({reasons[name]}); choose another layer, such as {followed[0]!r}"
        )
    return name


def _weights(model: nn.Module, site: FoundSite) -> dict[str, Tensor]:
    """What q, k and v are made with, `[H, D, d]` in float64, without biases."""
    module = model.get_submodule(site.fqn)
    if not has_weights(module):
        raise UsageError(f"the weights of {site.fqn} are on the meta device, so there is nothing to compare; load some")
    weights = {}
    for letter, role in (("q", site.traced.q), ("k", site.traced.k), ("v", site.traced.v)):
        with_bias = read(module, locate(module, role, {}))
        weights[letter] = with_bias[:, :-1]  # the last row is the bias
    return weights


def _compare(site: AttentionSite, weights: dict[str, Tensor], threshold: float) -> SiteRedundancy:
    pairs: dict[str, PairRedundancy] = {}
    skipped: dict[str, str] = {}
    for pair in PAIRS:
        reason = why_not(weights, pair)
        if reason is None:
            pairs[pair] = compare_pair(weights, pair, threshold)
        else:
            skipped[pair] = reason
    return SiteRedundancy(site.fqn, site.kind, site.num_heads, site.key_dim, site.value_dim, pairs, skipped)


@dataclass(frozen=True)
class _Sharing:
    """What makes a pair one: the mode, the residual of the best shared weight, or why there is none."""

    mode: str | None = None
    residual: float | None = None
    refused: str | None = None


def _shared(model: nn.Module, sites: list[FoundSite], pair: str, example: dict[str, Tensor]) -> dict[str, _Sharing]:
    """The best shared weights of a pair, by site."""
    modes: dict[str, str] = {}
    sharing: dict[str, _Sharing] = {}
    for found in sites:
        site = found.site
        fitting = [mode for mode in _MODES[pair] if mode in site.modes]
        heads = {role.num_heads for role in site.projections.values()}
        if not fitting:
            sharing[site.fqn] = _Sharing(refused=site.refused[_MODES[pair][0]])
        elif len(heads) > 1:
            reason = "there is no closed form where several heads of Q share one of K"
            sharing[site.fqn] = _Sharing(fitting[0], refused=reason)
        else:
            modes[site.fqn] = fitting[0]
    # A copy is converted, on which nobody's hooks matter.
    prepared = prepare(model, [site for site in sites if site.fqn in modes], modes, refit=True, hooks=False)
    for left in prepared.refused:
        sharing[left.fqn] = _Sharing(refused=left.reason)
    if prepared.operations:
        # The caller may be in inference mode, whose tensors could not become parameters of the copy.
        with torch.inference_mode(False):
            converted = full_copy(model)
            for operation in prepared.operations:
                operate(converted, operation)
            order = Order(AUTO, init="joint-svd", example=example)
            results, _ = choose_weights(model, converted, prepared, order)
        for result in results:
            sharing[result.fqn] = _Sharing(modes[result.fqn], result.residual)
    return sharing


def _with_default(found: FoundSite, compared: SiteRedundancy) -> SiteRedundancy:
    """With the residual of the pair that `auto` makes one."""
    mode, _ = choose(found.site, AUTO)
    for pair in compared.pairs.values():
        if mode is not None and pair.mode == mode:
            return replace(compared, mode=pair.mode, residual=pair.residual)
    return compared
