"""A transformers folder loads as the model that it is, or says which of its tensors do not fit its config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from armour_surgery.errors import CheckpointError
from armour_surgery.hosts import load_model

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 36,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**SIZES)).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def configure(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **entries}), encoding="utf-8")


def add(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"qkv_bias": False}, r"left over \S*bias"),
        ({"num_hidden_layers": 1}, r"left over \S*layer\S*1\."),
        ({"num_hidden_layers": 3}, r"missing \S*layer\S*2\."),
    ],
    ids=["a bias too many", "a layer too many", "a layer too few"],
)
def test_weights_of_another_config_are_refused(folder: Path, entries: dict[str, object], named: str) -> None:
    configure(folder, **entries)
    with pytest.raises(CheckpointError, match=named):
        load_model(f"hf:{folder}")


def test_adapters_are_refused(folder: Path) -> None:
    model, _ = load_model(f"hf:{folder}")
    adapted = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    assert adapted.startswith("vit.")
    add(folder, **{f"{adapted}.lora_A.weight": torch.zeros(2, 24)})
    with pytest.raises(CheckpointError, match=r"left over \S*lora_A\.weight"):
        load_model(f"hf:{folder}")


def test_heads_and_tokens_that_play_no_part_are_passed_over(folder: Path) -> None:
    before, _ = load_model(f"hf:{folder}")
    extra = {"decoder.0.weight": torch.zeros(3, 24), "vit.embeddings.mask_token": torch.zeros(1, 1, 24)}
    add(folder, **extra)
    after, _ = load_model(f"hf:{folder}")
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(after(image).logits, before(image).logits)
