"""A user's own fine-tuned weights: converted, held against the original, trained with it as teacher, and loaded."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_line import document, failed, good
from PIL import Image

from armour_surgery import load
from armour_surgery.hosts.weights_file import digest_of
from armour_surgery.saving.any_model import load_any
from armour_surgery.saving.folder import read_plan

SIZES = ["--num-classes", "3", "--img-size", "32"]
OWN = ["--checkpoint", "own.pth", *SIZES]
SHORT = ["data.batch_size=4", "data.images_per_epoch=8", "data.holdout=4", "schedule.epochs=1", "optimizer.lr=1e-4"]
QUICK = ["--recipe", "recover", *(word for setting in SHORT for word in ("--set", setting))]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`own.pth`, which somebody trained, `other.pth`, and `photos` of three classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARMOUR_DEBUG", raising=False)
    for seed, name in enumerate(("own", "other")):
        torch.manual_seed(seed)
        model = timm.create_model("test_vit", num_classes=3, img_size=32)
        torch.save({"model": model.state_dict(), "epoch": 9}, f"{name}.pth")
    for split, count in (("train", 4), ("val", 3)):
        for place, name in enumerate(("ant", "bee", "cow")):
            Path("photos", split, name).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng((place, number, count)).integers(0, 256, (36, 34, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(Path("photos", split, name, f"{number}.png"))
    return tmp_path


def refused(*arguments: str, code: int = 1) -> str:
    return failed(*arguments, code=code).stderr


@pytest.mark.usefixtures("short_turns")
def test_the_story_of_a_users_own_checkpoint(here: Path) -> None:
    good("convert", "test_vit", *OWN, "--mode", "qv", "--out", "armour")
    source = read_plan("armour").source
    assert source is not None
    assert source.checkpoint is not None
    assert (source.checkpoint.path, source.checkpoint.sha256) == ("own.pth", digest_of(Path("own.pth")))
    assert source.options == {"img_size": 32, "num_classes": 3}
    beside = document("eval", "armour", "--vs", "test_vit", *OWN, "--data", "photos")
    alone = document("eval", "test_vit", *OWN, "--data", "photos")
    assert beside["vs"]["top1"] == alone["top1"]
    assert document("eval", "test_vit", *OWN, "--vs", "armour", "--data", "photos")["top1"] == alone["top1"]
    timed = document("bench", "armour", "--vs", "test_vit", *OWN, "--rounds", "2", "--budget", "0.05")
    assert [model["name"] for model in timed["models"]] == ["armour", "test_vit"]
    taught = document("finetune", "armour", *QUICK, "--out", "first")
    assert taught["teacher"] == "the original, test_vit"
    # The record goes on: the second training has the same teacher, and is refused another one.
    assert document("finetune", "first", *QUICK, "--out", "second")["teacher"] == "the original, test_vit"
    model = load("second")
    assert model.surgery.original == read_plan("armour").original  # type: ignore[union-attr]
    assert model.surgery.source.checkpoint == source.checkpoint  # type: ignore[union-attr]
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_teacher_with_other_weights_is_refused_at_every_training(here: Path) -> None:
    good("convert", "test_vit", *OWN, "--out", "armour")
    good("finetune", "armour", *QUICK, "--out", "first")
    for student in ("armour", "first"):
        said = refused("finetune", student, *QUICK, "--teacher-checkpoint", "other.pth", "--out", "out")
        assert "test_vit has other weights than the model that the student was converted from" in said
        for name in ("other.pth", "own.pth"):
            assert f"{name} (sha256 {digest_of(Path(name))[:16]}...)" in said
        assert re.search(r"\d+ of \d+ tensors differ \(\S+, \S+, \.\.\.\), digest \w{16} instead of \w{16}", said)
        assert "--teacher-checkpoint FILE" in said
        assert said.rstrip().endswith("with --teacher test_vit --teacher-checkpoint other.pth")
        assert not Path("out").exists()
    # The recorded path leads to another file by now.
    shutil.copy("own.pth", "mine.pth")
    shutil.copy("other.pth", "own.pth")
    assert "other weights" in refused("finetune", "first", *QUICK, "--out", "out")
    Path("own.pth").unlink()
    said = refused("finetune", "first", *QUICK, "--out", "out")
    assert "test_vit with the weights of own.pth, cannot be loaded: checkpoint own.pth does not exist" in said
    assert "--teacher-checkpoint" in said
    found = document("finetune", "first", *QUICK, "--teacher-checkpoint", "mine.pth", "--out", "out")
    assert found["teacher"] == "the original, test_vit"


def test_another_teacher_is_taken_when_it_is_named_and_it_is_said(here: Path) -> None:
    good("convert", "test_vit", *OWN, "--out", "armour")
    named = ["--teacher", "test_vit", "--teacher-checkpoint"]
    told = good("finetune", "armour", *QUICK, *named, "other.pth", "--out", "other")
    assert "note: the teacher test_vit is not what the student was converted from (test_vit)" in told.stderr
    assert "other.pth (sha256 " in told.stderr
    assert "taught by test_vit" in told.stdout
    told = good("finetune", "armour", *QUICK, *named, "own.pth", "--out", "same")
    assert told.stderr == ""
    # A model of another architecture, built for the student's classes and images.
    told = good("finetune", "armour", *QUICK, "--set", "loss.blocks=0", "--set", "loss.local=false",
                "--set", "loss.logits=1", "--set", "model.trainable=all", "--teacher", "test_vit2",
                "--teacher-checkpoint", _second(), *SIZES, "--out", "far")  # fmt: skip
    assert "note: the teacher test_vit2 is not what the student was converted from" in told.stderr


def _second() -> str:
    torch.save(timm.create_model("test_vit2", num_classes=3, img_size=32).state_dict(), "second.pth")
    return "second.pth"


def test_finetune_converts_a_checkpoint_and_learns_from_it(here: Path) -> None:
    settings = ["--set", "model.mode=qv", "--set", "model.init=wq-refit"]
    found = document("finetune", "test_vit", *OWN, *QUICK, *settings, "--out", "out")
    assert found["teacher"] == "the original, test_vit"
    assert load("out").surgery.source.checkpoint.path == "own.pth"  # type: ignore[union-attr]


def test_sizes_win_over_those_of_a_recipe_that_builds_its_model(here: Path) -> None:
    arguments = "{patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3, num_classes: 7, img_size: 64}"
    common = ["--recipe", "deit_tiny_300ep", "--data", "photos", "--set", f"model.args={arguments}"]
    for one in ("data.batch_size=4", "data.workers=0", "schedule.epochs=5"):
        common += ["--set", one]
    good("finetune", "vit_tiny_patch16_224", *common, *SIZES, "--out", "out")
    model, _ = load_any("local-dir:out")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_the_original_of_a_users_own_class_is_named_with_its_file(here: Path) -> None:
    Path("mine.py").write_text(
        "import timm\nfrom torch import nn\n\n\nclass Mine(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.img_size, self.in_chans = 32, 3\n"
        "        self.inner = timm.create_model('test_vit', img_size=32, num_classes=3)\n\n"
        "    def forward(self, images):\n        return self.inner(images)\n",
        encoding="utf-8",
    )
    for name in ("own", "other"):
        weights = torch.load(f"{name}.pth", weights_only=True)["model"]
        torch.save({f"inner.{key}": value for key, value in weights.items()}, f"my-{name}.pth")
    good("convert", "mine.py:Mine", "--checkpoint", "my-own.pth", "--out", "armour")
    own = ["--into", "mine.py:Mine"]
    said = refused("finetune", "armour", *QUICK, *own, "--out", "out")
    assert said.rstrip().endswith("--teacher FILE.py:CALLABLE and --teacher-checkpoint FILE (my-own.pth)")
    named = ["--teacher", "mine.py:Mine", "--teacher-checkpoint"]
    assert good("finetune", "armour", *QUICK, *own, *named, "my-own.pth", "--out", "out").stderr == ""
    told = good("finetune", "out", *QUICK, *own, *named, "my-other.pth", "--out", "again")
    assert "note: the teacher mine.py:Mine is not what the student was converted from (mine.py:Mine)" in told.stderr
    assert document("eval", "out", *own, "--vs", "mine.py:Mine", "--checkpoint", "my-own.pth", "--data", "photos")["vs"]


def test_the_card_names_the_file_and_no_place_on_the_machine(here: Path) -> None:
    Path("deep").mkdir()
    shutil.copy("own.pth", "deep/own.pth")
    absolute = str(here / "deep" / "own.pth")
    good("convert", "test_vit", "--checkpoint", absolute, *SIZES, "--out", "armour")
    card = Path("armour/README.md").read_text(encoding="utf-8")
    assert f"`test_vit` with the weights of `own.pth` (sha256 `{digest_of(Path('own.pth'))}`)" in card
    assert str(here) not in card
    assert json.loads(Path("armour/surgery.json").read_text())["plan"]["source"]["checkpoint"]["path"] == absolute


def test_what_is_meant_for_whom_is_said(here: Path) -> None:
    good("convert", "test_vit", *OWN, "--out", "armour")
    data = ["--data", "photos"]
    assert "armour has its weights in it" in refused("eval", "armour", *data, "--checkpoint", "own.pth", code=2)
    assert "armour is as it was converted; --num-classes" in refused(
        "eval", "armour", *data, "--num-classes", "3", code=2
    )
    assert "--vs-checkpoint is for" in refused("eval", "armour", *data, "--vs-checkpoint", "own.pth", code=2)
    assert "armour has its weights in it" in refused(
        "bench", "armour", "--vs", "armour", "--checkpoint", "own.pth", code=2
    )
    assert "armour has its weights in it" in refused("finetune", "armour", *QUICK, "--checkpoint", "own.pth", code=2)
    assert "armour is as it was converted; --img-size" in refused(
        "finetune", "armour", *QUICK, "--img-size", "32", code=2
    )
    scratch = ["--recipe", "deit_tiny_300ep", *data]
    assert "trains from scratch, and --checkpoint own.pth has weights" in refused(
        "finetune", "deit_tiny_patch16_224", *scratch, "--checkpoint", "own.pth", code=2
    )
    assert "--teacher is given" in refused(
        "finetune", "armour", "--recipe", "recover_labels", "--set", "loss.logits=0", *data,
        "--teacher-checkpoint", "own.pth", code=2,
    )  # fmt: skip
    assert "the teacher armour has its weights in it; leave --teacher-checkpoint own.pth out" in refused(
        "finetune", "armour", *QUICK, "--teacher", "armour", "--teacher-checkpoint", "own.pth", code=2
    )
    two = document("eval", "test_vit", *OWN, "--vs", "test_vit", "--vs-checkpoint", "other.pth", *data)
    assert two["vs"]["top1"] == document("eval", "test_vit", "--checkpoint", "other.pth", *SIZES, *data)["top1"]
    assert "does not exist" in refused("eval", "armour", "--vs", "test_vit", "--checkpoint", "no.pth", *SIZES, *data)


def test_a_checkpoint_of_another_image_size_is_said_to_be_resampled(here: Path) -> None:
    told = good("eval", "test_vit", "--checkpoint", "own.pth", "--num-classes", "3", "--data", "photos")
    assert "note: checkpoint own.pth is for images of another size: resampled pos_embed from (1, 5, 64)" in told.stderr
    assert "--img-size" in told.stderr
    told = good("convert", "test_vit", "--checkpoint", "own.pth", "--num-classes", "3", "--out", "armour")
    assert "resampled pos_embed" in told.stderr
    # Resampled alike, it is the same teacher.
    assert document("finetune", "armour", *QUICK, "--out", "out")["teacher"] == "the original, test_vit"
