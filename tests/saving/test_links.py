"""Links do not lead out of a folder, and unfinished files of strangers stay where they are."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from saved_models import CARD, FILES, PLAN, WEIGHTS, contents, same
from small_models import refused
from torch import nn

from armour_surgery import load, save
from armour_surgery.errors import FolderError, SchemaError
from armour_surgery.saving.folder import read_plan
from armour_surgery.saving.staging import STAGE


def _stage_is_a_link(stage: Path, strangers: Path) -> None:
    stage.symlink_to(strangers)


def _stage_is_a_link_to_nowhere(stage: Path, strangers: Path) -> None:
    stage.symlink_to(strangers / "nowhere")


def _stage_is_a_file(stage: Path, strangers: Path) -> None:
    stage.write_text("years of work")


def _weights_are_a_link(stage: Path, strangers: Path) -> None:
    stage.mkdir()
    (stage / WEIGHTS).symlink_to(strangers / WEIGHTS)


def _plan_is_a_link(stage: Path, strangers: Path) -> None:
    stage.mkdir()
    (stage / PLAN).symlink_to(strangers / PLAN)


def _a_strangers_file(stage: Path, strangers: Path) -> None:
    stage.mkdir()
    (stage / "thesis.tex").write_text("years of work")


def _a_strangers_folder(stage: Path, strangers: Path) -> None:
    (stage / CARD).mkdir(parents=True)
    (stage / CARD / "thesis.tex").write_text("years of work")


STAGES: dict[str, Callable[[Path, Path], None]] = {
    "stage": _stage_is_a_link,
    "dangling": _stage_is_a_link_to_nowhere,
    "stage-is-a-file": _stage_is_a_file,
    "weights": _weights_are_a_link,
    "plan": _plan_is_a_link,
    "strangers-file": _a_strangers_file,
    "strangers-folder": _a_strangers_folder,
}


@pytest.mark.parametrize("action", ["load", "save"])
@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_that_is_not_ours_is_refused_and_left_alone(
    kind: str, action: str, vit: nn.Module, broken: Path, saved: Path, tmp_path: Path
) -> None:
    strangers = Path(shutil.copytree(saved, tmp_path / "strangers"))
    # The stranger's weights are those that the plan names: without the refusal they would be read, and moved.
    (broken / WEIGHTS).unlink()
    STAGES[kind](broken / STAGE, strangers)
    before, mine = contents(tmp_path), sorted(os.listdir(broken))
    message = refused(FolderError, (lambda: load(broken)) if action == "load" else (lambda: save(vit, broken)))
    assert str(broken / STAGE) in message
    assert "remove" in message
    assert contents(tmp_path) == before
    assert sorted(os.listdir(broken)) == mine


def test_what_a_killed_writer_left_is_cleared_away(vit: nn.Module, broken: Path) -> None:
    (broken / STAGE).mkdir()
    for name in (*FILES, ".tmpA1b2C3"):
        (broken / STAGE / name).write_bytes(b"half")
    load(broken)
    save(vit, broken)
    assert same(vit, load(broken))
    assert sorted(os.listdir(broken)) == FILES


def test_a_plan_behind_a_link_out_of_the_folder_is_not_read(saved: Path, broken: Path) -> None:
    (broken / PLAN).unlink()
    (broken / PLAN).symlink_to(saved / PLAN)
    for action in (load, read_plan):
        message = refused(SchemaError, lambda action=action: action(broken))
        assert str(broken / PLAN) in message
        assert "link" in message


def _snapshot(saved: Path, cache: Path) -> Path:
    """The folder as huggingface_hub keeps what it downloaded."""
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for name in (PLAN, WEIGHTS, CARD):
        shutil.copy(saved / name, cache / "blobs" / f"blob-of-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-of-{name}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_loaded(saved: Path, tmp_path: Path) -> None:
    assert same(load(_snapshot(saved, tmp_path / "models--me--mine")), load(saved))


def test_blobs_that_are_a_link_themselves_are_outside(saved: Path, tmp_path: Path) -> None:
    snapshot = _snapshot(saved, tmp_path / "models--me--mine")
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    refused(SchemaError, lambda: load(snapshot))
