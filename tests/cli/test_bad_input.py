"""Whatever is wrong with the input is one line on stderr, and nothing is written."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import bad, good, run

from armour_surgery.modes import MODES
from armour_surgery.saving import folder


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_an_unknown_model(command: str, here: Path) -> None:
    message = bad(command, "deit_tiny_patch16_225")
    assert "deit_tiny_patch16_225" in message
    assert "did you mean" in message
    assert "deit_tiny_patch16_224" in message


@pytest.mark.parametrize(
    "model", ["nope:x", "timm:", "", " ", "./absent", "local-dir:absent", "a/b/c", "hf:./x", "[/x]"]
)
def test_names_that_are_no_model(model: str, here: Path) -> None:
    result = run("inspect", model)
    code = 2 if model.strip() in ("timm:", "") else 1
    assert bad("inspect", model, code=code)
    assert result.exit_code == code


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As without a network, whatever this machine has, and with an empty cache."""
    import huggingface_hub

    monkeypatch.setattr("armour_surgery.hosts.hub._hub_answers", lambda repo: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / ".cache"))


@pytest.mark.parametrize("model", ["deit_tiny_patch16_224", "hf:google/vit-base-patch16-224", "hf-hub:timm/nope"])
def test_no_hub(model: str, no_hub: None, here: Path) -> None:
    message = bad("convert", model)
    assert model in message
    for way in ("--no-pretrained", "--checkpoint", "hf:DIR", "local-dir:DIR"):
        assert way in message


@pytest.mark.real
def test_the_hub_itself(here: Path) -> None:
    """Where there is no network, the real attempt ends soon and in one line."""
    started = time.monotonic()
    result = run("convert", "deit_tiny_patch16_224", "--out", "out")
    assert time.monotonic() - started < 60
    if result.exit_code:
        assert "--no-pretrained" in bad("convert", "deit_tiny_patch16_224", "--out", "out")


def test_a_convnet(here: Path) -> None:
    for command in (["inspect"], ["convert", "--no-pretrained"]):
        message = bad(command[0], "resnet18", *command[1:])
        assert "ResNet" in message
        assert "no attention" in message


def test_a_mode_that_fits_nowhere(tiny: str) -> None:
    message = bad("convert", tiny, "--mode", "concat-half")
    assert "'concat-half'" in message
    assert "use qv" in message


def test_an_unknown_mode_or_init(tiny: str) -> None:
    message = bad("convert", tiny, "--mode", "vq", code=2)
    assert "'vq'" in message
    assert all(mode in message for mode in MODES)
    message = bad("convert", tiny, "--init", "magic", code=2)
    assert "'magic'" in message
    assert "wq" in message


def test_a_mode_that_is_wrong_is_told_before_the_model_is_loaded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("armour_surgery.hosts.load_model", never)
    assert "'vq'" in bad("convert", "deit_tiny_patch16_224", "--mode", "vq", code=2)


def test_an_output_that_is_taken_is_told_before_the_model_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("armour_surgery.hosts.load_model", never)
    (here / "out").write_text("mine")
    assert "out" in bad("convert", "deit_tiny_patch16_224", "--out", "out")


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_a_pattern_that_matches_nothing(option: str, tiny: str) -> None:
    message = bad("convert", tiny, option, "layers.*")
    assert "'layers.*'" in message
    assert "blocks.0.attn" in message


def test_a_model_that_is_converted_already(tiny: str, here: Path) -> None:
    good("convert", tiny, "--out", "out")
    for arguments in (["inspect", "out"], ["convert", "out"], ["convert", "./out/", "--dry-run"]):
        message = bad(*arguments)
        assert "converted already" in message
        assert tiny in message


def _is_file(path: Path) -> None:
    path.write_text("mine")


def _is_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def _is_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_is_file, _is_folder, _is_link], ids=lambda make: make.__name__)
@pytest.mark.parametrize("given", [True, False], ids=["given", "default"])
def test_an_output_that_is_not_ours(make: Any, given: bool, tiny: str, here: Path) -> None:
    out = here / ("out" if given else "tiny-armour-qv")
    make(out)
    message = bad("convert", tiny, *(["--out", "out"] if given else []))
    assert out.name in message
    assert "--out" in message
    if make is _is_folder:
        assert (out / "thesis.tex").read_text() == "mine"


def test_folders_that_were_edited(tiny: str, here: Path) -> None:
    good("convert", tiny, "--out", "out")
    plan = here / "out" / "surgery.json"
    whole = plan.read_text()
    for text in ("", "{", whole[: len(whole) // 2], "[]", whole.replace('"schema_version": 1', '"schema_version": 9')):
        plan.write_text(text)
        message = bad("inspect", "out")
        assert "surgery.json" in message


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint(file: str, share: float, tiny: str, models: Path, here: Path) -> None:
    whole = (models / file).read_bytes()
    (here / file).write_bytes(whole[: int(len(whole) * share)])
    message = bad("convert", tiny, "--checkpoint", file)
    assert file in message


def test_a_checkpoint_of_another_architecture(tiny: str, models: Path, here: Path) -> None:
    message = bad("convert", tiny, "--checkpoint", str(models / "levit" / "model.safetensors"))
    assert "levit/model.safetensors" in message
    assert "missing" in message
    assert "left over" in message


def test_a_checkpoint_with_another_head_says_how_many_classes(tiny: str, models: Path, here: Path) -> None:
    message = bad("convert", tiny, "--checkpoint", str(models / "seven.safetensors"))
    assert "--num-classes" in message
    assert "7" in message


@pytest.mark.parametrize("file", ["absent.safetensors", "absent.pth", "tiny", "notes.txt"])
def test_a_checkpoint_that_is_none(file: str, tiny: str, here: Path) -> None:
    (here / "notes.txt").write_text("x")
    assert file in bad("convert", tiny, "--checkpoint", file)


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["alone", "beside weights"])
@pytest.mark.parametrize("ending", ["pth", "bin", "ckpt"])
def test_a_pickle_is_not_executed(where: str, ending: str, tiny: str, here: Path, tmp_path_factory: Any) -> None:
    marker = tmp_path_factory.mktemp("marker") / "executed"
    malice = Malice(marker)
    torch.save(malice if where == "alone" else {"model": {"head.bias": malice}}, here / f"evil.{ending}")
    message = bad("convert", tiny, "--checkpoint", f"evil.{ending}")
    assert f"evil.{ending}" in message
    assert "not plain weights" in message
    assert not marker.exists()


def test_a_legacy_pickle_is_not_executed(tiny: str, here: Path, tmp_path_factory: Any) -> None:
    import pickle

    marker = tmp_path_factory.mktemp("marker") / "executed"
    (here / "evil.pth").write_bytes(pickle.dumps(Malice(marker)))
    assert "evil.pth" in bad("convert", tiny, "--checkpoint", "evil.pth")
    assert not marker.exists()


@pytest.mark.parametrize("option", ["--img-size", "--num-classes", "--in-chans"])
def test_sizes_that_are_none(option: str, here: Path) -> None:
    for value in ("-1", "0") if option != "--num-classes" else ("-1",):
        message = bad("convert", "vit_tiny_patch16_224", "--no-pretrained", option, value, code=2)
        assert value in message


def test_a_full_disk(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "save_file", full)
    message = bad("convert", tiny, "--out", "out")
    assert "No space left on device" in message
    assert "out" in message
