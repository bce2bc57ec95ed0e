"""The loop goes on exactly, leaves its files, and stops with the cause when things go wrong."""

import csv
import os
import resource
import signal
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from shared_hosts import converted_host
from tiny_hosts import case
from torch import nn
from training import ALONE, CLASSES, armour, losses, pictures, task, to_tensor

from armour_surgery import convert
from armour_surgery.copies import full_copy
from armour_surgery.errors import DataError, DivergedError, InterruptedRunError, ResumeError, TrainingError, UsageError
from armour_surgery.recover import checkpoint
from armour_surgery.recover.recipe import OptimizerPart
from armour_surgery.recover.student import prepare
from armour_surgery.recover.teacher import Teacher
from armour_surgery.recover.timm_parts import make_optimizer, set_drop_path
from armour_surgery.recover.trainer import Outcome, train


def same(first: Outcome, second: Outcome) -> bool:
    return all(torch.equal(value, second.weights[name]) for name, value in first.weights.items())


# Running


def test_training_lowers_the_loss_and_leaves_its_files(tmp_path: Path) -> None:
    one = task(tmp_path, "schedule.epochs=10", "optimizer.lr=3e-3", "ema.decay=0.9", "judge.every=5")
    outcome = train(one, ALONE)
    assert (outcome.steps, outcome.epochs, outcome.images, outcome.kept) == (40, 10, 320, "last")
    found = losses(tmp_path)
    assert len(found) == 40
    assert np.mean(found[-4:]) < np.mean(found[:4]) - 0.1
    with (tmp_path / "summary.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == list(range(4, 41, 4))
    assert [bool(row["top1"]) for row in rows] == [False] * 4 + [True] + [False] * 4 + [True]
    assert rows[4]["ema_top1"] != rows[4]["top1"]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 400
    state = one.student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in outcome.weights.items())


SETTINGS = (
    "ema.decay=0.9",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "data.micro_batch=4",
    "model.drop_path=0.2",
    "optimizer.clip=0.5",
    "judge.keep=best",
)


@pytest.mark.parametrize("extra", [(), ("optimizer.name=lamb",), ("optimizer.name=sgd", "run.precision=fp16")], ids=str)
def test_four_steps_and_four_more_are_eight(tmp_path: Path, extra: tuple[str, ...]) -> None:
    def student() -> nn.Module:
        model = armour()
        set_drop_path(model, 0.2)
        return model

    whole = train(task(tmp_path / "whole", *SETTINGS, *extra, student=student()), ALONE)
    train(task(tmp_path / "parts", *SETTINGS, *extra, "schedule.max_steps=3", student=student()), ALONE)
    torch.manual_seed(123)
    parts = train(task(tmp_path / "parts", *SETTINGS, *extra, student=student()), ALONE, resume=True)
    assert same(whole, parts)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    ends = [checkpoint.read(tmp_path / run / "checkpoints" / checkpoint.LAST) for run in ("whole", "parts")]
    assert set(ends[0].tensors) == set(ends[1].tensors)
    assert all(torch.equal(value, ends[1].tensors[name]) for name, value in ends[0].tensors.items())
    assert (whole.kept, whole.end) == (parts.kept, parts.end)


def test_a_signal_saves_and_stops_and_the_run_goes_on(tmp_path: Path) -> None:
    whole = train(task(tmp_path / "whole"), ALONE)

    def send(values: Mapping[str, Any]) -> None:
        if values["step"] == 2 and "epoch" not in values:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match=r"SIGTERM after step 3 of 8; .* --resume"):
        train(task(tmp_path / "parts"), ALONE, watch=send)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert same(whole, train(task(tmp_path / "parts"), ALONE, resume=True))


def test_accumulated_steps_are_the_steps_of_a_large_batch(tmp_path: Path) -> None:
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=4)
    plain.reset_classifier(CLASSES)
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    train(task(tmp_path / "one", student=plain), ALONE)
    plain.load_state_dict(start)
    train(task(tmp_path / "four", "data.micro_batch=2", student=plain), ALONE)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    plain.load_state_dict(start)
    train(task(tmp_path / "again", "run.grad_checkpointing=true", "run.channels_last=true", student=plain), ALONE)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


# Dynamo itself looks at the gradient of what a graph hands on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_bfloat16_and_compiling_follow_the_same_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(task(tmp_path / "fp32"), ALONE)
    train(task(tmp_path / "bf16", "run.precision=bf16"), ALONE)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.05)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    with torch.compiler.set_stance("force_eager"):
        train(task(tmp_path / "in name only", "run.compile=true"), ALONE)
    assert losses(tmp_path / "in name only") == losses(tmp_path / "fp32")
    # All of torch.compile but the code generator, which takes a minute.
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    features = ("loss.features=1", "loss.blocks=1")
    for name, settings in (("plain", ()), ("compiled", ("run.compile=true",))):
        teacher = Teacher(case("vit").build())
        train(task(tmp_path / name, *features, *settings, teacher=teacher), ALONE)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.parametrize("name", ["hf-vit", "levit", "hf-deit"])
def test_models_of_other_kinds_train_with_a_teacher(tmp_path: Path, name: str) -> None:
    one = case(name)
    (sample,) = one.batches()[0].values()
    student = full_copy(converted_host(name))
    two = hasattr(student, "set_distilled_training") or "deit" in name
    given = task(
        tmp_path,
        "loss.logits=1",
        f"loss.logits_head={'token' if two else 'main'}",
        "loss.attention=1",
        "loss.features=1",
        "schedule.max_steps=2",
        "ema.decay=0.5",
        "model.freeze_norm=true",
        student=student,
        classes=student.config.num_labels if name.startswith("hf") else CLASSES,  # type: ignore[union-attr]
        teacher=Teacher(one.build()),
    )
    size = sample.shape[-1]
    given = replace(given, transform=lambda picture: to_tensor(picture).repeat(1, size // 32, size // 32))
    if name.startswith("hf"):
        given = replace(given, data=pictures(2))
    before = {key: value.clone() for key, value in student.named_buffers()}
    train(given, ALONE)
    assert len(losses(tmp_path)) == 2
    assert all(torch.equal(value, before[key]) for key, value in student.named_buffers() if "running" in key)


def test_best_is_kept_and_it_may_be_the_start(tmp_path: Path) -> None:
    scores = iter([5.0, 7.0, 6.0])

    def judge(_: nn.Module) -> Mapping[str, float]:
        return {"top1": next(scores)}

    one = task(tmp_path / "a", "judge.keep=best", judge=judge)
    outcome = train(one, ALONE)
    assert (outcome.kept, outcome.start, outcome.end) == ("step 4", {"top1": 5.0}, {"top1": 7.0})
    assert any(not torch.equal(value, outcome.weights[name]) for name, value in one.student.state_dict().items())
    scores = iter([5.0, 5.0, 4.0])
    two = task(tmp_path / "b", "judge.keep=best", judge=judge)
    start = {name: value.clone() for name, value in two.student.state_dict().items()}
    outcome = train(two, ALONE)
    assert (outcome.kept, outcome.end) == ("start", {"top1": 5.0})
    assert all(torch.equal(value, outcome.weights[name]) for name, value in start.items())


def test_attention_alone_can_be_trained(tmp_path: Path) -> None:
    one = task(tmp_path, "model.trainable=attention", "schedule.max_steps=2")
    start = {name: value.clone() for name, value in one.student.state_dict().items()}
    outcome = train(one, ALONE)
    changed = {name for name, value in outcome.weights.items() if not torch.equal(value, start[name])}
    assert changed
    assert all(".attn." in name for name in changed)
    with pytest.raises(UsageError, match="no converted attention"):
        train(task(tmp_path / "b", "model.trainable=attention", student=case("vit").build()), ALONE)


# When things go wrong


def test_a_loss_that_is_no_number_stops_the_run_with_its_cause(tmp_path: Path) -> None:
    def cause(*settings: str, **options: Any) -> str:
        with pytest.raises(DivergedError) as caught:
            train(task(tmp_path / str(len(list(tmp_path.iterdir()))), *settings, **options), ALONE)
        return str(caught.value)

    told = cause("optimizer.lr=1e30", "optimizer.name=sgd")
    assert "no number at step 2 (epoch 1)" in told or "no number at step 3" in told
    assert "lower optimizer.lr" in told

    def nan(picture: Image.Image) -> torch.Tensor:
        return to_tensor(picture) * float("nan")

    one = replace(task(tmp_path / "images"), transform=nan)
    with pytest.raises(DivergedError, match=r"at step 1 .*the images of its batch hold NaN"):
        train(one, ALONE)
    bad = armour()
    with torch.no_grad():
        bad.blocks[0].mlp.fc1.weight[0, 0] = float("nan")  # type: ignore[index, union-attr]
    assert "blocks.0.mlp.fc1.weight holds NaN or infinite values from the start" in cause(student=bad)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    def fill_up(values: Mapping[str, Any]) -> None:
        if values["step"] == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(TrainingError, match=r"could not write the checkpoint .*the one before is whole"):
            train(task(tmp_path), ALONE, watch=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.iterdir()] == [checkpoint.LAST]
    assert checkpoint.read(folder / checkpoint.LAST).progress["step"] == 4
    assert train(task(tmp_path), ALONE, resume=True).steps == 8


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    def refused(*settings: str, **options: Any) -> str:
        with pytest.raises(ResumeError) as caught:
            train(task(tmp_path, *settings, **options), ALONE, resume=True)
        return str(caught.value)

    assert "there is no checkpoint" in refused()
    train(task(tmp_path, "schedule.max_steps=1"), ALONE)
    assert "optimizer.lr was 0.001 and is 0.002" in refused("optimizer.lr=2e-3")
    assert "is of another model" in refused(student=convert(case("vit-qk-norm").build(), "qv"))
    fewer = replace(task(tmp_path), data=replace(pictures(), count=12))
    with pytest.raises(ResumeError, match="was trained on 40 images, and now there are 12"):
        train(fewer, ALONE, resume=True)
    path = tmp_path / "checkpoints" / checkpoint.LAST
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read" in refused()


def test_labels_that_the_head_does_not_have_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels run from \d to 8, and the model's head has 7 classes"):
        train(replace(task(tmp_path), data=pictures(9)), ALONE)


def test_a_model_without_what_a_recipe_asks_for_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a model with a distillation head"):
        prepare(case("vit").build(), token=True, grad_checkpointing=False)
    with pytest.raises(UsageError, match="does not offer it"):
        prepare(nn.Linear(2, 2), token=False, grad_checkpointing=True)
    with pytest.raises(UsageError, match="has no blocks that can drop"):
        set_drop_path(nn.Linear(2, 2), 0.1)
    with pytest.raises(UsageError, match="optimizer.name='adamy'"):
        make_optimizer(case("vit").build(), OptimizerPart(name="adamy"), 1e-3)
