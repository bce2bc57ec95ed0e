"""Two who write to one folder wait for each other, and who reads it meanwhile gets the old model or the new one."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import CARD, FILES, PLAN, WEIGHTS, host
from small_models import refused
from torch import nn

from armour_surgery import convert, load, save
from armour_surgery.errors import CorruptFileError, FolderError
from armour_surgery.saving import folder, reading, staging
from armour_surgery.saving.folder import read_plan


@pytest.fixture(scope="module")
def other() -> nn.Module:
    """Another model for the same folder."""
    return convert(host(), "qv")


@pytest.fixture
def _fast(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model is built from is not worked out anew for every save."""
    source = read_plan(saved).source
    monkeypatch.setattr(folder, "rebuildable", lambda model, surgery, arguments: source)


def together(*actions: Callable[[], Any]) -> list[BaseException]:
    """Run the actions at the same time; what they raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(len(actions))

    def run(action: Callable[[], Any]) -> None:
        start.wait()
        try:
            action()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.usefixtures("_fast")
def test_writers_wait_for_each_other_and_readers_meet_one_version(
    vit: nn.Module, other: nn.Module, broken: Path
) -> None:
    writing = threading.Event()
    name = "blocks.0.attn.qkv.weight"
    weights = {"kv": vit.state_dict()[name], "qv": other.state_dict()[name]}
    seen: list[bool] = []

    def write(model: nn.Module) -> None:
        for _ in range(8):
            save(model, broken)

    def read() -> None:
        while not writing.is_set():
            document, tensors = reading.read_whole(broken)
            mode = document.plan.mode
            seen.append(mode == "auto" or torch.equal(tensors[name], weights[mode]))

    def write_both() -> None:
        try:
            assert together(lambda: write(vit), lambda: write(other)) == []
        finally:
            writing.set()

    assert together(write_both, read) == []
    assert seen
    assert all(seen)
    assert sorted(os.listdir(broken)) == FILES
    load(broken)


@pytest.mark.usefixtures("_fast")
def test_a_folder_that_two_make_is_whole_and_the_second_is_told(
    vit: nn.Module, other: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)

    def met(model: nn.Module) -> Any:
        both.wait(timeout=60)
        return {}

    monkeypatch.setattr(folder, "_buffer_dtypes", met)  # both are writing before either is done
    raised = together(lambda: save(vit, tmp_path / "out"), lambda: save(other, tmp_path / "out"))
    assert [type(error) for error in raised] == [FolderError]
    assert "meanwhile" in str(raised[0])
    assert str(tmp_path / "out") in str(raised[0])
    assert os.listdir(tmp_path) == ["out"]
    load(tmp_path / "out")


@pytest.mark.usefixtures("_fast")
def test_a_writer_that_does_not_come_to_its_end_is_not_waited_for_forever(
    vit: nn.Module, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "PATIENCE", 0.1)
    with staging.written_aside(broken) as stage:
        message = refused(FolderError, lambda: save(vit, broken))
        assert str(broken) in message
        assert "save again" in message
        for name in (PLAN, WEIGHTS, CARD):
            shutil.copy(broken / name, stage / name)
    save(vit, broken)
    assert load(broken).surgery.mode == "kv"  # type: ignore[union-attr]


@pytest.mark.usefixtures("_fast")
def test_a_process_that_was_killed_while_it_wrote_holds_nobody_up(vit: nn.Module, broken: Path) -> None:
    child = os.fork()
    if child == 0:
        with staging.written_aside(broken) as stage:
            (stage / WEIGHTS).write_bytes(b"half")
            os._exit(9)
    os.waitpid(child, 0)
    assert (broken / staging.STAGE / WEIGHTS).exists()
    save(vit, broken)
    assert sorted(os.listdir(broken)) == FILES


def test_a_reader_that_is_overtaken_by_a_writer_reads_again(
    broken: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, times = reading._read_weights, []

    def overtaken(path: Path, digest: str) -> dict[str, torch.Tensor]:
        times.append(path)
        if len(times) == 1:
            # Between the plan and the weights everything becomes new.
            (broken / WEIGHTS).write_bytes(b"new")
            shutil.copy(saved / PLAN, broken / PLAN)
            message = refused(CorruptFileError, lambda: read(path, digest))
            shutil.copy(saved / WEIGHTS, broken / WEIGHTS)
            raise CorruptFileError(message)
        return read(path, digest)

    monkeypatch.setattr(reading, "_read_weights", overtaken)
    load(broken)
    assert len(times) == 2


def test_damage_that_stays_is_told_at_once(broken: Path) -> None:
    (broken / WEIGHTS).write_bytes(b"damaged")
    assert "truncated" in refused(CorruptFileError, lambda: load(broken))
