"""Models that are built in a moment, a user's own among them, and what a surgery or a refusal of one tells."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.levit import Levit
from torch import Tensor, nn

from armour_surgery import ArmourError, SurgeryPlan

__all__ = ["VIT", "Own", "Tied", "attention_caches", "refused", "surgery_of", "tiny_levit", "vit"]

# What `vit` is built with.
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}


def vit(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**VIT, **arguments})
    return model.eval()


class Own(nn.Module):
    """A user's own network around an attention of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 8, 8)
        self.mixer = Attention(48, 4, qkv_bias=True)
        self.head = nn.Linear(48, 5)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixer(self.stem(pictures).flatten(2).mT).mean(1))


def surgery_of(model: nn.Module) -> SurgeryPlan:
    surgery = model.surgery
    assert isinstance(surgery, SurgeryPlan)
    return surgery


def refused(kind: type[ArmourError], action: Callable[[], Any]) -> str:
    """The message with which an action fails: of that class, and one line."""
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def tiny_levit() -> nn.Module:
    sizes = {"embed_dim": (32, 48), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 8}
    return Levit(img_size=32, num_classes=5, stem_type="s8", **sizes)


def attention_caches(model: nn.Module) -> list[dict[str, Tensor]]:
    return [part.attention_bias_cache for part in model.modules() if hasattr(part, "attention_bias_cache")]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embed.weight
        self.embed.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.cache: dict[str, Tensor] = {}
        self.unregistered = [nn.Linear(4, 4)]
        self.label = "mine"

    def forward(self, x: Tensor) -> Tensor:
        if "x" not in self.cache:
            self.cache["x"] = self.embed.weight * self.scale
        return self.head(x @ self.cache["x"])
