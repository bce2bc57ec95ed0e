"""A write that breaks off leaves the old folder or the new one whole."""

import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved_models import contents
from small_models import refused
from torch import nn

from armour_surgery import load, save
from armour_surgery.errors import FolderError
from armour_surgery.saving import folder
from armour_surgery.saving.folder import read_plan

INTERRUPTS: dict[str, Callable[[], BaseException]] = {
    "ctrl-c": KeyboardInterrupt,
    "disk-full": lambda: OSError(errno.ENOSPC, "No space left on device"),
}


class Breaker:
    """Lets calls through that write, and raises once, at the one with the given number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.calls: list[str] = []
        self.at, self.error = at, error
        places: list[tuple[Any, str]] = [
            (folder, "save_file"),
            (os, "rename"),
            (os, "replace"),
            (os, "chmod"),
            (shutil, "move"),
            (tempfile, "mkdtemp"),
            (Path, "write_text"),
            (Path, "rename"),
            (Path, "replace"),
        ]
        if isinstance(error, KeyboardInterrupt):
            places.append((shutil, "rmtree"))
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name), name))

    def _wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self.at:
                if name in ("save_file", "write_text"):
                    # A write that breaks off leaves half of the file.
                    Path(args[1] if name == "save_file" else args[0]).write_bytes(b"half")
                raise self.error
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("interrupt", INTERRUPTS)
@pytest.mark.parametrize("occupied", [False, True], ids=["new", "overwrite"])
def test_a_write_that_breaks_off_leaves_the_old_folder_or_the_new_one_whole(
    vit: nn.Module, saved: Path, tmp_path: Path, occupied: bool, interrupt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "rebuildable", lambda model, surgery, arguments: read_plan(saved).source)
    wrong: list[str] = []
    for step in range(1, 30):
        parent = tmp_path / str(step)
        parent.mkdir()
        out = parent / "out"
        mine = {"train.log": b"epoch 1", "checkpoints/1.pth": b"weights"}
        if occupied:
            shutil.copytree(saved, out)
            (out / "checkpoints").mkdir()
            for name, content in mine.items():
                (out / name).write_bytes(content)
        before = contents(parent)
        with monkeypatch.context() as patch:
            breaker = Breaker(patch, step, INTERRUPTS[interrupt]())
            try:
                save(vit, out)
                ended = "well"
            except (KeyboardInterrupt, FolderError) as error:
                ended = type(error).__name__
        if len(breaker.calls) < step:
            assert ended == "well"
            break
        where = f"interrupted in call {step} ({breaker.calls[step - 1]}, ended {ended})"
        left = sorted(entry.name for entry in parent.iterdir())
        if left not in ([["out"]] if occupied else [[], ["out"]]):
            wrong.append(f"{where}: {left} is left in the parent folder")
        after = contents(parent)
        if out.exists() and after != before:
            if read_plan(out).mode != "kv":
                wrong.append(f"{where}: the old folder is not whole: {sorted(after)}")
            else:
                load(out)
            if occupied and any(after.get(f"out/{name}") != content for name, content in mine.items()):
                wrong.append(f"{where}: the user's own files are gone")
    else:
        pytest.fail("save never came to its end")
    assert step > 5
    assert not wrong, "\n".join(wrong)


def test_a_disk_that_is_full(vit: nn.Module, broken: Path) -> None:
    (broken / "train.log").write_text("epoch 1")
    before = contents(broken.parent)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = []
    try:
        # Writing more than this into one file fails, as on a disk that is full.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        for out in (broken, broken.with_name("new")):
            with pytest.raises(FolderError) as caught:
                save(vit, out)
            messages.append((str(caught.value), str(out)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(out in message and "\n" not in message for message, out in messages)
    assert contents(broken.parent) == before
    assert os.listdir(broken.parent) == ["model"]
    load(broken)


def test_a_folder_that_may_not_be_written(vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    message = refused(FolderError, lambda: save(vit, tmp_path / "out"))
    assert str(tmp_path / "out") in message
    assert "Permission denied" in message
