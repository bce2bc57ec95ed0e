"""A small ViT and a benchmark of it that is over at once."""

from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from armour_surgery import benchmark

__all__ = ["ARGUMENTS", "MIB", "Spy", "quick", "vit"]

ARGUMENTS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 1,
    "num_heads": 4,
    "num_classes": 6,
}
MIB = 2**20


def vit(**changes: Any) -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**ARGUMENTS, **changes})
    return model.eval()


quick = partial(benchmark, batch_sizes=(3,), rounds=2, budget_s=0.1)


class Spy(nn.Module):
    """Notes what it is called with, and where its weights are; takes `seconds`."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 4)
        self.norm = nn.BatchNorm1d(4)
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        if not image.is_meta:
            place = self.layer.weight.data_ptr()
            self.seen.append((tuple(image.shape), image.dtype, self.training, place, torch.get_num_threads()))
        result: Tensor = self.norm(self.layer(image.mean((1, 2))))
        return result
