"""What is frozen stays, and an average is judged by its own weights."""

import pytest
import torch
from tiny_hosts import case
from torch import nn

from armour_surgery.errors import UsageError
from armour_surgery.recover.student import Runner, blocks_of, evaluating, freeze_norms, freeze_rest, train_only


def test_judging_an_average_forgets_attention_biases_of_before() -> None:
    """LeViT caches them in eval mode, and timm's average stays in eval mode for ever."""
    runner = Runner(case("levit").build())
    images = case("levit").batches()[0]["x"]
    with evaluating(runner):
        before = runner(images).logits
    runner.eval()
    with torch.no_grad():
        for name, parameter in runner.named_parameters():
            if "attention_biases" in name:
                parameter.mul_(5)
    with evaluating(runner):
        assert not torch.equal(before, runner(images).logits)
    assert not runner.training


def test_freezing() -> None:
    model = case("levit").build().train()
    freeze_norms(model)
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    assert model.training
    train_only(model, ["stages.0"])
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"stages"}


def learning(model: nn.Module) -> set[str]:
    """The modules whose parameters learn."""
    return {name.rpartition(".")[0] for name, value in model.named_parameters() if value.requires_grad}


def test_narrowed_mlps_learn_with_converted_attention_or_do_not() -> None:
    model = case("vit").build()
    sites, mlps = ["blocks.0.attn"], ["blocks.1.mlp"]
    freeze_rest(model, "converted", sites, mlps)
    assert learning(model) == {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"}
    freeze_rest(model, "attention", sites, mlps)
    assert learning(model) == {"blocks.0.attn.qkv", "blocks.0.attn.proj"}
    freeze_rest(model.requires_grad_(True), "all", sites, mlps)
    assert all(value.requires_grad for value in model.parameters())
    with pytest.raises(UsageError, match=r"trainable=converted: .* no converted attention or MLP; set it to all"):
        freeze_rest(model, "converted", [], [])
    with pytest.raises(UsageError, match=r"trainable=attention: .* no converted attention; set it to converted, or"):
        freeze_rest(model, "attention", [], mlps)


def test_a_block_is_what_is_around_attention_and_mlp() -> None:
    vit = case("vit").build()
    assert blocks_of(vit, ["blocks.1.attn"], ["blocks.0.mlp", "blocks.1.mlp"]) == ["blocks.0", "blocks.1"]
    assert blocks_of(vit, [], []) == []
    assert blocks_of(vit, ["blocks"], ["blocks.0.mlp"]) == [""]
    layers = nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict({"attention": nn.ModuleDict()})])})
    # As in transformers: the attention is two modules deep, and the layer itself is around the MLP.
    layers["layer"][0]["attention"]["attention"] = nn.Identity()  # type: ignore[index]
    assert blocks_of(layers, ["layer.0.attention.attention"], ["layer.0"]) == ["layer.0"]
    assert blocks_of(layers, ["layer.0.attention.attention"], []) == ["layer.0.attention"]
