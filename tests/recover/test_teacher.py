"""A teacher is no part of its student, sees its own normalization, and has to fit."""

import pytest
import timm
import torch
from tiny_hosts import case
from torch import nn
from training import armour

from armour_surgery.errors import TeacherError
from armour_surgery.recover.distillation import Objective
from armour_surgery.recover.recipe import LossPart
from armour_surgery.recover.student import Runner
from armour_surgery.recover.teacher import Teacher


def test_the_teacher_is_no_part_of_the_student() -> None:
    student, teacher = armour(), case("vit").build()
    objective = Objective(Runner(student), Teacher(teacher), LossPart(labels=0, features=1.0))
    assert {name for name, _ in objective.named_parameters()} == {
        f"runner.model.{name}" for name, _ in student.named_parameters()
    }
    objective(torch.randn(2, 3, 32, 32), torch.zeros(2))["loss"].backward()
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_sees_images_in_its_own_normalization() -> None:
    teacher = case("vit").build()
    images = torch.randn(2, 3, 32, 32)
    moved = Teacher(teacher, (torch.full((3, 1, 1), 2.0), torch.full((3, 1, 1), 0.5)))(images, False)
    assert moved.logits is not None
    assert torch.allclose(moved.logits, teacher(2 * images + 0.5), atol=1e-5)


def test_teachers_that_do_not_fit_are_refused() -> None:
    student = armour()
    sites = tuple(site.fqn for site in student.surgery.sites)  # type: ignore[union-attr]
    images, labels = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)

    def refused(loss: LossPart, teacher: nn.Module | None, sites: tuple[str, ...] = sites) -> str:
        with pytest.raises(TeacherError) as caught:
            Objective(Runner(student), Teacher(teacher) if teacher else None, loss, sites)(images, labels)
        return str(caught.value)

    assert "--teacher" in refused(LossPart(logits=1.0), None)
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=11, depth=1, embed_dim=48, num_heads=4)
    assert "11 classes and the student 7" in refused(LossPart(logits=1.0), other)
    assert "features are" in refused(LossPart(labels=0, features=1.0), other)
    assert "no module 'blocks.1.attn'" in refused(LossPart(labels=0, attention=1.0), other)
    assert "in this model nothing was; set them to 0" in refused(LossPart(labels=0, attention=1.0), other, ())
    headless = case("vit").build()
    headless.reset_classifier(0)  # type: ignore[operator]
    assert "gives no logits" in refused(LossPart(logits=1.0), headless)
