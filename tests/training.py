"""A training run that is over in seconds: a small student, its pictures and its recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shared_hosts import converted_host
from torch import nn

from armour_surgery.copies import full_copy
from armour_surgery.images.sources import Pictures
from armour_surgery.recover.distributed import Process
from armour_surgery.recover.recipe import Recipe
from armour_surgery.recover.recipe_files import load_recipe
from armour_surgery.recover.student import evaluating
from armour_surgery.recover.trainer import Task

__all__ = ["ALONE", "CLASSES", "COUNT", "armour", "losses", "pictures", "recipe", "score", "task", "to_tensor"]

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


def armour() -> nn.Module:
    """A converted tiny ViT, the same at every call."""
    return full_copy(converted_host("vit", "qv"))


def task(out: Path, *settings: str, student: nn.Module | None = None, **options: Any) -> Task:
    model = student if student is not None else armour()
    surgery = getattr(model, "surgery", None)
    sites = tuple(site.fqn for site in surgery.sites) if surgery else ()
    given = {"judge": score, "sites": sites, "classes": CLASSES, **options}
    return Task(model, recipe(*settings), pictures(), to_tensor, out=out, **given)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
