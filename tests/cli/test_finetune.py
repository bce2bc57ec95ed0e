"""`finetune` and `recipes` as a person, a script and a cluster use them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_line import document, failed, run
from PIL import Image
from processes import in_torchrun
from safetensors.torch import load_file
from timm.models import save_for_hf

from armour_surgery import convert, load, save
from armour_surgery.errors import DataError, TeacherError, UsageError
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.recover.distributed import Process
from armour_surgery.recover.finetuning import finetune
from armour_surgery.recover.recipe import Recipe
from armour_surgery.recover.recipe_files import load_recipe, recipe_names
from armour_surgery.saving.any_model import load_any
from armour_surgery.saving.folder import read_plan

ARGUMENTS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 3,
    "proj_drop_rate": 0.1,
}
ALONE = Process(0, 1, torch.device("cpu"))
QUICK = ["--set", "data.batch_size=4", "--set", "data.images_per_epoch=12", "--set", "data.holdout=5"]
SHORT = [*QUICK, "--set", "schedule.epochs=2", "--set", "optimizer.lr=1e-4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` (timm's format), `armour` (converted from it), `photos` by class with one that is damaged."""
    folder = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)
    save_for_hf(model, str(folder / "tiny"), model_args=ARGUMENTS, safe_serialization=True)
    student, source = load_any(f"local-dir:{folder / 'tiny'}")
    save(convert(student, "qv", source=source), folder / "armour")
    for split, count in (("train", 8), ("val", 3)):
        for place, name in enumerate(("ant", "bee", "cow")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng((place, number, count)).integers(0, 256, (36, 34, 3), dtype=np.uint8)
                pixels[:, :, place] //= 4
                Image.fromarray(pixels).save(folder / "photos" / split / name / f"{number}.png")
    damaged = folder / "photos" / "train" / "bee" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    return folder


@pytest.fixture
def here(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARMOUR_DEBUG", raising=False)
    for name in ("tiny", "armour", "photos"):
        (tmp_path / name).symlink_to(root / name)
    return tmp_path


def bad(*arguments: str, code: int = 1) -> str:
    return failed(*arguments, code=code).stderr


def test_label_free_recovery_from_drawn_images(here: Path) -> None:
    found = document("finetune", "armour", "--recipe", "recover", *SHORT, "--out", "back")
    assert found["recipe"] == "recover"
    assert found["lr"] == {"base": 1e-4, "effective": 1e-4}
    assert (found["steps"], found["epochs"], found["images"]) == (6, 2, 24)
    assert found["start"].keys() == found["end"].keys() == {"cosine", "agreement"}
    assert found["kept"] in ("start", "step 3", "step 6")
    assert found["end"]["cosine"] >= found["start"]["cosine"]
    model = load("back")
    assert model.surgery.mode == "qv"  # type: ignore[union-attr]
    resolved = load_recipe(Path("back/recipe.yaml"))
    assert (resolved.data.batch_size, resolved.optimizer.lr, resolved.data.source) == (4, 1e-4, "synthetic")
    assert "effective learning rate 0.0001" in Path("back/recipe.yaml").read_text(encoding="utf-8")
    for name in ("log.jsonl", "summary.csv", "curves.png", "training.json", "README.md"):
        assert (Path("back") / name).is_file()
    assert json.loads(Path("back/training.json").read_text(encoding="utf-8"))["status"] == "done"


def test_training_with_labels_skips_and_names_a_damaged_image(here: Path) -> None:
    labels = ["finetune", "armour", "--recipe", "recover_labels", "--data", "photos", "--set", "data.workers=0"]
    result = run(*labels, *QUICK, "--set", "augment.crop=none", "--set", "judge.keep=last")
    assert result.exit_code == 0, result.stderr
    assert "effective 5e-05; 4 images a step" in result.stdout
    assert "epoch 2/2: loss" in result.stdout
    assert "top1" in result.stdout
    assert "5 images of photos that were not trained on" in result.stdout
    told = read_plan("armour-recover_labels").trained
    assert told is not None
    assert told.startswith("Trained for 6 steps (24 images); kept: the weights of the last step. On 5 images")
    assert told in Path("armour-recover_labels/README.md").read_text(encoding="utf-8")
    found = document(*labels, "--set", "data.batch_size=24", "--set", "data.holdout=0", "--out", "all")
    assert found["judged_on"] == "the validation images of photos"
    ((name, times),) = found["unreadable"].items()
    assert "bee/2.png (" in name
    assert times == 2


def test_a_model_from_scratch_is_built_converted_and_trained_in_one_command(here: Path) -> None:
    arguments = "{img_size: 32, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 4, num_classes: 3}"
    common = ["finetune", "vit_tiny_patch16_224", "--data", "photos", "--set", f"model.args={arguments}",
              "--set", "data.batch_size=8", "--set", "data.workers=0", "--set", "schedule.epochs=5",
              "--set", "data.mean=[0.4, 0.5, 0.6]"]  # fmt: skip
    found = document(*common, "--recipe", "deit_tiny_qv_300ep", "--out", "armoured")
    assert found["lr"] == {"base": 1e-3, "effective": pytest.approx(1e-3 * 8 / 512)}
    model = load("armoured")
    assert model.surgery.init == "wq"  # type: ignore[union-attr]
    assert not any("DropPath" in type(module).__name__ for module in model.modules())
    assert preprocessing(model).mean == (0.4, 0.5, 0.6)
    assert preprocessing(model).crop_pct == 0.875
    document(*common, "--recipe", "deit_tiny_300ep", "--out", "plain")
    plain, _ = load_any("local-dir:plain")
    assert preprocessing(plain).mean == (0.4, 0.5, 0.6)
    weights = load_file("plain/model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())


def test_a_transformers_model_recovers_too(here: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained("hf")
    settings = [*SHORT, "--set", "model.mode=qv", "--set", "model.init=wq-refit", "--teacher", "hf:hf"]
    found = document("finetune", "hf:hf", "--recipe", "recover", *settings, "--out", "back")
    assert found["end"]["cosine"] >= found["start"]["cosine"]
    assert load("back").surgery.init == "wq-refit"  # type: ignore[union-attr]


def test_what_cannot_be_is_said_before_anything_is_written(here: Path) -> None:
    assert "did you mean recover" in bad("finetune", "armour", "--recipe", "recovr", code=2)
    assert "unknown key optimizer.rate" in bad(
        "finetune", "armour", "--recipe", "recover", "--set", "optimizer.rate=1", code=2
    )
    assert "this recipe needs images" in bad("finetune", "armour", "--recipe", "recover_labels", code=2)
    assert "--data nowhere is no folder" in bad("finetune", "armour", "--recipe", "recover_labels", "--data", "nowhere")
    assert "name the architecture (deit_tiny_patch16_224)" in bad(
        "finetune", "armour", "--recipe", "deit_tiny_qv_300ep", "--data", "photos", code=2
    )
    assert "is for the mode kv" in bad("finetune", "armour", "--recipe", "recover", "--set", "model.mode=kv", code=2)
    Path("full").mkdir()
    Path("full/letter.txt").write_text("mine", encoding="utf-8")
    assert "full is a folder with other things" in bad("finetune", "armour", "--recipe", "recover", "--out", "full")
    assert "run.device='tpu'" in bad("finetune", "armour", "--recipe", "recover", "--set", "run.device=tpu", code=2)
    assert sorted(os.listdir("full")) == ["letter.txt"]


def call(root: Path, recipe: Recipe, out: Path, **options: Any) -> None:
    finetune(options.pop("model", str(root / "armour")), recipe, out, ALONE, **options)


def test_teachers(root: Path, tmp_path: Path) -> None:
    recover = load_recipe("recover")
    student, _ = load_any(f"local-dir:{root / 'tiny'}")
    with pytest.raises(TeacherError, match="nobody knows which model"):
        call(root, recover, tmp_path / "a", model=student)
    orphan = convert(student, "qv", example_input=(2, 3, 32, 32))
    with pytest.raises(TeacherError, match=r"cannot be loaded.*--teacher|has other weights.*--teacher"):
        call(root, recover, tmp_path / "b", model=orphan)
    other = load_any(f"local-dir:{root / 'tiny'}")[0]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    save_for_hf(other, str(tmp_path / "other"), model_args=ARGUMENTS, safe_serialization=True)
    _, source = load_any(f"local-dir:{tmp_path / 'other'}")
    stranger = convert(student, "qv", source=source)
    with pytest.raises(TeacherError, match="has other weights than the model"):
        call(root, recover, tmp_path / "c", model=stranger)
    labels = load_recipe("recover_labels", ["loss.logits=0"])
    with pytest.raises(UsageError, match="--teacher is given"):
        call(root, labels, tmp_path / "d", teacher=str(root / "tiny"), data=str(root / "photos"))
    gray, _ = timm.create_model("vit_tiny_patch16_224", **{**ARGUMENTS, "in_chans": 1}), None
    with pytest.raises(TeacherError, match="takes 1 channels and the student 3"):
        call(root, recover, tmp_path / "e", teacher=gray)


def test_data_that_does_not_fit(root: Path, tmp_path: Path) -> None:
    labels = load_recipe("recover_labels", ["data.workers=0"])
    with pytest.raises(DataError, match="10 classes and the model's head has 3"):
        call(root, labels, tmp_path / "a", data="digits")
    with pytest.raises(UsageError, match="data.mean has 1 values"):
        call(root, load_recipe("recover", ["data.mean=[0.5]"]), tmp_path / "b")
    flat = load_recipe("recover", ["data.holdout=0"])
    with pytest.raises(DataError, match="no images to judge by"):
        call(root, flat, tmp_path / "c")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "armour_surgery", "finetune", *arguments]


IN_TURN = """
import json, sys
from armour_surgery.cli import app
for arguments in json.loads(sys.argv[1]):
    if code := app(arguments, standalone_mode=False):
        sys.exit(code)
"""


def test_killed_and_resumed_is_as_if_nothing_had_happened(here: Path) -> None:
    """kill -9 at any moment after a few steps; weights, averages and logs equal those of a run that was left alone."""
    settings = ["armour", "--recipe", "recover_labels", "--data", "photos"]
    for one in ("data.batch_size=4", "data.holdout=0", "data.workers=0", "data.images_per_epoch=60", "ema.decay=0.9",
                "augment.auto=rand-m9-mstd0.5-inc1", "augment.erase=0.25", "run.checkpoint_every=1",
                "run.log_every=1"):  # fmt: skip
        settings += ["--set", one]
    process = subprocess.Popen(command(*settings, "--out", "killed"), stdout=subprocess.DEVNULL)
    log = Path("killed/log.jsonl")
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text(encoding="utf-8").count("\n") >= 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert json.loads(Path("killed/training.json").read_text(encoding="utf-8"))["status"] == "running"
    assert "holds a run already" in bad("finetune", *settings, "--out", "killed", code=2)
    began = log.read_text(encoding="utf-8").count("\n")
    # In a process of their own, too: what other tests left behind in this one is nothing that a user has. One serves
    # for both, since each run seeds what it draws.
    rests = [["finetune", *settings, *rest] for rest in (["--out", "killed", "--resume"], ["--out", "whole"])]
    subprocess.run([sys.executable, "-c", IN_TURN, json.dumps(rests)], stdout=subprocess.DEVNULL, check=True)
    for name in ("checkpoints/last.safetensors", "model.safetensors"):
        one, two = load_file(Path("killed", name)), load_file(Path("whole", name))
        assert one.keys() == two.keys()
        apart = {key: float((value - two[key]).abs().max()) for key, value in one.items()}
        assert not any(apart.values()), (name, began, apart)
    lines = [
        [(entry["step"], entry["loss"]) for entry in map(json.loads, Path(run, "log.jsonl").read_text().splitlines())]
        for run in ("killed", "whole")
    ]
    assert lines[0] == lines[1]
    assert Path("killed/summary.csv").read_text() == Path("whole/summary.csv").read_text()


def test_torchrun_trains_in_two_processes_and_one_of_them_speaks(here: Path) -> None:
    found = json.loads(in_torchrun("finetune", "armour", "--recipe", "recover", *SHORT, "--out", "two", "--json"))
    assert found["steps"] == 6
    alone = document("finetune", "armour", "--recipe", "recover", *SHORT, "--out", "one")
    assert found["start"] == pytest.approx(alone["start"])
    assert found["end"] == pytest.approx(alone["end"], rel=1e-2)
    assert load("two").surgery.mode == "qv"  # type: ignore[union-attr]


def test_recipes_are_listed_shown_and_copied(here: Path) -> None:
    listed = run("recipes", "ls")
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in recipe_names())
    assert [entry["name"] for entry in document("recipes", "ls")["recipes"]] == recipe_names()
    shown = run("recipes", "show", "recover")
    assert shown.stdout.startswith("# Short label-free recovery")
    assert run("recipes", "cp", "recover").exit_code == 0
    assert load_recipe(Path("recover.yaml")) == load_recipe("recover")
    assert "nothing was overwritten" in bad("recipes", "cp", "recover", code=2)
    assert run("recipes", "cp", "recover", "mine.yaml").exit_code == 0
    assert "did you mean recover" in bad("recipes", "show", "recovery", code=2)
    assert "does not end in .yaml" in bad("recipes", "cp", "recover", "mine", code=2)
