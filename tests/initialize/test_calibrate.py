"""Calibration leaves the original and all types as they are, and asks for images enough."""

import types

import pytest
import torch
from small_models import vit
from tiny_hosts import case
from torch import nn
from torch.nn.utils import parametrizations, prune

from armour_surgery import convert
from armour_surgery.errors import CalibrationError
from armour_surgery.records import SurgeryPlan
from armour_surgery.surgery.perform import surgery_of


def calibrated(model: nn.Module, *sizes: int) -> SurgeryPlan:
    """The surgery of a model that is calibrated on noise, in batches of these sizes."""
    images = torch.randn(sum(sizes), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return surgery_of(convert(model, "qv", init="calibrated", calibration=images.split(sizes)))


def test_the_original_is_untouched_and_types_stay() -> None:
    host = case("vit")
    model = host.build().to(torch.bfloat16).train()
    batch = {key: value.bfloat16() for key, value in host.batches()[0].items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = [torch.randn(4, 3, 32, 32) for _ in range(4)]
    armour = convert(model, "qv", init="calibrated", calibration=images, example_input=batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in vars(module) for module in [*model.modules(), *armour.modules()])
    assert {tensor.dtype for tensor in armour.parameters()} == {torch.bfloat16}
    assert armour.training
    assert model.training


def test_one_batch_is_too_few() -> None:
    host = case("vit")
    with pytest.raises(CalibrationError, match="two batches"):
        convert(
            host.build(),
            "qv",
            init="calibrated",
            calibration=[torch.randn(4, 3, 32, 32)],
            example_input=host.batches()[0],
        )


def test_residuals_do_not_depend_on_how_images_are_cut_into_batches() -> None:
    model = vit(depth=1)
    # The same images, or nearly so.
    for few, one in (([4, 4], [1] * 8), ([8] * 8, [63, 1])):
        wanted, got = calibrated(model, *few), calibrated(model, *one)
        # More images judge the first of the two, so it is the one to be near to.
        assert got.sites[0].residual == pytest.approx(wanted.sites[0].residual, rel=0.5)
        assert got.fidelity is not None
        assert got.fidelity.images == 1
        assert got.fidelity.cosine > 0.99


def test_one_token_of_one_image_is_enough_to_judge_by() -> None:
    model = vit(depth=1, patch_size=32, class_token=False, global_pool="avg")
    many = calibrated(model, *[8] * 8).sites[0].residual
    assert many is not None
    assert calibrated(model, 60, 1).sites[0].residual == pytest.approx(many, rel=1.0)


def test_a_forward_that_was_put_on_a_block_is_there_afterwards() -> None:
    model = vit(depth=2)
    block = model.blocks[0]
    block.forward = types.MethodType(type(block).forward, block)
    images = torch.randn(32, 3, 32, 32)
    converted = convert(model, "qv", init="calibrated", calibration=images.split(4))
    assert not surgery_of(converted).refused
    assert converted.blocks[0].forward.__self__ is converted.blocks[0]
    assert "forward" in vars(converted.blocks[0])


@pytest.mark.filterwarnings("ignore:what comes of this:armour_surgery.notes.ArmourWarning")
def test_without_an_output_projection_logits_and_values_tell_the_residual() -> None:
    model = vit(depth=1)
    model.blocks[0].attn.proj = nn.Identity()
    residual = calibrated(model, 4, 4).sites[0].residual
    assert residual is not None
    assert 0 < residual < 1


@pytest.mark.filterwarnings("ignore:what comes of this:armour_surgery.notes.ArmourWarning")
def test_a_last_layer_whose_weight_is_computed_stays_as_it_is() -> None:
    model = vit(depth=3)
    parametrizations.weight_norm(model.blocks[0].mlp.fc2)
    nn.utils.spectral_norm(model.blocks[1].mlp.fc2)
    prune.l1_unstructured(model.blocks[2].mlp.fc2, "bias", 0.3)
    plan = calibrated(model, *[4] * 8)
    assert len(plan.sites) == 3
    assert not any("last layer" in site.steps for site in plan.sites)
    assert "last layer" in calibrated(vit(depth=1), *[4] * 8).sites[0].steps
