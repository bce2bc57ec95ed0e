"""FILE.py:CALLABLE on the command line, from inspect to a trained folder; parts of models; arguments of builders."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import CONVERT_KEYS, bad, document, failed, good, run
from own_files import EXAMPLE, write_vit
from PIL import Image

from armour_surgery import load

INTO = ("--into", "vit.py:MyViT")


@pytest.fixture(autouse=True)
def _modules() -> Iterator[None]:
    modules = dict(sys.modules)
    yield
    for name in sys.modules.keys() - modules.keys():
        del sys.modules[name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `vit.py`, images in three classes, and `saved`, a converted MyViT."""
    root = tmp_path_factory.mktemp("own")
    write_vit(root)
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(6):
            folder = root / "images" / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 255, (20, 28, 3), np.uint8)).save(folder / f"{number}.png")
    name = f"{root / 'vit.py'}:trained"
    given = ("--init", "calibrated", "--calib", str(root / "images" / "train"), "--calib-images", "8")
    made = document("convert", name, *EXAMPLE, *given, "--out", str(root / "saved"))
    assert made.keys() == CONVERT_KEYS
    assert [site["mode"] for site in made["sites"]] == ["qv", "qv"]
    return root


@pytest.fixture
def work(made: Path, here: Path) -> Path:
    shutil.copytree(made, here, dirs_exist_ok=True)
    return here


def test_inspect_and_its_advice(work: Path) -> None:
    shown = document("inspect", "vit.py:Chatty", *EXAMPLE)
    assert [site["fqn"] for site in shown["sites"]] == ["mixers.0", "mixers.1"]
    assert shown.keys() == {"model", "sites"}
    text = good("inspect", "vit.py:MyViT", *EXAMPLE).stdout
    assert "Next: armour-surgery convert vit.py:MyViT --example 1,3,16,24" in text
    assert "--example 1,3,224,224" in bad("inspect", "vit.py:MyViT")
    assert "(on the command line: --example" in bad("inspect", "vit.py:MyViT", "--example", "1,4,16,24")
    assert "write vit.py:MyViT or " in bad("inspect", "vit.py", code=2)


def test_the_folder_names_the_file_and_no_path(work: Path) -> None:
    plan = json.loads((work / "saved" / "surgery.json").read_text())["plan"]
    assert plan["source"]["name"] == "vit.py:trained"
    assert plan["example"] == [["images", [2, 3, 16, 24], "float32"]]
    card = (work / "saved" / "README.md").read_text()
    assert "from vit import trained" in card
    assert 'load("saved", into=trained())' in card
    assert "load(" in good("convert", "vit.py:MyViT", *EXAMPLE, "--out", "shown").stdout


def test_a_saved_folder_is_evaluated_beside_its_original(work: Path) -> None:
    given = ("--data", "images", "--vs", "vit.py:trained", *EXAMPLE)
    found = document("eval", "saved", *INTO, *given)
    assert found.keys() >= {"model", "top1", "top5", "images", "vs"}
    assert (found["images"], found["vs"]["model"]) == (6, "vit.py:trained")
    # The example is in the folder.
    assert document("eval", "saved", *INTO, "--data", "images")["top1"] == found["top1"]
    message = bad("eval", "saved", "--data", "images", code=2)
    assert "--into PATH/vit.py:trained" in message
    assert "besides images" not in message
    assert "takes pictures, ids" in bad(
        "eval", "vit.py:Tower", "--data", "images", "--example", "1,3,16,24;1,5:long", code=2
    )


@pytest.mark.usefixtures("short_turns")
def test_bench_and_redundancy(work: Path) -> None:
    few = ("--budget", "0.1", "--rounds", "2", "--batch-size", "2")
    timed = document("bench", "saved", "--vs", "vit.py:trained", *INTO, *EXAMPLE, *few)
    assert [model["name"] for model in timed["models"]] == ["saved", "vit.py:trained"]
    assert timed["models"][0]["params"] < timed["models"][1]["params"]
    alike = document("redundancy", "vit.py:trained", *EXAMPLE)
    assert (alike["weights"], len(alike["sites"])) == ("own", 2)


def test_finetune_learns_from_the_original(work: Path) -> None:
    short = ("schedule.epochs=1", "schedule.warmup_epochs=0", "data.holdout=0", "data.images_per_epoch=8")
    given = ["--recipe", "recover", "--data", "images", "--set", "data.batch_size=4"]
    for setting in short:
        given += ["--set", setting]
    message = failed("finetune", "saved", *INTO, *given, "--out", "out").stderr
    assert "vit.py:trained, is of no library" in message
    assert "--teacher FILE.py:CALLABLE" in message
    teacher = ("--teacher", "vit.py:trained", *EXAMPLE)
    # Its attentions lie in a list, and in no blocks.
    message = run("finetune", "saved", *INTO, *teacher, *given, "--out", "out").stderr
    assert "set loss.blocks=0, loss.local=false and loss.attention=1" in message
    shutil.rmtree("out")
    for setting in ("loss.blocks=0", "loss.local=false", "loss.attention=1"):
        given += ["--set", setting]
    done = document("finetune", "saved", *INTO, *teacher, *given, "--out", "out")
    assert done["steps"] == 2
    fresh = load("out", into=_vit().MyViT())
    assert done["kept"] == "start" or "Trained for 2 steps" in fresh.surgery.trained
    assert fresh(torch.zeros(1, 3, 16, 24)).shape == (1, 3)


def test_a_part_of_a_model(work: Path) -> None:
    tower = ("--submodule", "model.vision_tower", *EXAMPLE)
    names = ["model.vision_tower.mixers.0", "model.vision_tower.mixers.1"]
    shown = document("inspect", "vit.py:Tower", *tower)
    assert [site["fqn"] for site in shown["sites"]] == names
    planned = document("convert", "vit.py:Tower", *tower, "--dry-run")
    made = document("convert", "vit.py:Tower", *tower, "--include", names[1], "--out", "tower")
    assert [site["fqn"] for site in planned["sites"]] == names
    assert [site["fqn"] for site in made["sites"]] == names[1:]
    assert planned["params_before"] == made["params_before"] > made["params_after"] > planned["params_after"]
    whole = load("tower", into=_vit().Tower())
    assert whole(torch.zeros(2, 3, 16, 24), torch.zeros(2, 5, dtype=torch.long)).shape == (2, 3)
    message = bad("convert", "vit.py:Tower", "--submodule", "model.vision_towr", code=2)
    assert "has no such module, but model.vision_tower" in message
    assert "no such module" in bad("convert", "vit.py:Tower", "--submodule", "", code=2)


def test_arguments_of_a_builder(here: Path) -> None:
    small = ["depth=1", "embed_dim=24", "num_heads=2", "img_size=(16, 32)"]
    given: list[str] = []
    for argument in small:
        given += ["--model-kwargs", argument]
    made: dict[str, Any] = document("convert", "vit_tiny_patch16_224", "--no-pretrained", *given, "--out", "out")
    assert [site["fqn"] for site in made["sites"]] == ["blocks.0.attn"]
    assert load("out").patch_embed.img_size == (16, 32)  # type: ignore[union-attr]
    assert "takes no foo" in bad("inspect", "vit_tiny_patch16_224", "--model-kwargs", "foo=1", code=2)


def _vit() -> Any:
    """`vit.py`, as a user's own program imports it."""
    from armour_surgery.hosts import load_model

    model, _ = load_model("vit.py:MyViT")
    return sys.modules[type(model).__module__]
