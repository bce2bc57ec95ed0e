"""Models to name on a command line, and a fresh folder to work in."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models import save_for_hf

ARGUMENTS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models of timm (`tiny`) and transformers (`hf`), and checkpoint files."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)
    save_for_hf(model, str(root / "tiny"), model_args=ARGUMENTS, safe_serialization=True)
    levit = {
        "img_size": 64,
        "embed_dim": (24, 36),
        "key_dim": 8,
        "depth": (1, 1),
        "num_heads": (3, 5),
        "attn_ratio": 2.0,
    }
    save_for_hf(
        timm.create_model("levit_128s", **levit), str(root / "levit"), model_args=levit, safe_serialization=True
    )
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(root / "hf")
    weights = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    save_file(weights, root / "weights.safetensors")
    torch.save({"model": weights, "epoch": 3}, root / "weights.pth")
    save_file({**weights, "head.weight": torch.zeros(7, 48), "head.bias": torch.zeros(7)}, root / "seven.safetensors")
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder to work in, as a user's shell is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARMOUR_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def tiny(models: Path, here: Path) -> str:
    (here / "tiny").symlink_to(models / "tiny")
    return "local-dir:tiny"
