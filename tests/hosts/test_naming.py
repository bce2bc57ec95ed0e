"""A name is a model, a folder or one line that says what was meant; no hub is needed to say it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import transformers
from named_hosts import SMALL, TINY, swin, tiny
from safetensors.torch import save_file
from torch import nn

from armour_surgery.errors import (
    ArmourError,
    CheckpointError,
    HubUnreachableError,
    ModelError,
    UnknownModelError,
    UsageError,
)
from armour_surgery.hosts import build, describe, hub, library_of, load_model, suggest


def test_library_and_suggestions() -> None:
    assert library_of(tiny()) == "timm"
    assert library_of(swin()) == "transformers"
    assert library_of(torchvision.models.get_model("squeezenet1_0")) == "torchvision"
    assert library_of(nn.Linear(1, 1)) is None
    assert suggest("deit_tiny_patch16_24")[0] == TINY
    assert suggest("vit_b_16") == ["torchvision:vit_b_16"]
    assert suggest("org/name") == []


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "deit_tiny_patch16_24",
            {},
            UnknownModelError,
            f"no model 'deit_tiny_patch16_24'; did you mean {TINY} or",
        ),
        (f"{TINY}.foo", {}, UnknownModelError, "no weights tagged 'foo'; known tags: fb_in1k"),
        ("vit_b_16", {}, UnknownModelError, "did you mean torchvision:vit_b_16"),
        ("torchvision:vit_b16", {}, UnknownModelError, "did you mean torchvision:vit_b_16"),
        ("vit_small_patch16_18x2_224", {}, ModelError, "no pretrained weights.*--no-pretrained"),
        ("foo:bar", {}, UnknownModelError, "unknown prefix 'foo'"),
        ("hf:", {}, UsageError, "ends at its prefix"),
        (" ", {}, UsageError, "MODEL is empty"),
        ("./nope", {}, UnknownModelError, "no such folder"),
        ("a/b/c", {}, UnknownModelError, "no such folder"),
        ("google/vit", {}, ModelError, "write hf:google/vit for transformers or hf-hub:google/vit"),
        ("local-dir:/nope", {}, UnknownModelError, "the folder does not exist"),
        ("hf:/nope", {}, UnknownModelError, "the folder does not exist"),
        ("hf:vit", {}, ModelError, "is a transformers model type.*--no-pretrained"),
        (sys.executable, {}, UnknownModelError, "is a file.*--checkpoint"),
        (TINY, {"img_size": 0}, UsageError, "img_size must be 1 or more, not 0"),
        (TINY, {"num_classes": -1}, UsageError, r"num_classes must be 0 \(no head\) or more"),
        ("resnet18", {"img_size": 64, "pretrained": False}, UsageError, "resnet18 takes no img_size"),
        ("torchvision:squeezenet1_0", {"img_size": 64, "pretrained": False}, UsageError, "takes no img_size"),
        ("torchvision:swin_t", {"in_chans": 1, "pretrained": False}, UsageError, "takes no in_chans"),
        ("hf:bert", {"in_chans": 1, "pretrained": False}, UsageError, "hf:bert takes no in_chans"),
        ("hf:bert", {"num_classes": 2, "pretrained": False}, UsageError, "no image classifier"),
        (TINY, {"checkpoint": "/nope.pth"}, CheckpointError, "does not exist"),
        (TINY, {"checkpoint": "/"}, CheckpointError, "is a folder.*local-dir:/"),
        (TINY, {"checkpoint": __file__}, CheckpointError, r"ending '\.py'"),
    ],
)
def test_names_and_sizes_that_are_wrong(
    name: str, options: dict[str, Any], error: type[ArmourError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)


def test_no_hub_is_one_line_and_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    for name in (TINY, "hf-hub:timm/nope", "hf:org/nope", "torchvision:squeezenet1_0"):
        with pytest.raises(
            HubUnreachableError, match=r"--no-pretrained.*--checkpoint FILE.*local-dir:DIR / hf:DIR"
        ) as caught:
            load_model(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE
    assert capfd.readouterr().err == ""


def test_quiet_does_not_swallow_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), hub.quiet(), hub.offline():
        raise KeyboardInterrupt


def test_folders_of_timm_and_transformers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=5)).eval()
    folder = tmp_path / "vit"
    model.save_pretrained(folder)
    capfd.readouterr()
    loaded, source = load_model(f"hf:{folder}")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert describe(loaded).arguments == source.arguments
    assert source.name == f"hf:{folder}"
    assert load_model(str(folder))[1].library == "transformers"
    again, _ = load_model(f"hf:{folder}", checkpoint=folder / "model.safetensors")
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    fresh, fresh_source = load_model(f"hf:{folder}", num_classes=3)
    assert build(fresh_source).classifier.out_features == fresh.classifier.out_features == 3
    assert load_model(f"hf:{folder}", img_size=64, pretrained=False)[0].config.image_size == 64
    with pytest.raises(CheckpointError, match=r"head for 5 classes: pass --num-classes"):
        load_model(f"hf:{folder}", num_classes=3, checkpoint=folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(f"hf:{folder}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnknownModelError, match=r"no model\.safetensors .*--no-pretrained"):
        load_model(f"hf:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(UnknownModelError, match=r"folder has no config\.json"):
        load_model(f"hf:{folder}")
    with pytest.raises(UnknownModelError, match=r"without surgery\.json"):
        load_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_model(str(folder))
    assert capfd.readouterr().err == ""


def test_timm_folder(tmp_path: Path) -> None:
    model = tiny()
    config = {
        "architecture": TINY,
        "num_classes": 5,
        "model_args": {"depth": 1},
        "pretrained_cfg": {**model.pretrained_cfg, "mean": [0.1, 0.2, 0.3], "num_classes": 5},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        loaded, source = load_model(name)
        assert torch.equal(loaded.head.weight, model.head.weight)
        rebuilt = build(source)
        assert list(rebuilt.pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
        rebuilt.load_state_dict(loaded.state_dict(), strict=True, assign=True)


def test_a_model_type_builds_offline() -> None:
    model, source = load_model("hf:mobilevit", pretrained=False, num_classes=4)
    assert (type(model).__name__, source.architecture) == ("MobileViTForImageClassification",) * 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert replace(describe(model), name="hf:mobilevit", options={"num_classes": 4}) == source
