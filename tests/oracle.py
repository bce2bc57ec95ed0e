"""The exactness oracle: where the merged projections are already equal, surgery must change nothing.

It needs neither weights nor data nor knowledge of an architecture: it copies rows of whatever discovery found.
"""

import copy

import torch
import torch.utils._pytree as pytree
from torch import nn

from armour_surgery.coverage.oracle import merge as merge_module
from armour_surgery.discover import find_sites
from armour_surgery.records import RefusedSite
from armour_surgery.surgery.conversion import convert
from armour_surgery.surgery.operation import prepare
from armour_surgery.surgery.order import Order
from armour_surgery.surgery.perform import perform
from armour_surgery.traced import SeenSite


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and every statistic a value of its own: zero biases and unit scales hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        with torch.no_grad():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.ndim > 1 and "table" not in name and "attention_biases" not in name:
                tensor.copy_(noise / max(1, tensor[0].numel()) ** 0.5)
            elif "scale" in name or "gamma" in name or name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif not name.endswith(("k_bias", "inv_freq", "freqs", "bands", "periods")):
                tensor.copy_(0.3 * noise)
    return model


def merge(
    model: nn.Module, mode: str, example: dict[str, torch.Tensor], sites: list[SeenSite] | None = None
) -> list[str]:
    """Copy, at every site that the mode fits, the rows of the role that stays over those of the role that goes.

    `sites` are what `find_sites` found before, to save the time. Returns the sites' names.
    """
    merged = []
    for found in find_sites(model, example) if sites is None else sites:
        if isinstance(found, RefusedSite) or mode not in found.site.modes:
            continue
        merged.append(found.site.fqn)
        merge_module(model.get_submodule(found.site.fqn), found.traced, mode)
    return merged


def outputs(model: nn.Module, batch: dict[str, torch.Tensor], seed: int = 1) -> list[torch.Tensor]:
    """All tensors that a model returns, with a fixed seed for its dropout."""
    torch.manual_seed(seed)
    result = model(**batch)
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def relative_error(expected: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest value, over all outputs."""
    assert len(expected) == len(got)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(expected, got, strict=True))


def check(
    model: nn.Module, mode: str, batches: list[dict[str, torch.Tensor]], sites: list[SeenSite] | None = None
) -> dict[str, float]:
    """Run the oracle on a whole model: worst relative error in eval and in train mode over the batches.

    `sites` are what `find_sites` found in it before, to save the time for all modes but one: what `convert` does once
    it has found them is done with them. Weights make no difference to what is found.
    """
    model = copy.deepcopy(model)
    example = {name: value.to("meta") for name, value in batches[0].items()}
    merged = merge(model, mode, example, sites)
    if sites is None:
        converted = convert(model, mode, example_input=example)
    else:
        converted = perform(model, prepare(model, sites, mode), Order(mode, example=example), inplace=False)
    assert [site.fqn for site in converted.surgery.sites] == merged
    assert all(site.residual == 0.0 for site in converted.surgery.sites)
    errors = {}
    for name, training in (("eval", False), ("train", True)):
        worst = 0.0
        for batch in batches:
            a, b = copy.deepcopy(model), copy.deepcopy(converted)
            a.train(training)
            b.train(training)
            with torch.no_grad():
                worst = max(worst, relative_error(outputs(a, batch), outputs(b, batch)))
        errors[name] = worst
    return errors
