"""What somebody's hooks see, and forwards and weights that are not a class's own, are left as they are."""

import types

import pytest
import torch
from oracle import randomize
from small_models import refused, tiny_levit, vit
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from armour_surgery import deploy
from armour_surgery.errors import DiscoveryError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def doubling(module: nn.Module) -> None:
    def double(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.tanh(2 * output)

    module.register_forward_hook(double)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("vit", "blocks.0.attn.proj"),  # before a LayerScale
        ("vit", "blocks.0.ls2"),
        ("vit", "blocks.0.drop_path1"),  # does nothing at rest
        ("vit", "blocks.0.attn.attn_drop"),  # inside what would be fused
        ("vit", "blocks.1.attn"),  # the last one, after which tokens are dropped
        ("vit", "blocks.1.mlp"),
        ("vit", "blocks.1"),
        ("levit", "stages.0.blocks.0.attn.qkv.linear"),  # before a BatchNorm
        ("levit", "stages.0.blocks.0.attn.qkv.bn"),
        ("levit", "stages.0.blocks.0.attn.qkv"),
    ],
)
def test_a_hook_sees_and_does_what_it_did(kind: str, place: str) -> None:
    built = vit(depth=2, init_values=0.5) if kind == "vit" else tiny_levit()
    model = randomize(built).double().eval()
    if kind == "vit":
        model.blocks[0].attn.fused_attn = False
    doubling(model.get_submodule(place))
    deployed = deploy(model, example_input=IMAGES.double())
    torch.testing.assert_close(deployed(IMAGES.double()), model(IMAGES.double()))
    seen: list[Tensor] = []
    for one in (model, deployed):
        one.get_submodule(place).register_forward_hook(lambda _, __, output: seen.append(output))
        one(IMAGES.double())
    torch.testing.assert_close(seen[1], seen[0])
    assert deployed.deployment.done


def test_nothing_is_folded_into_weights_that_are_computed() -> None:
    model = vit(depth=2, init_values=0.5)
    parametrizations.spectral_norm(model.blocks[0].attn.proj)
    prune.l1_unstructured(model.blocks[0].mlp.fc2, "weight", 0.3)
    prune.l1_unstructured(model.blocks[1].attn.qkv, "weight", 0.3)
    deployed = deploy(model)
    torch.testing.assert_close(deployed(IMAGES), model(IMAGES))
    kept = {place.fqn for place in deployed.deployment.kept}
    assert {"blocks.0.ls1.gamma", "blocks.0.ls2.gamma", "blocks.1.attn"} <= kept
    assert "blocks.1.ls2.gamma" in {place.fqn for place in deployed.deployment.done}


def test_a_method_put_on_an_attention_or_a_model_goes_on_running() -> None:
    model = vit(depth=2)

    def half(self: nn.Module, *args: Tensor, **given: object) -> Tensor:
        return 0.5 * type(self).forward(self, *args, **given)

    for patched in (model, model.blocks[0].attn):
        patched.forward = types.MethodType(half, patched)
    deployed = deploy(model)
    torch.testing.assert_close(deployed(IMAGES), model(IMAGES))
    kept = {(place.name, place.fqn) for place in deployed.deployment.kept}
    assert {("fuse-attention", "blocks.0.attn"), ("drop-dead-tokens", "blocks.1.attn")} <= kept


def test_a_function_that_holds_on_to_its_module_is_told() -> None:
    model = vit(depth=1)
    layer, own = model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc1.forward
    layer.forward = lambda x: own(x)
    message = refused(DiscoveryError, lambda: deploy(model))
    assert "`del model.get_submodule('blocks.0.mlp.fc1').forward` first" in message
