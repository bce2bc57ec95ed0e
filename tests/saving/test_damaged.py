"""What is saved comes back the same, a broken folder is refused by name, and a broken write leaves nothing behind."""

import copy
import errno
import functools
import hashlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from armour_surgery import ArmourError, SurgeryPlan, convert, load, save
from armour_surgery.errors import (
    CorruptFileError,
    FolderError,
    KeyMismatchError,
    NotOursError,
    SchemaError,
    UsageError,
)
from armour_surgery.hosts import example_input
from armour_surgery.saving import folder
from armour_surgery.saving.folder import check_output, is_saved_folder, read_plan

PLAN, WEIGHTS, CARD = "surgery.json", "model.safetensors", "README.md"
TIMM: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
HF: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "image_size": 32,
    "patch_size": 8,
}


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{**TIMM, "patch_size": 8, **arguments})


def _timm_levit(name: str) -> Callable[[], nn.Module]:
    sizes = {"embed_dim": (24, 36), "depth": (1, 1), "num_heads": (3, 5), "key_dim": 8, "attn_ratio": 2.0}
    return lambda: timm.create_model(name, img_size=64, num_classes=5, **sizes)


def _hf_levit() -> nn.Module:
    config = transformers.LevitConfig(
        image_size=64,
        hidden_sizes=[24, 32, 40],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        num_labels=5,
    )
    return transformers.LevitForImageClassification(config)


def _hf_swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return transformers.SwinForImageClassification(config)


def _clip() -> nn.Module:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=HF, text_config=text, projection_dim=16))


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "vit": _timm("vit_tiny_patch16_224"),
    "distilled": _timm("deit_tiny_distilled_patch16_224"),
    "beit": _timm("beit_base_patch16_224"),
    "eva02": _timm("eva02_tiny_patch14_224"),
    "eva-rope-mixed": _timm("vit_small_patch16_rope_mixed_224"),
    "levit": _timm_levit("levit_128s"),
    "levit-conv": _timm_levit("levit_conv_128s"),
    "hf-vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=5)),
    "hf-vit-eager": lambda: transformers.ViTModel(transformers.ViTConfig(**HF, attn_implementation="eager")),
    "hf-dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF)),
    "hf-levit": _hf_levit,
    "hf-swin": _hf_swin,
    "hf-clip-vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF)),
    "hf-clip": _clip,
}


def host(name: str = "vit") -> nn.Module:
    """A host in which no two tensors are equal, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(0)
    model = HOSTS[name]()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(drawn + 0.5 if key.endswith("running_var") else (drawn - 0.5) / 2)
    return model.eval()


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """All tensors that the model answers for the same two images."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        name: torch.rand(like.shape, generator=generator).to(like.dtype)
        if like.is_floating_point()
        else torch.ones(like.shape, dtype=like.dtype)
        for name, like in example_input(model, 2).items()
    }

    def tensors(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from tensors(inner)

    with torch.no_grad():
        found = list(tensors(model.eval()(**inputs)))
    assert found
    assert all(tensor.isfinite().all() for tensor in found)
    return found


def same(first: nn.Module, second: nn.Module) -> bool:
    """Equal to the last bit: outputs, tensors, their names and types, and the classes of all modules."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    assert [tensor.dtype for tensor in ours.values()] == [tensor.dtype for tensor in theirs.values()]
    assert [type(m).__qualname__ for m in first.modules()] == [type(m).__qualname__ for m in second.modules()]
    return all(torch.equal(ours[key], theirs[key]) for key in ours) and all(
        torch.equal(a, b) for a, b in zip(outputs(first), outputs(second), strict=True)
    )


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refused(kind: type[ArmourError], action: Callable[[], Any]) -> str:
    """The message with which an action fails: of that class, and one line."""
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@functools.cache
def _armour(name: str) -> nn.Module:
    return convert(host(name))


def armour(name: str = "vit") -> nn.Module:
    """A host that was converted; a copy, to do with as one likes."""
    return copy.deepcopy(_armour(name))


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """A converted model that nobody may change."""
    return convert(host(), "kv")


# Round trips


@pytest.mark.parametrize("name", HOSTS)
def test_a_model_comes_back_bit_identical(name: str, tmp_path: Path) -> None:
    converted = armour(name)
    assert save(converted, tmp_path / "out") == tmp_path / "out"
    again = load(tmp_path / "out")
    assert same(converted, again)
    assert isinstance(again, type(HOSTS[name]()))
    assert not again.training
    assert again.surgery.sites == converted.surgery.sites  # type: ignore[union-attr]
    assert again.surgery.source is not None  # type: ignore[union-attr]
    trained = [name for name, parameter in converted.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in again.named_parameters() if parameter.requires_grad] == trained


@pytest.mark.parametrize("name", ["vit", "eva02", "beit", "hf-vit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_comes_back_bit_identical(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    converted = armour(name).to(dtype)
    save(converted, tmp_path / "out")
    again = load(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert {n: b.dtype for n, b in again.named_buffers()} == {n: b.dtype for n, b in converted.named_buffers()}
    assert same(converted, again)


def test_a_half_precision_model_is_converted_and_comes_back(tmp_path: Path) -> None:
    converted = convert(host("eva02").to(torch.bfloat16))
    save(converted, tmp_path / "out")
    assert same(converted, load(tmp_path / "out"))


FRESH = """
import sys, warnings
warnings.simplefilter("error")
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from armour_surgery import load
for folder in sys.argv[1:]:
    saved = load_file(Path(folder) / "seen" / "io.safetensors")
    with torch.no_grad():
        out = load(folder)(saved["x"])
    out = out if isinstance(out, torch.Tensor) else out[0]
    print(folder, torch.equal(out, saved["out"]), "transformers" in sys.modules)
"""


def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    folders = []
    for name in ("vit", "levit", "hf-vit"):
        converted = armour(name)
        path = save(converted, tmp_path / name)
        x = torch.randn(next(iter(example_input(converted, 3).values())).shape)
        with torch.no_grad():
            out = converted(x)
        (path / "seen").mkdir()
        out = out if isinstance(out, torch.Tensor) else out[0]
        save_file({"x": x, "out": out.contiguous()}, path / "seen" / "io.safetensors")
        folders.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.rpartition("/")[2] for line in done.stdout.splitlines()]
    # timm's models do not wait for transformers to be imported.
    assert lines == ["vit True False", "levit True False", "hf-vit True True"]


def test_changes_after_the_conversion_are_kept(tmp_path: Path) -> None:
    converted = armour()
    converted.reset_classifier(7)  # type: ignore[operator]
    converted.blocks[1].attn.attn_drop.p = 0.3  # type: ignore[union-attr, index]
    converted.blocks[0].mlp.drop1.p = 0.2  # type: ignore[union-attr, index]
    again = load(save(converted, tmp_path / "out"))
    assert same(converted, again)
    assert again.head.out_features == 7  # type: ignore[union-attr]
    assert again.blocks[1].attn.attn_drop.p == 0.3  # type: ignore[union-attr, index]
    assert again.blocks[0].mlp.drop1.p == 0.2  # type: ignore[union-attr, index]
    torch.manual_seed(0)
    wanted = converted.train()(torch.ones(2, 3, 32, 32))
    torch.manual_seed(0)
    assert torch.equal(again.train()(torch.ones(2, 3, 32, 32)), wanted)


def test_a_replaced_head_is_kept(tmp_path: Path) -> None:
    converted = armour()
    converted.head = nn.Linear(48, 9)
    assert same(converted, load(save(converted, tmp_path / "out")))


def test_a_head_that_the_library_cannot_build_is_explained(tmp_path: Path) -> None:
    converted = armour()
    converted.head = nn.Sequential(nn.Linear(48, 9))
    message = refused(FolderError, lambda: save(converted, tmp_path / "out"))
    assert "'head'" in message
    assert "Sequential" in message
    assert list(tmp_path.iterdir()) == []


def test_hf_head_of_another_size_is_kept(tmp_path: Path) -> None:
    converted = armour("hf-vit")
    converted.classifier = nn.Linear(48, 9)
    converted.config.num_labels = 9  # type: ignore[union-attr]
    assert same(converted, load(save(converted, tmp_path / "out")))


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    converted = armour()
    blocks: Any = converted.blocks
    blocks[1].norm1.weight = blocks[0].norm1.weight
    again = load(save(converted, tmp_path / "out"))
    blocks = again.blocks
    assert blocks[1].norm1.weight is blocks[0].norm1.weight
    assert len(list(again.parameters())) == len(list(converted.parameters()))
    assert same(converted, again)


def test_a_host_that_ties_by_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**HF, vocab_size=11)).eval()
    converted = convert(model)
    again = load(save(converted, tmp_path / "out"))
    assert same(converted, again)
    assert len(list(again.parameters())) == len(list(converted.parameters()))


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("vit", "qv", {"include": "blocks.1*"}),
        ("vit", "qk-diag", {}),
        ("vit", "kv", {"exclude": ["blocks.0*"]}),
        ("levit-conv", "grouped-shuffled", {}),
        ("levit", "concat-full", {}),
        ("hf-swin", "kv", {}),
    ],
)
def test_modes_and_parts_of_models_come_back(name: str, mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    converted = convert(host(name), mode, **options)
    assert same(converted, load(save(converted, tmp_path / "out")))


def test_a_loaded_model_is_saved_again(vit: nn.Module, tmp_path: Path) -> None:
    first = save(vit, tmp_path / "first")
    second = save(load(first), tmp_path / "second")
    assert (first / PLAN).read_bytes() == (second / PLAN).read_bytes()
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


def test_a_deep_copy_is_saved(tmp_path: Path) -> None:
    converted = armour()
    assert same(converted, load(save(converted, tmp_path / "out")))


def test_train_mode_is_not_lost_by_saving(tmp_path: Path) -> None:
    converted = armour().train()
    save(converted, tmp_path / "out")
    assert all(module.training for module in converted.modules())


def test_saving_changes_nothing_on_the_model_and_no_random_numbers(vit: nn.Module, tmp_path: Path) -> None:
    before = {key: tensor.clone() for key, tensor in vit.state_dict().items()}
    state, surgery = torch.get_rng_state(), vit.surgery
    load(save(vit, tmp_path / "out"))
    assert torch.equal(torch.get_rng_state(), state)
    assert vit.surgery is surgery
    assert all(torch.equal(tensor, before[key]) for key, tensor in vit.state_dict().items())


# The folder itself


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that nobody may change."""
    model = convert(host(), exclude="blocks.1*")
    return save(model, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def saved_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(armour("hf-vit"), tmp_path_factory.mktemp("saved") / "hf")


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((path / PLAN).read_text())
    change(document)
    (path / PLAN).write_text(json.dumps(document))


def put(document: Any, where: tuple[str | int, ...], value: Any) -> None:
    for step in where[:-1]:
        document = document[step]
    document[where[-1]] = value


def test_what_the_folder_holds(saved: Path) -> None:
    assert sorted(entry.name for entry in saved.iterdir()) == [CARD, WEIGHTS, PLAN]
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


def test_the_model_card_tells_what_was_done(tmp_path: Path) -> None:
    converted = armour("levit")
    surgery: SurgeryPlan = converted.surgery  # type: ignore[assignment]
    assert any("downsampling" in site.reason for site in surgery.refused)
    assert SurgeryPlan.from_dict(json.loads(json.dumps(surgery.to_dict()))) == surgery
    card = (save(converted, tmp_path / "my-levit") / CARD).read_text(encoding="utf-8")
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: armour-surgery" in head
    assert "license: " in head
    assert "# my-levit" in body
    assert "levit_128s" in body
    assert "x `concat-half`" in body
    for number in (surgery.params_before, surgery.params_after, surgery.macs_before, surgery.macs_after):
        assert f"{number:,}" in body
    assert all(f"`{site.fqn}`" in body for site in (*surgery.sites, *surgery.refused))
    assert "downsampling" in body
    assert "needs training" in body
    assert "from armour_surgery import load" in body
    assert 'load("my-levit")' in body
    assert "License of the base model" in body


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
    assert set(os.listdir(broken)) == {CARD, WEIGHTS, PLAN, "train.log"}
    load(broken)


def test_a_parent_that_is_a_file_is_refused(vit: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    message = refused(FolderError, lambda: save(vit, tmp_path / "file" / "out"))
    assert str(tmp_path / "file" / "out") in message
    assert contents(tmp_path) == {"file": b"x"}


# Writes that break off

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
    monkeypatch.setattr(folder, "_rebuildable", lambda model, surgery, arguments: read_plan(saved).source)
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


# What load refuses


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    message = refused(SchemaError, lambda: load(tmp_path / "absent"))
    assert str(tmp_path / "absent") in message


def test_a_folder_without_a_plan(tmp_path: Path) -> None:
    message = refused(SchemaError, lambda: load(tmp_path))
    assert str(tmp_path) in message
    assert PLAN in message


NOT_JSON = {
    "empty": "",
    "text": "hello",
    "cut": '{"schema_version": 1, "tool": "armour-s',
    "list": "[]",
    "null": "null",
    "number": "17",
    "deep": "[" * 100_000,
    "long-number": '{"schema_version": ' + "1" * 5000 + "}",
    "byte-order-mark": "\ufeff{}",
}


@pytest.mark.parametrize("kind", NOT_JSON)
def test_a_plan_that_is_not_json(kind: str, broken: Path) -> None:
    (broken / PLAN).write_text(NOT_JSON[kind], encoding="utf-8")
    message = refused(SchemaError, lambda: load(broken))
    assert str(broken / PLAN) in message
    assert "\n" not in message


def test_a_plan_that_is_binary_or_cut(saved: Path, broken: Path) -> None:
    (broken / PLAN).write_bytes(b"\xff\xfe\x00\x01")
    assert str(broken / PLAN) in refused(SchemaError, lambda: load(broken))
    whole = (saved / PLAN).read_bytes()
    for length in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 3):
        (broken / PLAN).write_bytes(whole[:length])
        assert str(broken / PLAN) in refused(SchemaError, lambda: load(broken))


EDITS: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "other-tool": (("tool",), "scalpel", "not written by armour-surgery"),
    "newer-schema": (("schema_version",), 2, "schema version 2"),
    "text-schema": (("schema_version",), "1", "schema version '1'"),
    "no-schema": (("schema_version",), None, "schema version None"),
    "extra-key": (("hook",), "import os", "hook"),
    "plan-is-text": (("plan",), "qv", "plan"),
    "plan-extra-key": (("plan", "hook"), 1, "hook"),
    "source-is-text": (("plan", "source"), "timm", "plan"),
    "no-source": (("plan", "source"), None, "how to build"),
    "sites-are-text": (("plan", "sites"), "abc", "plan"),
    "site-extra-key": (("plan", "sites", 0, "hook"), 1, "hook"),
    "site-name-is-number": (("plan", "sites", 0, "fqn"), 3, "3"),
    "mode-is-list": (("plan", "sites", 0, "mode"), ["qv"], "qv"),
    "site-gone": (("plan", "sites", 0, "fqn"), "blocks.7.attn", "blocks.7.attn"),
    "site-not-attention": (("plan", "sites", 0, "fqn"), "blocks.0.mlp", "blocks.0.mlp"),
    "mode-that-does-not-fit": (("plan", "sites", 0, "mode"), "concat-half", "concat-half"),
    "mode-unknown": (("plan", "sites", 0, "mode"), "qq", "qq"),
    "example-shape": (("plan", "example", 0, 1), [2, 3, 32, "x"], "plan"),
    "example-negative": (("plan", "example", 0, 1), [2, 3, -32, 32], "-32"),
    "example-type": (("plan", "example", 0, 2), "nn", "nn"),
    "example-overflow": (("plan", "example", 0, 1), [99_999] * 4, "99999"),
    "example-other-size": (("plan", "example", 0, 1), [2, 3, 8, 8], "(2, 3, 8, 8)"),
    "weights-above": (("weights",), "../model.safetensors", "../model.safetensors"),
    "weights-absolute": (("weights",), "/etc/passwd", "/etc/passwd"),
    "weights-below": (("weights",), "sub/model.safetensors", "sub/model.safetensors"),
    "weights-dots": (("weights",), "..", "'..'"),
    "weights-empty": (("weights",), "", "weights"),
    "weights-nul": (("weights",), "a\0b", "a\\x00b"),
    "weights-surrogate": (("weights",), "\ud800", "weights"),
    "weights-long": (("weights",), "a" * 5000, "aaa"),
    "weights-number": (("weights",), 7, "7"),
    "sha-list": (("sha256",), ["a"], "'a'"),
    "tied-list": (("tied",), ["a"], "plan"),
    "buffer-dtype": (("buffer_dtypes",), {"nothing": "float16"}, "nothing"),
    "os-system": (("plan", "source", "library"), "os", "'os'"),
    "os-system-architecture": (("plan", "source", "architecture"), "os.system", "os.system"),
    "architecture-list": (("plan", "source", "architecture"), ["a"], "'a'"),
    "unknown-library": (("plan", "source", "library"), "keras", "'keras'"),
    "other-library": (("plan", "source", "library"), "transformers", "vit_tiny"),
    "hub-download": (("plan", "source", "architecture"), "hf-hub:timm/vit_tiny", "hf-hub:timm/vit_tiny"),
    "local-dir": (("plan", "source", "architecture"), "local-dir:/etc", "local-dir:/etc"),
    "pretrained": (("plan", "source", "arguments", "pretrained"), True, "pretrained"),
    "checkpoint-path": (("plan", "source", "arguments", "checkpoint_path"), "/etc/passwd", "checkpoint_path"),
    "unknown-argument": (("plan", "source", "arguments", "spleen"), 1, "spleen"),
    "arguments-list": (("plan", "source", "arguments"), [1], "[1]"),
    "attribute-private": (("plan", "source", "attributes"), {"blocks.0._modules": 1}, "blocks.0._modules"),
    "attribute-class": (("plan", "source", "attributes"), {"__class__": "x"}, "__class__"),
    "attribute-module-gone": (("plan", "source", "attributes"), {"blocks.9.x": 1}, "blocks.9"),
    "attribute-other-type": (("plan", "source", "attributes"), {"blocks.0.attn.num_heads": "x"}, "num_heads"),
    "attribute-no-heads": (("plan", "source", "attributes"), {"blocks.0.attn.num_heads": 0}, "VisionTransformer"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_plan_is_refused_by_file_and_reason(kind: str, broken: Path) -> None:
    where, value, word = EDITS[kind]
    edit(broken, lambda document: put(document, where, value))
    message = refused(FolderError, lambda: load(broken))
    assert word in message
    assert str(broken) in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    "where",
    [
        ("tool",), ("weights",), ("sha256",), ("tied",), ("buffer_dtypes",), ("versions",), ("plan",),
        ("plan", "sites"), ("plan", "source"), ("plan", "example"), ("plan", "mode"), ("plan", "params_before"),
        ("plan", "sites", 0, "fqn"), ("plan", "sites", 0, "residual"), ("plan", "source", "library"),
        ("plan", "source", "architecture"),
    ],
    ids=lambda where: ".".join(map(str, where)),
)  # fmt: skip
def test_a_plan_that_lacks_a_key_is_refused(where: tuple[str | int, ...], broken: Path) -> None:
    def drop(document: Any) -> None:
        for step in where[:-1]:
            document = document[step]
        del document[where[-1]]

    edit(broken, drop)
    message = refused(SchemaError, lambda: load(broken))
    assert str(broken / PLAN) in message
    if where != ("tool",):
        assert str(where[-1]) in message


WRONG_TYPES: dict[tuple[str | int, ...], Any] = {
    ("plan", "params_before"): "many",
    ("plan", "macs_after"): [1],
    ("plan", "init"): 7,
    ("plan", "refused"): [{"fqn": 5, "reason": None}],
    ("plan", "sites", 0, "params_before"): "many",
    ("plan", "sites", 0, "residual"): "none",
    ("plan", "source", "name"): 5,
    ("plan", "source", "license"): ["mit"],
    ("versions",): "all",
}


@pytest.mark.parametrize("where", WRONG_TYPES, ids=lambda where: ".".join(map(str, where)))
def test_a_wrong_type_is_refused_or_does_no_harm(where: tuple[str | int, ...], broken: Path, tmp_path: Path) -> None:
    """What `load` lets through must not surprise later, when the model is saved again."""
    edit(broken, lambda document: put(document, where, WRONG_TYPES[where]))
    try:
        model = load(broken)
    except SchemaError as error:
        assert str(broken / PLAN) in str(error)  # noqa: PT017
        return
    try:
        load(save(model, tmp_path / "again"))
    except ArmourError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_a_message_stays_one_line_whatever_the_keys_are(broken: Path) -> None:
    edit(broken, lambda document: document["plan"].update({"a\nb": 1}))
    refused(SchemaError, lambda: load(broken))


def test_a_site_that_is_named_twice_is_refused(broken: Path) -> None:
    edit(broken, lambda document: document["plan"]["sites"].append(document["plan"]["sites"][0]))
    assert "blocks.0.attn" in refused(SchemaError, lambda: load(broken))


def test_a_site_that_is_not_named_is_refused(broken: Path) -> None:
    edit(broken, lambda document: document["plan"]["sites"].clear())
    refused(FolderError, lambda: load(broken))


TIES = {
    "same-shape": {"blocks.1.norm1.weight": "blocks.0.norm1.weight"},
    "other-shape": {"head.bias": "head.weight"},
    "itself": {"head.bias": "head.bias"},
    "absent": {"head.bias": "nowhere"},
    "not-a-name": {"nowhere": "head.bias"},
}


@pytest.mark.parametrize("kind", TIES)
def test_ties_that_the_weights_contradict_are_refused(kind: str, broken: Path) -> None:
    """The file holds a tensor of its own for every name, so nothing may be replaced by another."""
    edit(broken, lambda document: document["tied"].update(TIES[kind]))
    message = refused(FolderError, lambda: load(broken))
    assert str(broken) in message
    assert any(name in message for name in (*TIES[kind], *TIES[kind].values()))


def test_a_tie_of_other_shapes_is_refused(broken: Path) -> None:
    tensors = load_file(broken / WEIGHTS)
    del tensors["head.bias"]
    rewrite_weights(broken, tensors, {"head.bias": "head.weight"})
    assert "head.bias" in refused(KeyMismatchError, lambda: load(broken))


@pytest.fixture(scope="module")
def saved_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has something to say about buffers."""
    path = save(armour("eva02").to(torch.bfloat16), tmp_path_factory.mktemp("saved") / "eva02")
    assert json.loads((path / PLAN).read_text())["buffer_dtypes"]
    return path


BUFFER_TYPES = ["nn", "float33", "manual_seed", "int64", ["a"], None]


@pytest.mark.parametrize("dtype", BUFFER_TYPES, ids=map(str, BUFFER_TYPES))
def test_a_buffer_type_that_is_none_is_refused(dtype: Any, saved_half: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved_half, tmp_path / "out"))
    edit(path, lambda document: document["buffer_dtypes"].update(dict.fromkeys(document["buffer_dtypes"], dtype)))
    assert str(path / PLAN) in refused(SchemaError, lambda: load(path))


def test_weights_behind_a_link_out_of_the_folder(saved: Path, broken: Path) -> None:
    (broken / WEIGHTS).unlink()
    (broken / WEIGHTS).symlink_to(saved / WEIGHTS)
    message = refused(SchemaError, lambda: load(broken))
    assert str(broken / PLAN) in message
    assert "outside" in message or "its own folder" in message


def test_weights_behind_a_link_inside_the_folder_are_fine(broken: Path) -> None:
    (broken / WEIGHTS).rename(broken / "blob")
    (broken / WEIGHTS).symlink_to("blob")
    load(broken)


def test_weights_that_are_missing(broken: Path) -> None:
    (broken / WEIGHTS).unlink()
    message = refused(CorruptFileError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert "missing" in message
    (broken / WEIGHTS).mkdir()
    assert str(broken / WEIGHTS) in refused(FolderError, lambda: load(broken))


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0001, 0.01, 0.3, 0.99, "-1"], ids=str)
def test_truncated_weights(share: float | str, broken: Path) -> None:
    whole = (broken / WEIGHTS).read_bytes()
    cut = len(whole) - 1 if share == "-1" else math.ceil(len(whole) * float(share))
    (broken / WEIGHTS).write_bytes(whole[:cut])
    message = refused(CorruptFileError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert "truncated" in message


@pytest.mark.parametrize("place", [0, 9, 200, 0.5, -1])
def test_one_flipped_bit(place: float, broken: Path) -> None:
    content = bytearray((broken / WEIGHTS).read_bytes())
    index = int(len(content) * place) if isinstance(place, float) else place
    content[index] ^= 1
    (broken / WEIGHTS).write_bytes(content)
    assert str(broken / WEIGHTS) in refused(CorruptFileError, lambda: load(broken))


def test_appended_bytes(broken: Path) -> None:
    with (broken / WEIGHTS).open("ab") as stream:
        stream.write(b"\0")
    assert str(broken / WEIGHTS) in refused(CorruptFileError, lambda: load(broken))


def test_a_pickle_in_place_of_the_weights_is_not_opened(broken: Path) -> None:
    torch.save({"head.bias": torch.zeros(5)}, broken / WEIGHTS)
    edit(broken, lambda document: document.update(sha256=folder.digest_of(broken / WEIGHTS)))
    assert str(broken / WEIGHTS) in refused(CorruptFileError, lambda: load(broken))


def rewrite_weights(path: Path, tensors: dict[str, torch.Tensor], tied: dict[str, str] | None = None) -> None:
    """Other weights, with a checksum that says they are right."""
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    edit(path, lambda document: document.update(sha256=folder.digest_of(path / WEIGHTS), tied=tied or {}))


def test_keys_that_are_missing(broken: Path) -> None:
    tensors = load_file(broken / WEIGHTS)
    del tensors["blocks.0.attn.proj.bias"]
    rewrite_weights(broken, tensors)
    message = refused(KeyMismatchError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert "lacks blocks.0.attn.proj.bias" in message


def test_keys_that_are_left_over(broken: Path) -> None:
    rewrite_weights(broken, {**load_file(broken / WEIGHTS), "blocks.0.attn.spleen": torch.zeros(2)})
    message = refused(KeyMismatchError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert "left over blocks.0.attn.spleen" in message


@pytest.mark.parametrize("shape", [(4,), (5, 1), (1, 5), (), (0,)], ids=str)
def test_tensors_of_the_wrong_shape(shape: tuple[int, ...], broken: Path) -> None:
    rewrite_weights(broken, {**load_file(broken / WEIGHTS), "head.bias": torch.zeros(shape)})
    message = refused(KeyMismatchError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert f"head.bias {shape} instead of (5,)" in message


def test_weights_of_another_mode(broken: Path, saved: Path) -> None:
    rewrite_weights(broken, {key: tensor.clone() for key, tensor in host().state_dict().items()})
    message = refused(KeyMismatchError, lambda: load(broken))
    assert "blocks.0.attn.qkv.weight (144, 48) instead of (96, 48)" in message


def test_all_problems_are_told_at_once(broken: Path) -> None:
    tensors = {f"extra.{index}": torch.zeros(1) for index in range(5)}
    rewrite_weights(broken, tensors)
    message = refused(KeyMismatchError, lambda: load(broken))
    assert "lacks" in message
    assert "left over extra.0, extra.1, extra.2 and more" in message
    assert len(message) < 1000


HF_EDITS: dict[str, tuple[str, Any]] = {
    "auto_map": ("auto_map", {"AutoModel": "evil.Model"}),
    "trust_remote_code": ("trust_remote_code", True),
    "quantization": ("quantization_config", {"quant_method": "bitsandbytes"}),
    "attention-kernel": ("_attn_implementation", "kernels-community/evil"),
    "attention-kernel-argument": ("attn_implementation", "kernels-community/evil"),
}


@pytest.mark.parametrize("kind", HF_EDITS)
def test_a_config_that_would_fetch_something_is_refused(kind: str, saved_hf: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved_hf, tmp_path / "model"))
    key, value = HF_EDITS[kind]
    edit(path, lambda document: document["plan"]["source"]["arguments"].update({key: value}))
    message = refused(SchemaError, lambda: load(path))
    assert key in message or str(value) in message


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        (
            "TimmWrapperModel",
            {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": {"checkpoint_path": "FILE"}},
        ),
        ("TimmWrapperModel", {"architecture": "hf-hub:timm/vit_tiny_patch16_224", "num_classes": 5}),
        ("TimmWrapperModel", {"architecture": "local-dir:DIR", "num_classes": 5}),
    ],
    ids=["checkpoint", "hub", "folder"],
)
def test_a_wrapped_timm_model_reads_no_file(
    architecture: str, arguments: dict[str, Any], saved_hf: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(saved_hf, tmp_path / "model"))
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    torch.save({"state_dict": {}}, tmp_path / "weights.pth")
    text = json.dumps(arguments).replace("FILE", str(tmp_path / "weights.pth")).replace("DIR", str(tmp_path))
    change = {"architecture": architecture, "arguments": json.loads(text)}
    edit(path, lambda document: document["plan"]["source"].update(change))
    message = refused(SchemaError, lambda: load(path))
    assert "must not" in message


@pytest.mark.parametrize("architecture", ["PreTrainedModel", "AutoModel", "pipeline", "os", "ViTConfig", "__doc__"])
def test_a_transformers_name_that_is_no_model_is_refused(architecture: str, saved_hf: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved_hf, tmp_path / "model"))
    edit(path, lambda document: document["plan"]["source"].update(architecture=architecture))
    assert architecture in refused(SchemaError, lambda: load(path))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_converted_transformers_folder_is_not_taken_for_a_plain_one(tmp_path: Path) -> None:
    converted = armour("hf-vit")
    converted.save_pretrained(tmp_path)  # type: ignore[operator]
    for auto in (transformers.AutoModelForImageClassification, transformers.AutoModel, transformers.AutoConfig):
        with pytest.raises(ValueError, match="armour_vit"):
            auto.from_pretrained(tmp_path)
    assert armour("hf-vit").config.model_type == "armour_vit"  # type: ignore[union-attr]
    assert host("hf-vit").config.model_type == "vit"  # type: ignore[union-attr]


@pytest.mark.xfail(reason="transformers only warns when a class reads the config of another model type")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_plain_class_does_not_fill_a_converted_folder_with_random_weights(tmp_path: Path) -> None:
    armour("hf-vit").save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(Exception, match="armour"):
        transformers.ViTForImageClassification.from_pretrained(tmp_path)


# Whatever is in the file


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_of(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from paths_of(inner, (*path, index))


# Small numbers only: a plan that asks for a million blocks is a slow plan, not a wrong one.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.sampled_from([10**30, -(10**9), 0.5, -1e300, math.inf, math.nan])
    | st.sampled_from(["", "qv", "kv", "x", "blocks.0.attn", "float16", "int8", "nn", "\ud800", "a\0b", "..", "timm"])
    | st.text(max_size=6)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
NUMBERS_THAT_BUILD = {"depth", "embed_dim", "num_classes", "img_size", "num_hidden_layers", "hidden_size"}


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_no_edit_of_the_plan_raises_anything_but_our_own_errors(
    kind: str, saved: Path, saved_hf: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = saved if kind == "timm" else saved_hf
    original = json.loads((source / PLAN).read_text())
    places = [path for path in paths_of(original) if path[0] != "versions"]
    path = tmp_path_factory.mktemp("edited") / "model"
    shutil.copytree(source, path)

    @settings(
        max_examples=int(os.environ.get("ARMOUR_TEST_EXAMPLES", "40")),
        deadline=None,
        derandomize="ARMOUR_TEST_EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        document = copy.deepcopy(original)
        for _ in range(data.draw(st.integers(1, 2))):
            where = data.draw(st.sampled_from(places))
            what = data.draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "swap"]))
            try:
                if what == "replace":
                    value = data.draw(VALUES)
                    if where[-1] in NUMBERS_THAT_BUILD and value == 10**30:
                        value = 3
                    put(document, where, value)
                elif what == "add":
                    put(document, (*where[:-1], data.draw(st.text(max_size=4))), data.draw(VALUES))
                else:
                    parent = document
                    for step in where[:-1]:
                        parent = parent[step]
                    if what == "drop":
                        del parent[where[-1]]
                    else:
                        other = document
                        for step in data.draw(st.sampled_from(places)):
                            other = other[step]
                        parent[where[-1]] = copy.deepcopy(other)
            except (KeyError, IndexError, TypeError):
                continue
        (path / PLAN).write_text(json.dumps(document))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(path)
        except ArmourError:
            pass

    check()


def test_usage_errors_are_told_from_folders(tmp_path: Path) -> None:
    assert UsageError.exit_code == 2
    assert FolderError.exit_code == 1
