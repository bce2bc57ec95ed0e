"""torchvision's attention: `torch.nn.MultiheadAttention`, and a function that fx is told not to look into."""

import pytest
import torch
from oracle import check, randomize
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer


def vit() -> nn.Module:
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=64, attention_dropout=0.1
    )


def swin() -> nn.Module:
    return SwinTransformer([4, 4], 40, [2], [4], [4, 4], attention_dropout=0.1, stochastic_depth_prob=0.0)


@pytest.mark.parametrize("mode", ["qv", "qk", "kv"])
@pytest.mark.parametrize(("build", "size"), [(vit, 32), (swin, 64)])
def test_surgery_changes_nothing_where_the_projections_are_equal(build, size: int, mode: str) -> None:
    torch.manual_seed(0)
    model = randomize(build().double()).eval()
    batches = [{"x": torch.randn(count, 3, size, size, dtype=torch.float64)} for count in (2, 5)]
    assert max(check(model, mode, batches).values()) <= 1e-12
