"""Errors of an output count by what they do to the final features, and all alike where that cannot be told."""

import importlib
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from small_models import vit
from torch import Tensor, nn

from armour_surgery import convert
from armour_surgery.initialize import output_metric
from armour_surgery.initialize.output_metric import ErrorMoment, error_moments, in_groups

# `armour_surgery.initialize.calibrate` is the function.
CALIBRATE = importlib.import_module("armour_surgery.initialize.calibrate")


class HalfRead(nn.Module):
    """A projection to 6 channels, of which the features are the first 3, the first one ten times."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 6, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.out(images.flatten(2).mT)
        tokens += 1.0  # in place, as hosts add to their streams
        return tokens[..., :3] * torch.tensor([10.0, 1.0, 1.0], dtype=torch.float64)


def features(model: nn.Module, image: Tensor) -> Tensor:
    # Long besides what is looked at, so that making it one long changes little.
    found = model(image)
    return torch.cat([found, torch.full_like(found[..., :1], 1e4)], dim=-1)


def moments(model: HalfRead, features: Callable[[nn.Module, Tensor], Tensor] = features) -> dict[str, ErrorMoment]:
    images = torch.randn(40, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return error_moments(model, {"site": model.out.weight}, images.split(8), features, lambda _: None)


def test_what_is_not_read_counts_least_and_what_is_multiplied_most() -> None:
    found = moments(HalfRead())["site"]
    assert found.count == 4 * 40 * 16
    size = found.total.diagonal() / found.total.diagonal()[1]
    assert torch.allclose(size, torch.tensor([100.0, 1, 1, 0, 0, 0], dtype=torch.float64), rtol=0.1)
    root = found.root(torch.ones(6, dtype=torch.float64))
    counts = (root @ root.mT).diagonal()
    assert counts[0] > 50 * counts[1] > 50 * counts[3] > 0
    # What follows the product makes errors larger, so that they count as much at a tenth of the size.
    scale = torch.tensor([10.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    scaled = found.root(scale)
    assert torch.isclose((scaled @ scaled.mT)[0, 0] / (scaled @ scaled.mT)[1, 1], torch.tensor(1.0).double(), rtol=0.1)


def test_frozen_parameters_make_no_difference() -> None:
    model = HalfRead()
    wanted = moments(model)["site"].total.dense()
    assert torch.equal(moments(model.requires_grad_(False))["site"].total.dense(), wanted)
    assert model.out.weight.grad is None


def test_what_has_no_gradient_counts_alike() -> None:
    assert moments(HalfRead(), lambda model, image: features(model, image).detach()) == {}
    assert moments(HalfRead(), lambda model, image: features(model, image) * float("nan")) == {}
    assert moments(HalfRead(), lambda model, image: features(model, image) * 0 + 1) == {}
    identity = torch.eye(3, dtype=torch.float64)
    assert torch.equal(ErrorMoment().root(torch.full((3,), 2.0)), identity)
    found = ErrorMoment()
    found.add(torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.equal(found.root(torch.tensor([0.0, 1.0, 1.0])), identity)


def test_as_many_sites_at_a_time_as_there_is_memory_for() -> None:
    outputs = {str(width): torch.empty(width, 1) for width in (4, 8, 3, 16, 5)}
    with patch.object(output_metric, "_ROOM", 4 * (8 * 8) + 4 * (3 * 3)):
        groups = [list(group) for group in in_groups(outputs)]
    assert groups == [["4"], ["8", "3"], ["16"], ["5"]]
    assert not list(in_groups({}))


def test_groups_and_files_change_nothing() -> None:
    model = vit(depth=3)
    images = list(torch.randn(96, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(8))

    def converted() -> dict[str, Tensor]:
        return convert(model, "qv", init="calibrated", calibration=images).state_dict()

    wanted = converted()
    few, no_room = patch.object(output_metric, "_ROOM", 1), patch.object(CALIBRATE, "_METRICS", 0)
    with few, no_room, patch.object(CALIBRATE, "error_moments", wraps=error_moments) as run:
        found = converted()
    assert run.call_count == 3
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("given", [True, False])
def test_only_images_that_somebody_gave_say_what_counts(given: bool) -> None:
    images = {"calibration": list(torch.randn(48, 3, 32, 32).split(8))} if given else {"calibration_images": 48}
    with patch.object(CALIBRATE, "error_moments", wraps=error_moments) as run:
        convert(vit(depth=1), "qv", init="calibrated", **images)
    assert run.call_count == given


def test_what_later_layers_do_not_read_is_given_up_first() -> None:
    torch.manual_seed(0)
    model = vit(depth=2)
    for norm in (model.blocks[0].norm2, model.blocks[1].norm1, model.blocks[1].norm2, model.norm):
        norm.weight.data[::2] = 0
    images = torch.randn(96, 3, 32, 32).split(8)

    def loss() -> float:
        converted = convert(model, "qv", init="calibrated", rank=4, calibration=images)
        return 1 - converted.surgery.fidelity.cosine

    by_metric = loss()
    with patch.object(CALIBRATE, "error_moments", lambda *_: {}):
        alike = loss()
    print(by_metric, alike)
    assert by_metric < 0.8 * alike
