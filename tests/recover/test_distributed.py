"""Two processes do what one does, with DDP and FSDP2 (gloo, CPU), and judge every image once."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import WORLD, in_processes
from tiny_hosts import case
from torch import nn
from training import ALONE, CLASSES, armour, losses, pictures, task

from armour_surgery.hosts.preprocessing import Preprocessing
from armour_surgery.images.sources import subset
from armour_surgery.measure.held_out import held_out_scores
from armour_surgery.recover import checkpoint
from armour_surgery.recover.distributed import Process
from armour_surgery.recover.loading import evaluation_batches
from armour_surgery.recover.student import evaluating
from armour_surgery.recover.teacher import Teacher
from armour_surgery.recover.trainer import Task, train

PREP = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)


def judge(
    process: Process, found: list[Mapping[str, float]] | None = None
) -> Callable[[nn.Module], Mapping[str, float]]:
    """Accuracy on 9 images, which do not divide among two processes."""

    def judged(runner: nn.Module) -> Mapping[str, float]:
        batches = evaluation_batches(
            subset(pictures(), range(9)), PREP.tensor, 2, rank=process.rank, world=process.world
        )
        with evaluating(runner):
            scores = held_out_scores(
                lambda images: (images, runner(images).logits),
                None,
                batches,
                labelled=True,
                blank=torch.zeros(1, 3, 32, 32),
                total=process.sum,
            )
        if found is not None:
            found.append(scores)
        return scores

    return judged


def plain_task(out: Path, process: Process, *settings: str) -> Task:
    """Without dropout, which draws other numbers in other processes."""
    model = armour()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attn_drop"):
            module.attn_drop.p = 0.0
    one = task(
        out,
        "loss.blocks=1",
        "loss.logits=1",
        "ema.decay=0.5",
        "optimizer.clip=0.5",
        *settings,
        student=model,
        teacher=Teacher(case("vit").build()),
        judge=judge(process),
    )
    return replace(one, transform=PREP.tensor)


@pytest.mark.parametrize(
    "settings", [(), ("data.micro_batch=2",), ("run.parallel=fsdp",)], ids=["ddp", "accumulated", "fsdp"]
)
def test_two_processes_follow_the_curve_of_one(tmp_path: Path, settings: tuple[str, ...]) -> None:
    alone = train(plain_task(tmp_path / "one", ALONE), ALONE)

    def work(process: Process) -> None:
        first = plain_task(tmp_path / "two", process, *settings, "schedule.max_steps=3")
        train(first, process)
        outcome = train(plain_task(tmp_path / "two", process, *settings), process, resume=True)
        assert outcome.end.keys() == {"top1", "top5"}
        (tmp_path / f"end{process.rank}.json").write_text(json.dumps(outcome.end), encoding="utf-8")

    in_processes(work)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    ends = [json.loads((tmp_path / f"end{rank}.json").read_text(encoding="utf-8")) for rank in range(WORLD)]
    assert ends[0] == ends[1] == pytest.approx(alone.end)
    one, two = (checkpoint.read(tmp_path / run / "checkpoints" / checkpoint.LAST).tensors for run in ("one", "two"))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in two.items()}
    for name, value in one.items():
        if name.startswith(("model.", "ema.")):
            assert torch.allclose(value, two[name], atol=2e-3), name


def test_every_image_is_judged_once(tmp_path: Path) -> None:
    from armour_surgery.recover.student import Runner

    wanted = judge(ALONE)(Runner(armour()))
    assert wanted["top1"] == pytest.approx(100 * round(wanted["top1"] * 9 / 100) / 9)

    def work(process: Process) -> None:
        assert judge(process)(Runner(armour())) == pytest.approx(wanted)

    in_processes(work)
    assert CLASSES == 7
