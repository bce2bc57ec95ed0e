"""A saved folder holds what it says and no pickle, and what is not ours is left alone."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from saved_models import FILES, PLAN, WEIGHTS, contents, host, same
from small_models import refused
from torch import nn

from armour_surgery import ArmourError, SurgeryPlan, convert, load, save
from armour_surgery.errors import FolderError, NotOursError, UsageError
from armour_surgery.saving.folder import read_plan
from armour_surgery.saving.occupied import check_output, is_saved_folder

# The folder itself


def test_what_the_folder_holds(saved: Path) -> None:
    assert sorted(entry.name for entry in saved.iterdir()) == FILES
    document = json.loads((saved / PLAN).read_text(encoding="utf-8"))
    assert set(document) == {
        "schema_version", "tool", "versions", "weights", "sha256", "tied", "buffer_dtypes", "plan"
    }  # fmt: skip
    assert (document["schema_version"], document["tool"]) == (1, "armour-surgery")
    assert document["weights"] == WEIGHTS
    assert document["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert document["versions"]["timm"] == timm.__version__
    assert document["plan"]["source"]["library"] == "timm"
    assert document["plan"]["source"]["architecture"].startswith("vit_tiny_patch16_224")
    assert document["plan"]["source"]["arguments"]["depth"] == 2
    assert (saved.stat().st_mode & 0o777, (saved / WEIGHTS).stat().st_mode & 0o777) == (0o755, 0o644)


def test_no_pickle_in_the_folder(saved: Path, saved_hf: Path) -> None:
    for path in (saved, saved_hf):
        for name, content in contents(path).items():
            # A pickle of protocol 2 or later starts with 0x80, a zip file (torch.save) with PK.
            assert content[:1] != b"\x80", name
            assert content[:2] != b"PK", name
        load_file(path / WEIGHTS)
        json.loads((path / PLAN).read_text())


def test_the_plan_survives_json(saved: Path) -> None:
    converted = convert(host(), exclude="blocks.1*")
    surgery: SurgeryPlan = converted.surgery  # type: ignore[assignment]
    assert len(surgery.sites) == 1
    assert surgery.refused == ()
    assert SurgeryPlan.from_dict(surgery.to_dict()) == surgery
    assert SurgeryPlan.from_dict(json.loads(json.dumps(surgery.to_dict()))) == surgery
    written = read_plan(saved)
    assert written == load(saved).surgery
    assert written.sites == surgery.sites


def test_is_saved_folder(saved: Path, tmp_path: Path) -> None:
    assert is_saved_folder(saved)
    assert is_saved_folder(str(saved))
    assert not is_saved_folder(tmp_path)
    assert not is_saved_folder(tmp_path / "absent")
    assert not is_saved_folder(saved / PLAN)


# What save refuses


def test_a_model_that_is_not_converted_is_not_saved(tmp_path: Path) -> None:
    message = refused(ArmourError, lambda: save(host(), tmp_path / "out"))
    assert "not converted" in message
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_weights_is_not_saved(tmp_path: Path) -> None:
    message = refused(FolderError, lambda: save(convert(host().to("meta")), tmp_path / "out"))
    assert "meta" in message
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_json_cannot_hold_are_refused(vit: nn.Module, tmp_path: Path) -> None:
    refused(ArmourError, lambda: save(vit, tmp_path / "out", model_args={"norm_layer": nn.LayerNorm}))
    assert list(tmp_path.iterdir()) == []


def test_overwriting_our_own_folder_keeps_what_else_lies_in_it(vit: nn.Module, broken: Path) -> None:
    (broken / "train.log").write_text("epoch 1")
    (broken / "checkpoints" / "deep").mkdir(parents=True)
    (broken / "checkpoints" / "deep" / "1.pth").write_bytes(b"\x80")
    (broken / ".hidden").write_text("")
    (broken / "link").symlink_to("train.log")
    save(vit, broken)
    assert same(vit, load(broken))
    assert (broken / "train.log").read_text() == "epoch 1"
    assert (broken / "checkpoints" / "deep" / "1.pth").read_bytes() == b"\x80"
    assert (broken / ".hidden").exists()
    assert (broken / "link").is_symlink()
    assert [entry.name for entry in broken.parent.iterdir()] == ["model"]


def test_an_empty_folder_and_missing_parents_are_fine(vit: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(vit, tmp_path / "empty")
    save(vit, tmp_path / "a" / "b" / "c")
    assert is_saved_folder(tmp_path / "empty")
    assert is_saved_folder(tmp_path / "a" / "b" / "c")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "empty"]


def _foreign_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


def _foreign_file(path: Path) -> None:
    path.write_text("years of work")


def _dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def _link_to_foreign_folder(path: Path) -> None:
    _foreign_folder(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _other_tools_folder(path: Path) -> None:
    path.mkdir()
    (path / PLAN).write_text('{"patient": "Doe", "organ": "appendix"}')


FOREIGN = {
    "folder": _foreign_folder,
    "file": _foreign_file,
    "dangling-link": _dangling_link,
    "link-to-folder": _link_to_foreign_folder,
    "other-surgery-json": _other_tools_folder,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_is_left_alone(vit: nn.Module, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    FOREIGN[kind](out)
    before, names = contents(tmp_path), sorted(os.listdir(tmp_path))
    for action in (lambda: check_output(out), lambda: save(vit, out)):
        message = refused(NotOursError, action)
        assert str(out) in message
        assert "--out" in message
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == names
    assert out.is_symlink() == ("link" in kind)


def test_a_link_to_a_folder_of_ours_loses_nothing(vit: nn.Module, broken: Path) -> None:
    (broken / "train.log").write_text("epoch 1")
    link = broken.with_name("link")
    link.symlink_to("model")
    try:
        save(vit, link)
    except FolderError:
        assert read_plan(broken).mode == "auto"
    else:
        assert same(vit, load(link))
    assert link.is_symlink()
    assert (broken / "train.log").read_text() == "epoch 1"
    assert sorted(os.listdir(broken.parent)) == ["link", "model"]


def test_the_current_folder_loses_nothing(vit: nn.Module, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (broken / "train.log").write_text("epoch 1")
    monkeypatch.chdir(broken)
    try:
        save(vit, ".")
    except FolderError as error:
        assert "Errno" not in str(error)  # noqa: PT017
    assert (broken / "train.log").read_text() == "epoch 1"
    assert set(os.listdir(broken)) == {*FILES, "train.log"}
    load(broken)


def test_a_parent_that_is_a_file_is_refused(vit: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    message = refused(FolderError, lambda: save(vit, tmp_path / "file" / "out"))
    assert str(tmp_path / "file" / "out") in message
    assert contents(tmp_path) == {"file": b"x"}


def test_usage_errors_are_told_from_folders(tmp_path: Path) -> None:
    assert UsageError.exit_code == 2
    assert FolderError.exit_code == 1
