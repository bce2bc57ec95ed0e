"""What is frozen stays, and an average is judged by its own weights."""

import torch
from tiny_hosts import case
from torch import nn

from armour_surgery.recover.student import Runner, evaluating, freeze_norms, train_only


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
