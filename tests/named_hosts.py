"""Small models of timm and transformers that the libraries know by name."""

from typing import Any

import timm
import transformers
from torch import nn

__all__ = ["SMALL", "TINY", "swin", "tiny"]

TINY = "deit_tiny_patch16_224"
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
}


def tiny(**arguments: Any) -> nn.Module:
    return timm.create_model(TINY, **{"depth": 1, "num_classes": 5, **arguments})


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinModel(config)
