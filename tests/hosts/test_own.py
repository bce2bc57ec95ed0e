"""FILE.py:CALLABLE: the user's own file is imported as Python would, and what is wrong with it is told."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from own_files import write_vit
from safetensors.torch import save_file
from torch import nn

from armour_surgery.errors import ArmourError, CheckpointError, ModelError, UsageError
from armour_surgery.hosts import load_model


@pytest.fixture(autouse=True)
def _modules() -> Iterator[None]:
    """What a test imports is forgotten after it."""
    modules, path = dict(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in sys.modules.keys() - modules.keys():
        del sys.modules[name]


@pytest.fixture
def vit(tmp_path: Path) -> str:
    return str(write_vit(tmp_path))


def test_a_class_or_a_function_of_a_file_is_a_model(vit: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("MyViT", "trained", "Sizes.image"):
        model, source = load_model(f"{vit}:{name}")
        assert type(model).__name__ == "MyViT"
        assert not model.training
        # Neither the folder nor anything else of the machine.
        assert (source.library, source.architecture, source.name) == ("own", "MyViT", f"vit.py:{name}")
        assert not source.arguments
    assert capsys.readouterr().out == ""  # stdout may be for JSON
    model, _ = load_model(f"{vit}:MyViT")
    again = copy.deepcopy(model)
    assert type(again) is type(model)
    assert sys.modules[type(model).__module__].MyViT is type(model)


def test_weights_of_a_file_go_into_it(vit: str, tmp_path: Path) -> None:
    model, _ = load_model(f"{vit}:MyViT")
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    loaded, _ = load_model(f"{vit}:MyViT", checkpoint=tmp_path / "w.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"vit\.py:MyViT"):
        load_model(f"{vit}:MyViT", checkpoint=tmp_path / "other.safetensors")


def test_files_of_one_name_are_told_apart_and_so_are_their_neighbors(tmp_path: Path) -> None:
    widths = {"a": "2 * width", "b": "3 * width", "a/inner": "5 * width"}
    depths = {"a": 1, "b": 3, "a/inner": 2}
    for folder in (*widths, *widths):
        path = write_vit(tmp_path / folder, depth=depths[folder], width=widths[folder])
        model, _ = load_model(f"{path}:MyViT")
        assert len(model.mixers) == depths[folder]  # type: ignore[arg-type]
        assert model.mlp[0].out_features == 20 * int(widths[folder][0])  # type: ignore[index,operator]


def test_a_package_may_import_relatively(tmp_path: Path) -> None:
    path = write_vit(tmp_path / "mine", dot=".")
    with pytest.raises(ModelError, match=r"vit\.py, line 8.*ImportError.*an empty __init__\.py into .*mine"):
        load_model(f"{path}:MyViT")
    (tmp_path / "mine" / "__init__.py").write_text("")
    model, _ = load_model(f"{path}:MyViT")
    assert type(model).__module__ == "mine.vit"


@pytest.mark.parametrize("file", ["my vit.py", "c:vit.py", "vit_tiny_patch16_224.py", "timm.py", "random.py"])
def test_a_file_may_have_any_name(vit: str, tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(Path(vit).read_text())
    before = {name: sys.modules.get(name) for name in ("timm", "random")}
    model, source = load_model(f"{tmp_path / file}:MyViT")
    assert source.name == f"{file}:MyViT"
    assert isinstance(model, nn.Module)
    assert before == {name: sys.modules.get(name) for name in before}


@pytest.mark.parametrize(
    ("callable_name", "kind", "message"),
    [
        ("", UsageError, r"does not say what to call.*vit\.py:MyViT or .*vit\.py:Chatty or .*vit\.py:Tower or"),
        (":MyVit", UsageError, r"has no 'MyVit'; write .*vit\.py:MyViT"),
        (":Sizes.video", UsageError, r"has no 'Sizes\.video'"),
        (":needs", UsageError, "needs needs width, depth, and is called with no arguments; write a function in vit.py"),
        (":Attention", UsageError, "Attention needs width, heads"),
        (":nothing", UsageError, r"nothing\(\) returned None, which is no torch\.nn\.Module"),
        (":Config", UsageError, "an object of type Config"),
        (":model", UsageError, "is a model and not what makes one"),
        (":torch", UsageError, "torch is an object of type module; write"),
        (":breaks", ModelError, r"breaks\(\) of vit\.py failed \(vit\.py, line \d+\): ValueError: no such width"),
    ],
)
def test_what_cannot_be_called_is_told(vit: str, callable_name: str, kind: type[ArmourError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        load_model(f"{vit}{callable_name}")
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\n\ndef f(:\n", r"line 3.*SyntaxError"),
        ("import nothing_like_it\n", r"f\.py, line 1.*No module named 'nothing_like_it'"),
        ("import sys\nsys.exit(3)\n", r"f\.py, line 2.*SystemExit: 3"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f.py").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_model(f"{tmp_path / 'f.py'}:f")


def test_a_library_s_model_that_a_file_makes_needs_no_file_later(tmp_path: Path) -> None:
    small = "'vit_tiny_patch16_224', depth=1, embed_dim=24, num_heads=2"
    lines = ["import timm", "def plain():", f"    return timm.create_model({small})"]
    lines += ["def changed():", "    model = plain()", "    model.norm = timm.layers.RmsNorm(24)", "    return model"]
    (tmp_path / "f.py").write_text("\n".join(lines))
    _, source = load_model(f"{tmp_path / 'f.py'}:plain")
    assert (source.library, source.arguments["embed_dim"]) == ("timm", 24)
    _, source = load_model(f"{tmp_path / 'f.py'}:changed")
    assert (source.library, source.name) == ("own", "f.py:changed")


def test_files_and_options_that_there_are_not(vit: str, tmp_path: Path) -> None:
    for name in ("nope.py:X", "nope.py", "C:\\folder\\nope.py:X"):
        with pytest.raises(UsageError, match=r"there is no file .*nope\.py"):
            load_model(name)
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UsageError, match="which has none"):
        load_model(str(tmp_path / "empty.py"))
    with pytest.raises(UsageError, match="nothing that --img-size could go to"):
        load_model(f"{vit}:MyViT", img_size=32)
    with pytest.raises(UsageError, match="nothing that --model-kwargs depth=... could go to"):
        load_model(f"{vit}:MyViT", arguments={"depth": 3})
