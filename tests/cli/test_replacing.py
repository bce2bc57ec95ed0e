"""`convert` replaces what it wrote itself from the same model, and nothing that a user could miss."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from command_line import bad, document, good
from safetensors.torch import load_file
from saved_models import FILES

from armour_surgery import convert, load, save
from armour_surgery.saving.folder import read_plan
from armour_surgery.saving.staging import PLAN, WEIGHTS

RANDOM = ("--no-pretrained", "--img-size", "32", "--model-kwargs", "depth=2")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def trained(folder: Path) -> None:
    """A run of `finetune` wrote it."""
    document("finetune", str(folder), "--recipe", "recover", "--out", str(folder), *SHORT)


def trained_elsewhere(folder: Path) -> None:
    """A user's own loop trained it, and saved it in its place."""
    model = load(folder)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    save(model, folder)


def copied_from_a_run(folder: Path) -> None:
    """The model of a run, without its record."""
    trained(folder)
    (folder / "training.json").unlink()


def interrupted(folder: Path) -> None:
    """A run that did not come to its end."""
    (folder / "training.json").write_text('{"tool": "armour-surgery", "status": "running"}')


def damaged(folder: Path) -> None:
    """Nobody can read what it holds."""
    (folder / PLAN).write_text('{"tool": "armour-surgery", "schema_version": 99}')


def foreign(folder: Path) -> None:
    """Another tool's."""
    (folder / PLAN).unlink()


SHORT = [
    part
    for setting in ("data.batch_size=4", "data.images_per_epoch=8", "schedule.epochs=1", "judge.keep=last")
    for part in ("--set", setting)
]
KEPT: dict[str, tuple[Callable[[Path], None], str]] = {
    "trained": (trained, "holds a training run (training.json)"),
    "trained elsewhere": (trained_elsewhere, "holds a model that was saved in Python, perhaps after training"),
    "copied from a run": (copied_from_a_run, "holds a trained model"),
    "interrupted": (interrupted, "holds a training run (training.json)"),
    "damaged": (damaged, "holds a model that cannot be read"),
    "foreign": (foreign, "is a folder with other things in it"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_user_could_miss_is_replaced_with_force_alone(kind: str, tiny: str, here: Path) -> None:
    out = here / "out"
    good("convert", tiny, "--out", "out")
    (out / "notes.txt").write_text("mine")
    act, reason = KEPT[kind]
    act(out)
    before = contents(out)
    message = bad("convert", tiny, "--mode", "kv", "--out", "out")
    assert message.startswith("error: out ")
    assert reason in message
    assert "--force" in message
    assert "name another --out" in message
    assert contents(out) == before
    good("convert", tiny, "--mode", "kv", "--out", "out", "--force")
    assert read_plan(out).mode == "kv"
    assert (out / "notes.txt").read_text() == "mine"
    assert {path.name for path in (out / "checkpoints").glob("*")} == {
        Path(name).name for name in before if name.startswith("checkpoints/")
    }
    load(out)
    # It is a conversion like any other now.
    good("convert", tiny, "--mode", "qv", "--out", "out")
    assert read_plan(out).mode == "qv"


def test_another_model_is_kept(tiny: str, models: Path, here: Path) -> None:
    good("convert", tiny, "--out", "out")
    before = contents(here / "out")
    for other in (str(models / "hf"), str(models / "levit")):
        message = bad("convert", other, "--out", "out")
        assert "out holds a conversion of another model (local-dir:tiny), and was not replaced" in message
    assert "deit" not in bad("convert", "vit_tiny_patch16_224", *RANDOM, "--out", "out")
    assert contents(here / "out") == before
    good("convert", str(models / "hf"), "--out", "out", "--force")
    assert load(here / "out").config.model_type == "armour_vit"  # type: ignore[union-attr]


def test_the_same_model_in_another_spelling_is_replaced(tiny: str, here: Path) -> None:
    good("convert", tiny, "--out", "out")
    for same in ("./tiny", str(here / "tiny"), "local-dir:./tiny/"):
        good("convert", same, "--mode", "kv", "--out", "out")


def test_random_weights_are_replaced_by_other_ones(here: Path) -> None:
    weights = []
    for _ in range(2):
        good("convert", "vit_tiny_patch16_224", *RANDOM)
        weights.append(load_file(here / "vit_tiny_patch16_224-armour-qv" / WEIGHTS))
    assert not torch.equal(weights[0]["head.weight"], weights[1]["head.weight"])


def test_the_default_name_is_looked_at_before_the_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    save(convert(model), "vit_tiny_patch16_224-armour-qv")
    monkeypatch.setattr("armour_surgery.convert", None)  # would be called
    message = bad("convert", "vit_tiny_patch16_224", *RANDOM)
    assert message.startswith("error: vit_tiny_patch16_224-armour-qv holds a model that was saved in Python")


def test_what_is_no_folder_is_not_replaced_even_with_force(tiny: str, here: Path) -> None:
    (here / "file").write_text("mine")
    (here / "nowhere").symlink_to(here / "absent")
    for out in ("file", "nowhere"):
        assert "exists and is not a folder" in bad("convert", tiny, "--out", out, "--force")
    assert (here / "file").read_text() == "mine"


def test_a_dry_run_looks_at_no_folder(tiny: str, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    assert document("convert", tiny, "--dry-run", "--out", "out")["out"] is None


def test_the_mark_of_a_conversion_is_in_the_weights_alone(tiny: str, here: Path) -> None:
    good("convert", tiny, "--out", "out")
    keys = json.loads((here / "out" / PLAN).read_text()).keys()
    save(load(here / "out"), here / "saved")
    assert json.loads((here / "saved" / PLAN).read_text()).keys() == keys
    assert sorted(path.name for path in (here / "out").iterdir()) == FILES
