"""Weights that are no numbers, or too large to compute with, are named before any work."""

import json
import math

import pytest
import torch
from oracle import randomize
from own_attentions import Hidden, Plain
from small_models import refused, tiny_levit, vit
from torch import nn

from armour_surgery import convert
from armour_surgery.errors import CalibrationError, NotFiniteError, PatternError
from armour_surgery.surgery.conversion import plan, sensitivities
from armour_surgery.surgery.perform import surgery_of

EXAMPLE = {"x": torch.zeros(2, 6, 20)}


def broken(tensor: str, value: float) -> nn.Module:
    model = randomize(Hidden(Plain()))
    with torch.no_grad():
        model.get_parameter(tensor).flatten()[3] = value
    return model


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("init", ["wq", "wq-refit", "joint-svd", "calibrated"])
def test_weights_that_are_no_numbers_are_named_in_every_init(init: str, value: float) -> None:
    model = broken("inner.qkv.weight", value)
    message = refused(NotFiniteError, lambda: convert(model, "qv", init=init, example_input=EXAMPLE))
    held = "nan" if math.isnan(value) else "inf"
    assert message.startswith(f"inner cannot be converted: its qkv.weight holds {held}.")
    assert refused(NotFiniteError, lambda: plan(model, "qv", init=init, example_input=EXAMPLE)) == message
    # The advice is followed; here it leaves nothing.
    with pytest.raises(PatternError):
        convert(model, "qv", init=init, exclude="inner", example_input=EXAMPLE)


@pytest.mark.parametrize("tensor", ["inner.out.bias", "before.weight", "after.weight"])
def test_wq_reads_what_it_shares_and_nothing_else(tensor: str) -> None:
    model = broken(tensor, math.nan)
    assert surgery_of(convert(model, "qv", example_input=EXAMPLE)).sites[0].residual is not None
    for arguments in ({"init": "joint-svd"}, {"rank": 3}):
        message = refused(NotFiniteError, lambda given=arguments: convert(model, "qv", example_input=EXAMPLE, **given))
        assert tensor.removeprefix("inner.") in message


def test_statistics_of_a_norm_behind_a_projection_count() -> None:
    model, example = tiny_levit().eval(), torch.zeros(2, 3, 32, 32)
    name = "stages.0.blocks.0.attn"
    model.get_submodule(name).qkv.bn.running_var[0] = math.nan
    message = refused(NotFiniteError, lambda: convert(model, example_input=example))
    assert f"{name} cannot be converted: its qkv.bn.running_var holds nan" in message
    assert surgery_of(convert(model, exclude=name, example_input=example)).sites


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e30), (torch.float64, 1e200)])
def test_enormous_weights_have_a_residual_or_are_refused(dtype: torch.dtype, value: float) -> None:
    model = broken("inner.qkv.weight", 1.0).to(dtype)
    with torch.no_grad():
        model.inner.qkv.weight[0, 0] = value
    [site] = surgery_of(convert(model, "qv", example_input=EXAMPLE)).sites
    # V has no part in what is enormous: what is there now has nothing to do with it.
    assert site.residual is not None
    assert site.residual > value / 100
    assert json.dumps(site.residual, allow_nan=False)
    for arguments in ({"init": "wq-refit"}, {"init": "joint-svd"}, {"rank": 3}):
        message = refused(NotFiniteError, lambda given=arguments: convert(model, "qv", example_input=EXAMPLE, **given))
        assert f"its qkv.weight holds {value:g}" in message


def test_images_on_which_a_model_overflows_are_told() -> None:
    model = vit(depth=1)
    images = [torch.randn(16, 3, 32, 32) for _ in range(4)]
    with torch.no_grad():
        model.pos_embed[:] = math.inf
    message = refused(CalibrationError, lambda: convert(model, "qv", init="calibrated", calibration=images))
    assert "blocks.0.attn gets NaN, infinite or enormous numbers" in message
    model = vit(depth=1)
    with torch.no_grad():
        model.norm.weight *= 1e300
    message = refused(NotFiniteError, lambda: sensitivities(model, "qv", calibration=images))
    assert message.startswith("norm.weight of VisionTransformer holds inf")
