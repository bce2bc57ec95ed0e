"""`eval`: images that cannot be read, ReaL labels, and another model beside it."""

from functools import partial
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import timm
import torch
from command_line import failed
from PIL import Image
from timm.models import save_for_hf

from armour_surgery import convert, save
from armour_surgery.demo.digits_vit import accuracy, load_digits_vit
from armour_surgery.images.digits import digits_split
from armour_surgery.saving.any_model import load_any

ARGUMENTS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 1,
    "num_heads": 4,
    "num_classes": 6,
}
CLASSES = ("ant", "bee", "cow", "dog", "eel", "fox")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`tiny`, `armour` converted from it, and `photos/val` of six classes with 2 images each."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)
    save_for_hf(model, "tiny", model_args=ARGUMENTS, safe_serialization=True)
    student, source = load_any("local-dir:tiny")
    save(convert(student, "qv", source=source), "armour")
    number = 0
    for place, name in enumerate(CLASSES):
        Path("photos/val", name).mkdir(parents=True)
        for _ in range(2):
            number += 1
            pixels = np.random.default_rng(place).integers(0, 256, (40, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path("photos/val", name, f"ILSVRC2012_val_{number:08d}.JPEG"))
    return tmp_path


run = partial(command_line.run, "eval")
document = partial(command_line.document, "eval")


def bad(*arguments: str, code: int = 1) -> str:
    return failed("eval", *arguments, code=code).stderr


def test_the_contracts_keys_and_another_model_beside(here: Path) -> None:
    found = document("armour", "--data", "photos", "--vs", "local-dir:tiny")
    assert list(found)[:5] == ["model", "top1", "top5", "images", "vs"]
    assert (found["model"], found["images"], found["unreadable"]) == ("armour", 12, [])
    assert found["vs"].keys() >= {"model", "top1", "top5", "agreement"}
    assert document("armour", "--data", "photos", "--vs", "armour")["vs"]["agreement"] == 100.0
    assert document("armour", "--data", "photos")["vs"] is None
    assert document("armour", "--data", "photos", "--batch-size", "5")["top1"] == found["top1"]


def test_accuracy_is_that_of_the_model(here: Path) -> None:
    model = load_digits_vit()
    save(convert(model, "qv"), "digits")
    _, _, images, labels = digits_split()
    found = document("digits", "--data", "digits", "--crop-pct", "1", "--mean", "0.5", "--std", "0.5")
    assert found["top1"] == pytest.approx(accuracy(convert(model, "qv"), images, labels), abs=0.21)
    assert found["images"] == 500


def test_people_read_lines_and_see_a_plot(here: Path) -> None:
    result = run(
        "armour", "--data", "photos", "--vs", "local-dir:tiny", "--confusion", "seen.png", "--crop-pct", "0.875"
    )
    assert result.exit_code == 0, result.stderr
    assert "armour: top-1 " in result.stdout
    assert "12 images" in result.stdout
    assert "same first choice on" in result.stdout
    with Image.open("seen.png") as picture:
        assert picture.width > 400


def test_an_image_that_cannot_be_read_is_left_out_and_named(here: Path) -> None:
    damaged = Path("photos/val/cow/ILSVRC2012_val_00000005.JPEG")
    damaged.write_bytes(damaged.read_bytes()[:300])
    found = document("armour", "--data", "photos")
    assert found["images"] == 11
    (name,) = found["unreadable"]
    assert str(damaged) in name
    assert "1 images could not be read and were left out" in run("armour", "--data", "photos").stdout


def test_real_labels_are_counted_by_file_name(here: Path) -> None:
    found = document("armour", "--data", "photos", "--real")
    # Of ImageNet's first twelve validation images the reassessment left one without any label.
    assert found["real"]["images"] == 11
    for path in Path("photos/val").rglob("*.JPEG"):
        path.rename(path.with_name(f"x{path.name}"))
    assert "no image is called like" in bad("armour", "--data", "photos", "--real", code=2)


def test_what_does_not_fit_is_said(here: Path) -> None:
    assert "has 10 classes and the model's head has 6" in bad("armour", "--data", "digits")
    assert "--mean '0.5;0.5' is not numbers" in bad("armour", "--data", "photos", "--mean", "0.5;0.5", code=2)
    assert "have no labels" in bad("armour", "--data", "synthetic")
    assert "has its weights in it" in bad("armour", "--data", "photos", "--checkpoint", "x.safetensors", code=2)
    headless = timm.create_model("vit_tiny_patch16_224", **{**ARGUMENTS, "num_classes": 0})
    save_for_hf(headless, "headless", model_args={**ARGUMENTS, "num_classes": 0}, safe_serialization=True)
    assert "head" in bad("local-dir:headless", "--data", "photos")
    for path in Path("photos/val").rglob("*.JPEG"):
        path.write_bytes(b"nothing")
    assert "no image of photos could be read" in bad("armour", "--data", "photos")
