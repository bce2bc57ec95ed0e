"""timm creates converted models by name, and takes Armour for an attention layer."""

import timm
import torch
from small_models import refused, surgery_of, vit
from timm.models.vision_transformer import Attention

from armour_surgery import convert
from armour_surgery.errors import ModelError
from armour_surgery.measure.cost import count_params
from armour_surgery.plugins.timm import PAPER, Armour

# Of the paper's models the smallest of each kind; cut, so that they are built in a moment.
SMALL = {"img_size": 64, "num_classes": 7}


def test_the_names_of_the_paper_are_registered() -> None:
    assert set(PAPER) <= set(timm.list_models("armour*"))
    assert {"armour_deit_tiny_patch16_224", "armour_levit_128s", "armour_plus_levit_128s"} <= set(PAPER)
    assert all(timm.is_model(original) for original, _ in PAPER.values())


def test_a_model_of_the_paper_is_the_original_converted() -> None:
    torch.manual_seed(0)
    model = timm.create_model("armour_plus_levit_128s", embed_dim=(24, 36), depth=(1, 1), num_heads=(3, 5), **SMALL)
    assert {site.mode for site in surgery_of(model).sites} == {"concat-full"}
    assert model.training
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    original = timm.create_model("levit_128s", embed_dim=(24, 36), depth=(1, 1), num_heads=(3, 5), **SMALL)
    assert count_params(model) == count_params(convert(original, "concat-full"))


def test_there_are_no_weights_of_the_paper() -> None:
    message = refused(ModelError, lambda: timm.create_model("armour_deit_tiny_patch16_224", pretrained=True))
    assert "no pretrained weights" in message
    assert "convert deit_tiny_patch16_224" in message


def test_armour_is_an_attention_layer() -> None:
    torch.manual_seed(0)
    model = vit(attn_layer="armour", depth=2)
    stock = vit(depth=2)
    assert isinstance(model.blocks[0].attn, Armour)
    assert isinstance(model.blocks[0].attn, Attention)
    assert count_params(stock) - count_params(model) == 2 * (48 * 48 + 48)
    again = convert(stock, "qv")
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), again(x))
    model.train()(x).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.shape == (96, 48)
