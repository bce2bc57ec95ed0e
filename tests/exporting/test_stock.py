"""A converted model in its original's shape: the same outputs, and the same model when it is converted again."""

from typing import Any

import pytest
import torch
import torchvision
from saved_models import HOSTS, armour, outputs
from small_models import Own, refused, vit
from tiny_hosts import CASES
from torch import nn

from armour_surgery import convert
from armour_surgery.errors import ExportError
from armour_surgery.exporting.stock import as_stock
from armour_surgery.measure.difference import largest_difference

MODES = [
    ("vit", "qk"),
    ("vit", "kv"),
    ("beit", "qk"),  # K has no bias of its own
    ("eva02", "kv"),
    ("swin", "qv"),
    ("levit", "concat-full"),
    ("levit", "concat-key"),
    ("levit", "grouped"),
    ("levit-conv", "grouped-shuffled"),
    ("levit-conv", "qk"),
]


@pytest.mark.parametrize("name", ["vit", "eva-rope-mixed", "levit", "hf-dinov2", "hf-levit", "hf-clip"])
def test_it_has_the_original_shape_and_the_converted_outputs(name: str) -> None:
    original, converted = HOSTS[name](), armour(name)
    stock, source = as_stock(converted)
    assert type(stock) is type(original)
    shapes = {key: tensor.shape for key, tensor in original.state_dict().items()}
    assert {key: tensor.shape for key, tensor in stock.state_dict().items()} == shapes
    assert largest_difference(outputs(converted), outputs(stock)) < 1e-6
    assert source.architecture
    again = convert(stock, "auto").state_dict()
    assert again.keys() == converted.state_dict().keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in converted.state_dict().items())


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_every_mode_that_an_original_can_compute(name: str, mode: str) -> None:
    case = CASES[name]
    batch = case.batches(torch.float64)[1]
    converted = convert(case.build(torch.float64), mode, example_input=case.batches(torch.float64)[0])
    stock, _ = as_stock(converted, case.build())
    with torch.no_grad():
        assert largest_difference([converted(**batch)], [stock(**batch)]) < 1e-12
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.float64}


def test_heads_of_fewer_channels_have_zeros_where_the_others_were() -> None:
    converted = convert(vit(), "qv", rank=7, init="joint-svd")
    stock, _ = as_stock(converted)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert largest_difference([converted(x)], [stock(x)]) < 1e-6
    rows = stock.blocks[0].attn.qkv.weight.abs().sum(1)
    assert int((rows == 0).sum()) == 3 * 4 * (12 - 7)


def test_attention_of_torch_itself() -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 28}
    converted = convert(torchvision.models.VisionTransformer(**sizes).eval(), "qv", example_input=(2, 3, 32, 32))
    stock, _ = as_stock(converted, torchvision.models.VisionTransformer(**sizes))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert largest_difference([converted(x)], [stock(x)]) < 1e-6


def test_a_model_of_no_library_needs_a_fresh_one_which_stays_as_it_is() -> None:
    converted = convert(Own().eval(), example_input=(2, 3, 32, 32))
    assert "pass into=Own()" in refused(ExportError, lambda: as_stock(converted))
    fresh = Own()
    before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
    stock, _ = as_stock(converted, fresh)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert largest_difference([converted(x)], [stock(x)]) < 1e-6
    assert all(torch.equal(before[key], tensor) for key, tensor in fresh.state_dict().items())


def test_a_mask_that_no_original_has_is_refused() -> None:
    converted = convert(vit(), "qk-diag")
    assert "blocks.0.attn is converted to qk-diag" in refused(ExportError, lambda: as_stock(converted))


def test_ties_and_low_precision_are_kept() -> None:
    model = vit()
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    stock, _ = as_stock(convert(model.bfloat16(), "qv"))
    assert stock.blocks[1].norm1.weight is stock.blocks[0].norm1.weight
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "mode"), [("vit", "qv"), ("vit", "qk"), ("beit", "qv"), ("hf-beit", "kv")])
def test_a_fixed_gauge_is_written_out(name: str, mode: str) -> None:
    case = CASES[name]
    batch = case.batches(torch.float64)[1]
    example = case.batches(torch.float64)[0]
    converted = convert(case.build(torch.float64), mode, example_input=example, gauge="fixed")
    stock, _ = as_stock(converted, case.build())
    assert largest_difference(answers(converted, batch), answers(stock, batch)) < 1e-12
    again = convert(stock, mode, example_input=example, gauge="fixed")
    assert largest_difference(answers(converted, batch), answers(again, batch)) < 1e-12


def answers(model: nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(**batch)
    return [found] if isinstance(found, torch.Tensor) else [found.last_hidden_state]
