"""What of a folder goes to the hub: the model's files, and of others only what was asked for."""

import os
from pathlib import Path

import pytest
from hub_stand_in import Hub
from saved_models import CARD, PLAN, WEIGHTS
from small_models import refused

from armour_surgery import push
from armour_surgery.errors import UsageError
from armour_surgery.sharing.contents import sort_files

# Name to reason; None where it is sent.
FILES = {
    "figure.png": None,
    "curves.PNG": None,
    "report.html": None,
    "LICENSE": None,
    "LICENSE.md": None,
    "NOTICE.txt": None,
    "CITATION.cff": None,
    "config.json": None,
    "preprocessor_config.json": None,
    "training.json": "a record of training",
    "recipe.yaml": "a record of training",
    "log.jsonl": "a record of training",
    "summary.csv": "a record of training",
    "events.out.tfevents.1": "a record of training",
    "notes.txt": "not of the model",
    "secrets.json": "not of the model",
    "model.onnx": "not of the model",
    "pytorch_model.bin": "not of the model",
    ".env": "hidden",
    ".gitattributes": "hidden",
    "optimizer.pt": "what training goes on from",
    "optimizer.safetensors": "what training goes on from",
    "scheduler.pt": "what training goes on from",
    "rng_state_0.pth": "what training goes on from",
    "training_args.bin": "what training goes on from",
    "checkpoint.pth": "what training goes on from",
    "last.ckpt": "what training goes on from",
    "checkpoints/last.safetensors": "what training goes on from",
    "checkpoint-500/model.safetensors": "what training goes on from",
    "images/cat.png": "a folder of other things",
    "tensorboard/events": "a record of training",
    ".armour-new/model.safetensors": "hidden",
}


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def reasons(folder: Path, *include: str) -> dict[str, str]:
    return {file.name: file.reason for file in sort_files(folder, include)[1]}


def test_files_by_kind(tmp_path: Path) -> None:
    fill(tmp_path, [*FILES, PLAN, WEIGHTS, CARD])
    sent, _ = sort_files(tmp_path)
    assert sent.keys() == {name for name, reason in FILES.items() if reason is None}
    wanted = {}
    for name, reason in FILES.items():
        if reason is not None:
            # Folders that are not looked into are one entry.
            wanted[name.partition("/")[0] + "/" * ("/" in name)] = reason
    assert reasons(tmp_path) == wanted


@pytest.mark.parametrize("name", [name for name, reason in FILES.items() if reason in ("hidden", FILES["last.ckpt"])])
def test_some_are_not_sent_whatever_is_asked(tmp_path: Path, name: str) -> None:
    fill(tmp_path, [name, "other.txt"])
    assert "matches no file" in refused(UsageError, lambda: sort_files(tmp_path, (name,)))
    assert sort_files(tmp_path, ("*",))[0].keys() == {"other.txt"}


def test_asked_for(tmp_path: Path) -> None:
    fill(tmp_path, ["notes.txt", "onnx/model.onnx", "onnx/deep/er.txt", "recipe.yaml", "onnx/.cache/x", "rest/x"])
    sent, left_out = sort_files(tmp_path, ("onnx/*", "recipe.yaml"))
    assert sent.keys() == {"onnx/model.onnx", "onnx/deep/er.txt", "recipe.yaml"}
    assert sent["onnx/deep/er.txt"].read_bytes() == b"onnx/deep/er.txt"
    assert {file.name for file in left_out} == {"notes.txt", "onnx/.cache/", "rest/x"}


def test_links_and_what_is_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    fill(folder, ["a.png"])
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "pictures").mkdir()
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "config.json").symlink_to("a.png")
    (folder / "gone.png").symlink_to("nothing")
    (folder / "folder.png").symlink_to(".")
    (folder / "pictures").symlink_to(tmp_path / "pictures")
    os.mkfifo(folder / "pipe.png")
    odd = os.fsdecode(b"\xff.png")
    (folder / odd).write_bytes(b"")
    assert sort_files(folder)[0].keys() == {"a.png", "config.json"}
    assert reasons(folder, "*.png") == {
        "out.png": "a link out of the folder",
        "pictures": "a link out of the folder",
        "gone.png": "a link to nothing",
        "folder.png": "a link to a folder",
        "pipe.png": "not a file",
        odd: "its name is not UTF-8",
    }


def test_nothing_else_is_sent(folder: Path, hub: Hub) -> None:
    fill(folder, list(FILES))
    pushed = push(folder, "me/tiny", license="mit", include=("notes.txt",))
    wanted = {name for name, reason in FILES.items() if reason is None} | {"notes.txt", PLAN, WEIGHTS, CARD}
    arrived = hub.repos["me/tiny"].files()
    assert arrived.keys() == wanted == {file.name for file in pushed.files}
    assert arrived["notes.txt"] == b"notes.txt"
    assert "checkpoints/" in {file.name for file in pushed.left_out}
