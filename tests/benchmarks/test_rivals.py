"""What the benchmark holds calibrated conversion against does what it says."""

import pytest
import torch
from oracle import merge, outputs, relative_error
from rivals import (
    feature_pca,
    mean_of_shared,
    prune_mlp_channels,
    prune_smallest,
    refit_on_images,
    svd_without_whitening,
)
from tiny_hosts import case
from torch import Tensor, nn

from armour_surgery import convert
from armour_surgery.measure.cost import count_params


def difference(model: nn.Module, other: nn.Module, batch: dict[str, Tensor]) -> float:
    """The relative error between what two models return."""
    with torch.no_grad():
        return relative_error(outputs(model, batch), outputs(other, batch))


def call(model: nn.Module, batch: Tensor) -> Tensor:
    output: Tensor = model(x=batch)
    return output


@pytest.mark.parametrize("name", ["mean", "svd", "refit"])
def test_shared_weights_are_exact_where_nothing_is_lost(name: str) -> None:
    host = case("vit")
    model, batch = host.build(), host.batches()[0]
    merge(model, "qv", host.example())
    images = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) for _ in range(3)]
    converted = {
        "mean": lambda: mean_of_shared(model, "qv", host.example()),
        "svd": lambda: svd_without_whitening(model, "qv", host.example()),
        "refit": lambda: refit_on_images(model, "qv", host.example(), images, call),
    }[name]()
    assert difference(model, converted, batch) < 1e-4


def test_the_mean_of_a_wide_value_takes_the_channels_that_serve() -> None:
    host = case("levit")
    model, batch = host.build(), host.batches()[0]
    merge(model, "concat-full", host.example())
    converted = mean_of_shared(model, "concat-full", host.example())
    assert difference(model, converted, batch) < 1e-4


@pytest.mark.parametrize("by_variance", [True, False])
def test_low_rank_has_the_size_and_loses_what_has_no_variance(by_variance: bool) -> None:
    host = case("vit")
    model = host.build()
    images = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) for _ in range(3)]
    target = count_params(convert(model, "qv"))
    small, layers = feature_pca(model, target, images, call, lambda fqn: "blocks" in fqn, by_variance=by_variance)
    assert layers > 0
    assert 0.97 * target < count_params(small) <= target
    # Outputs of rank 3: as much is left out as the layer has to spare, and nothing changes.
    fc1 = model.blocks[0].mlp.fc1
    with torch.no_grad():
        fc1.weight.copy_(torch.randn(192, 3) @ fc1.weight[:3])
    small, layers = feature_pca(
        model, count_params(model) - 3000, images, call, lambda fqn: fqn == "blocks.0.mlp.fc1", by_variance=by_variance
    )
    assert layers == 1
    assert difference(model, small, {"x": images[0]}) < 1e-4


def test_pruning_takes_the_weakest() -> None:
    model = case("vit").build()
    target = count_params(convert(model, "qv"))
    pruned = prune_smallest(model, target)
    zeros = sum(int((p == 0).sum()) for p in pruned.parameters())
    assert zeros == count_params(model) - target
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    left = [module.weight.detach() for module in pruned.modules() if isinstance(module, nn.Linear)]
    largest_gone = max(float(old[new == 0].abs().max()) for old, new in zip(weights, left, strict=True))
    assert largest_gone < min(float(new[new != 0].abs().min()) for new in left)


def test_pruned_channels_are_gone_and_the_rest_is_as_it_was() -> None:
    model = case("vit").build()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc2.weight[:, ::3] = 0.0
    target = count_params(convert(model, "qv"))
    pruned = prune_mlp_channels(model, target)
    assert 0.97 * target < count_params(pruned) <= target
    batch = case("vit").batches()[0]
    assert difference(model, pruned, batch) < 1e-5
