"""Calibration leaves the original and all types as they are, and asks for images enough."""

import pytest
import torch
from tiny_hosts import case

from armour_surgery import convert
from armour_surgery.errors import CalibrationError


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
