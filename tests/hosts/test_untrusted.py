"""No argument of a folder reads a file, fetches or runs anything, however deep it stands."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from named_hosts import SMALL, TINY
from small_models import refused
from torch import nn

from armour_surgery.errors import SchemaError
from armour_surgery.hosts import build
from armour_surgery.hosts.untrusted import entries, refuse_reaching
from armour_surgery.records import Source

CNN = "test_resnet.r160_in1k"


def wrapped(**model_args: Any) -> dict[str, Any]:
    return {"model_type": "timm_wrapper", "architecture": CNN.partition(".")[0], "model_args": model_args}


def backbone(name: str, **more: Any) -> dict[str, Any]:
    return {"model_type": "timm_backbone", "backbone": name, **more}


TEXT = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
NESTED = {
    "llava": ("LlavaModel", {"vision_config": wrapped(checkpoint_path="FILE"), "text_config": TEXT}, "checkpoint_path"),
    "encoder-decoder": (
        "VisionEncoderDecoderModel",
        {"encoder": wrapped(checkpoint_path="FILE"), "decoder": TEXT},
        "checkpoint_path",
    ),
    "backbone": ("TimmBackbone", backbone("local-dir:FOLDER"), "local-dir:FOLDER"),
    "backbone-hub": ("TimmBackbone", backbone("hf-hub:timm/evil"), "hf-hub:timm/evil"),
    "detr": ("DetrModel", {"backbone_config": backbone("local-dir:FOLDER")}, "local-dir:FOLDER"),
    "detr-kwargs": (
        "DetrModel",
        {"backbone": "resnet18", "backbone_kwargs": {"pretrained_cfg": {"file": "FILE"}}},
        "pretrained_cfg",
    ),
    "in-a-list": ("ViTModel", {"more": [{"even": [wrapped(pretrained_cfg_overlay={"file": "FILE"})]}]}, "overlay"),
    "windows-path": ("DetrModel", {"backbone_config": backbone("C\\evil")}, "C\\\\evil"),
    "cache": ("LlavaModel", {"vision_config": wrapped(cache_dir="FOLDER"), "text_config": TEXT}, "cache_dir"),
    "pretrained-backbone": ("DetrModel", {"inner": {"use_pretrained_backbone": True}}, "use_pretrained_backbone"),
    "code": ("ViTModel", {"inner": [{"auto_map": {"AutoModel": "evil.Model"}}]}, "auto_map"),
    "pipelines": ("ViTModel", {"custom_pipelines": {"a": {"impl": "evil.Pipeline"}}}, "custom_pipelines"),
    "trust": ("ViTModel", {"inner": {"trust_remote_code": True}}, "trust_remote_code"),
    "quantization": ("ViTModel", {"inner": {"quantization_config": {"quant_method": "x"}}}, "quantization_config"),
    "origin": ("ViTModel", {"inner": {"_name_or_path": "FOLDER"}}, "_name_or_path"),
    "attention": ("CLIPModel", {"vision_config": {**SMALL, "_attn_implementation": "evil/kernel"}}, "evil/kernel"),
    "attention-of-a-part": (
        "CLIPModel",
        {"_attn_implementation": {"": "eager", "text_config": {"": "evil/kernel"}}},
        "evil/kernel",
    ),
}


@pytest.mark.parametrize("kind", NESTED)
def test_what_reaches_out_of_a_config_is_refused_at_every_depth(kind: str) -> None:
    architecture, arguments, word = NESTED[kind]
    message = refused(SchemaError, lambda: build(Source("transformers", architecture, arguments)))
    assert word in message
    assert architecture in message
    assert "must not" in message or "known: eager" in message


def test_no_file_is_opened_for_a_nested_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What timm is asked to read, by its own reader of checkpoints."""
    asked: list[str] = []
    monkeypatch.setattr("timm.models._factory.load_checkpoint", lambda model, path, **_: asked.append(str(path)))
    nested = wrapped(checkpoint_path=str(tmp_path / "evil.pth"))
    refused(
        SchemaError,
        lambda: build(Source("transformers", "LlavaModel", {"vision_config": nested, "text_config": TEXT})),
    )
    assert asked == []


@pytest.mark.parametrize(("library", "architecture"), [("timm", TINY), ("torchvision", "vit_b_16")])
def test_arguments_of_the_other_libraries_are_looked_through_as_well(library: str, architecture: str) -> None:
    arguments = {"options": [{"checkpoint_path": "evil.pth"}]}
    assert "'checkpoint_path'" in refused(SchemaError, lambda: build(Source(library, architecture, arguments)))


def test_what_reaches_nothing_is_built() -> None:
    """A wrapped timm model keeps what it says about its weights, and sizes whose names sound alike."""
    window = {"pretrained_window_sizes": [4, 4], "pretrained_cfg": None}
    refuse_reaching("TimmWrapperModel", {**wrapped(**window), "pretrained_cfg": {"url": "https://x", "file": None}})
    refuse_reaching("DetrModel", {"use_pretrained_backbone": False, "backbone": "resnet50", "_name_or_path": ""})
    arguments = {"architecture": TINY, "num_classes": 5, "model_args": {"depth": 1}, "pretrained_cfg": {"tag": "x"}}
    model = build(Source("transformers", "TimmWrapperForImageClassification", arguments))
    assert isinstance(model, transformers.TimmWrapperForImageClassification)


def test_entries_are_found_at_any_depth_without_recursion() -> None:
    deep: Any = {"a": 1}
    for _ in range(20_000):
        deep = [deep]
    assert ("a", 1) in list(entries({"outer": deep}))


def test_timm_still_takes_a_checkpoint_where_a_user_names_one(tmp_path: Path) -> None:
    """The refusal is of folders; this is what it keeps from happening."""
    whole: nn.Module = timm.create_model(TINY, depth=1)
    torch.save(whole.state_dict(), tmp_path / "mine.pth")
    again = timm.create_model(TINY, depth=1, checkpoint_path=str(tmp_path / "mine.pth"))
    assert torch.equal(again.head.weight, whole.head.weight)
