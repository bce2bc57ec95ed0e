"""The loop: what it computes, that it goes on exactly, what it does when things go wrong, and what it leaves."""

import copy
import csv
import json
import os
import resource
import signal
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.task import TokenDistillationTask
from tiny_hosts import case
from torch import nn

from armour_surgery import convert
from armour_surgery.errors import (
    DataError,
    DivergedError,
    InterruptedRunError,
    ResumeError,
    TeacherError,
    TrainingError,
    UsageError,
)
from armour_surgery.images.sources import Pictures
from armour_surgery.measure.token_error import token_error
from armour_surgery.recover import checkpoint
from armour_surgery.recover.distillation import (
    Objective,
    learned_weights,
    relative_error,
    soft_distillation,
)
from armour_surgery.recover.distributed import Process
from armour_surgery.recover.recipe import LossPart, OptimizerPart, Recipe, SchedulePart
from armour_surgery.recover.recipe_files import load_recipe
from armour_surgery.recover.student import Runner, evaluating, freeze_norms, prepare, train_only
from armour_surgery.recover.teacher import Teacher
from armour_surgery.recover.timm_parts import make_optimizer, make_scheduler, set_drop_path
from armour_surgery.recover.trainer import Outcome, Task, train

ALONE = Process(0, 1, torch.device("cpu"))
COUNT, CLASSES = 40, 7


def pictures(labels: int = CLASSES) -> Pictures:
    def read(index: int) -> tuple[Image.Image, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % labels

    return Pictures("tiny", COUNT, read, lambda index: f"image {index}")


def to_tensor(picture: Image.Image) -> torch.Tensor:
    noise = 0.1 * torch.randn(3, 32, 32)  # augmentation: it has to be the same after an interruption
    return torch.from_numpy(np.asarray(picture, dtype=np.float32)).movedim(-1, 0) / 128 - 1 + noise


def recipe(*settings: str) -> Recipe:
    """Two epochs of four steps of eight images."""
    base = [
        "data.batch_size=8",
        "data.images_per_epoch=null",
        "model.trainable=all",
        "loss.labels=1",
        "loss.features=0",
        "loss.local=false",
        "loss.blocks=0",
        "optimizer.lr=1e-3",
        "schedule.epochs=2",
        "judge.metric=auto",
        "judge.keep=last",
        "run.log_every=1",
    ]
    return load_recipe("recover", [*base, "data.images_per_epoch=32", *settings])


def score(runner: nn.Module) -> Mapping[str, float]:
    with evaluating(runner):
        total = sum(float(p.double().abs().sum()) for p in runner.parameters())
    return {"top1": total, "top5": total, "cosine": total}


@cache
def _armour() -> nn.Module:
    return convert(case("vit").build(), "qv")


def armour() -> nn.Module:
    """A converted tiny ViT, the same at every call."""
    return copy.deepcopy(_armour())


def task(out: Path, *settings: str, student: nn.Module | None = None, **options: Any) -> Task:
    model = student if student is not None else armour()
    surgery = getattr(model, "surgery", None)
    sites = tuple(site.fqn for site in surgery.sites) if surgery else ()
    given = {"judge": score, "sites": sites, "classes": CLASSES, **options}
    return Task(model, recipe(*settings), pictures(), to_tensor, out=out, **given)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def same(first: Outcome, second: Outcome) -> bool:
    return all(torch.equal(value, second.weights[name]) for name, value in first.weights.items())


# The losses


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
    converted = Runner(convert(model, example_input=one.example())).eval()
    sites = tuple(site.fqn for site in converted.model.surgery.sites)  # type: ignore[union-attr]
    loss = LossPart(labels=0, features=1.0, attention=1.0, blocks=1.0)
    runner = Runner(model).eval()
    terms = Objective(runner, Teacher(one.build()), loss, sites)(images, torch.zeros(len(images)))
    assert set(terms) == {"loss", "features", "attention", "blocks"}
    assert terms["loss"].item() == 0.0
    alone = LossPart(labels=0, blocks=1.0, local=True)
    assert Objective(Runner(model).eval(), Teacher(one.build()), alone, sites)(images, images)["loss"].item() == 0.0
    assert Objective(converted, Teacher(model), loss, sites)(images, torch.zeros(len(images)))["loss"].item() > 0.01


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
    assert "has none" in refused(LossPart(labels=0, attention=1.0), other, ())
    headless = case("vit").build()
    headless.reset_classifier(0)  # type: ignore[operator]
    assert "gives no logits" in refused(LossPart(logits=1.0), headless)


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
    student = convert(one.build(), example_input=one.example())
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


# Parts


def test_drop_path_rises_as_timm_builds_it() -> None:
    def rates(model: nn.Module) -> list[float]:
        return [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]  # type: ignore[union-attr]

    arguments = {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 4}
    wanted = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.3, **arguments)
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    set_drop_path(model, 0.3)
    assert rates(model) == pytest.approx(rates(wanted))
    assert rates(model)[-1] == pytest.approx(0.3)


def test_weight_decay_spares_vectors_and_layer_decay_scales_depth() -> None:
    model = convert(case("deit-distilled").build(), "qv")
    optimizer = make_optimizer(model, OptimizerPart(weight_decay=0.05), 1e-3)
    free = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name in ("pos_embed", "cls_token", "dist_token")
        assert (id(parameter) in free) == spared, name
    groups = make_optimizer(model, OptimizerPart(layer_decay=0.5), 1e-3).param_groups
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales[-1] == 1.0
    assert len(scales) == 4


def test_rates_follow_deits_loop_or_every_update() -> None:
    def rates(part: SchedulePart, steps: int) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1e-3)
        set_rates = make_scheduler(optimizer, part, 4)
        found = []
        for step in range(steps):
            set_rates(step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    deit = rates(SchedulePart(epochs=300, warmup_epochs=5, per="epoch", warmup_lr=1e-6, min_lr=1e-5), 1200)
    # DeiT steps its schedule with epoch e after epoch e: the first two have the start of the warm-up.
    assert deit[0] == deit[7] == pytest.approx(1e-6)
    assert deit[8] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 5)
    assert max(deit) == pytest.approx(1e-3, rel=1e-2)
    assert deit[-1] == pytest.approx(1e-5, rel=0.02)
    each = rates(SchedulePart(epochs=2, warmup_epochs=0.5, warmup_lr=0.0, min_lr=0.0), 8)
    assert each[:3] == pytest.approx([0.0, 5e-4, each[2]])
    assert each[2] == max(each)
    assert each[-1] < 1e-4


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
