"""The losses are the formulas that they are named after."""

import pytest
import torch
import torch.nn.functional as F
from shared_hosts import converted_host
from timm.task import TokenDistillationTask
from tiny_hosts import case
from torch import nn
from training import armour

from armour_surgery.copies import full_copy
from armour_surgery.measure.token_error import token_error
from armour_surgery.recover.distillation import (
    Objective,
    learned_weights,
    relative_error,
    soft_distillation,
)
from armour_surgery.recover.recipe import LossPart
from armour_surgery.recover.student import Runner, prepare
from armour_surgery.recover.teacher import Teacher


def test_hard_token_distillation_is_timms_and_deits() -> None:
    torch.manual_seed(0)
    student, teacher = case("deit-distilled").build(), case("vit").build()
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 3, 6, 2, 2])
    loss = LossPart(labels=0.5, logits=0.5, logits_kind="hard", logits_head="token", smoothing=0.1)
    reference = TokenDistillationTask(
        student, teacher, nn.CrossEntropyLoss(label_smoothing=0.1), distill_type="hard", task_loss_weight=0.5
    )
    prepare(student, token=True, grad_checkpointing=False)
    runner = Runner(student, two_heads=True)
    runner.eval()
    for module in (student, runner):
        module.training = True  # both heads, without dropout
    ours = Objective(runner, Teacher(teacher), loss)(images, labels)
    assert ours["loss"].item() == pytest.approx(reference(images, labels)["loss"].item(), rel=1e-6)


def test_soft_distillation_has_two_reductions() -> None:
    torch.manual_seed(0)
    mine, theirs = torch.randn(5, 7), torch.randn(5, 7)
    p, log_q = (theirs / 3).softmax(-1), (mine / 3).log_softmax(-1)
    expected = 9 * (p * (p.log() - log_q)).sum(-1).mean()
    assert soft_distillation(mine, theirs, 3.0, "batchmean").item() == pytest.approx(expected.item(), rel=1e-5)
    assert soft_distillation(mine, theirs, 3.0, "deit").item() == pytest.approx(expected.item() / 7, rel=1e-5)
    deit = F.kl_div((mine / 3).log_softmax(1), (theirs / 3).log_softmax(1), reduction="sum", log_target=True)
    assert soft_distillation(mine, theirs, 3.0, "deit").item() == pytest.approx((deit * 9 / mine.numel()).item())


def test_relative_error_is_a_mean_over_images() -> None:
    one, two = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]]), torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]]])
    assert relative_error(one, two).item() == pytest.approx((16 / 9 + 0) / 2)


@pytest.mark.parametrize(
    "name", ["vit", "deit-distilled", "levit", "swin", "hf-deit", "hf-dinov2", "hf-clip", "hf-levit"]
)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name: str) -> None:
    one = case(name)
    model = one.build()
    (images,) = one.batches()[0].values()
    student = Runner(full_copy(converted_host(name))).eval()
    sites = tuple(site.fqn for site in student.model.surgery.sites)  # type: ignore[union-attr]
    loss = LossPart(labels=0, features=1.0, attention=1.0, blocks=1.0)
    runner = Runner(model).eval()
    terms = Objective(runner, Teacher(one.build()), loss, sites)(images, torch.zeros(len(images)))
    assert set(terms) == {"loss", "features", "attention", "blocks"}
    assert terms["loss"].item() == 0.0
    alone = LossPart(labels=0, blocks=1.0, local=True)
    assert Objective(Runner(model).eval(), Teacher(one.build()), alone, sites)(images, images)["loss"].item() == 0.0
    assert Objective(student, Teacher(model), loss, sites)(images, torch.zeros(len(images)))["loss"].item() > 0.01


def test_blocks_that_learn_alone_send_no_gradient_to_each_other() -> None:
    student, teacher = armour(), case("vit").build()
    sites = tuple(site.fqn for site in student.surgery.sites)  # type: ignore[union-attr]
    assert len(sites) == 2
    images = torch.randn(3, 3, 32, 32)
    first = student.get_parameter(f"{sites[0]}.qkv.weight")

    def gradient(local: bool, chosen: tuple[str, ...]) -> torch.Tensor:
        loss = LossPart(labels=0, blocks=1.0, local=local)
        objective = Objective(Runner(student).eval(), Teacher(teacher), loss, chosen)
        value = objective(images, images)["loss"]
        found: torch.Tensor = torch.autograd.grad(value, first)[0]
        objective.release()
        return found

    assert torch.allclose(2 * gradient(True, sites), gradient(True, sites[:1]), rtol=1e-4, atol=1e-9)
    assert not torch.allclose(2 * gradient(False, sites), gradient(False, sites[:1]), rtol=1e-2)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in student.modules())


def test_a_block_learns_where_only_its_mlp_was_narrowed() -> None:
    student, teacher = armour(), case("vit").build()
    images = torch.randn(3, 3, 32, 32)
    narrowed = student.get_parameter("blocks.1.mlp.fc2.weight")

    def gradient(mlps: tuple[str, ...]) -> torch.Tensor | None:
        objective = Objective(
            Runner(student).eval(),
            Teacher(teacher),
            LossPart(labels=0, blocks=1.0, local=True),
            ["blocks.0.attn"],
            mlps,
        )
        value = objective(images, images)["loss"]
        found: torch.Tensor | None = torch.autograd.grad(value, narrowed, allow_unused=True)[0]
        objective.release()
        return found

    assert gradient(()) is None
    found = gradient(("blocks.1.mlp",))
    assert found is not None
    assert found.norm() > 0


def test_learned_tokens_of_the_first_block_weigh_three_tenths_of_the_others() -> None:
    stream = torch.randn(3, 11, 4)
    assert learned_weights(stream) is None
    assert learned_weights(stream[:1]) is None
    stream[:, :1] = 2.0
    weights = learned_weights(stream)
    assert weights is not None
    assert weights.tolist() == [3.0] + [1.0] * 10
    wrong = stream.clone()
    wrong[:, 0] *= 1.5
    assert token_error(wrong, stream, weights).item() == pytest.approx(3.0 * 0.25 / 13)
    assert token_error(wrong, stream, None).item() == pytest.approx(0.25 / 11)
