"""Small models of torchvision."""

from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

__all__ = ["swin", "vit"]


def vit() -> nn.Module:
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=64, attention_dropout=0.1
    )


def swin() -> nn.Module:
    return SwinTransformer([4, 4], 40, [2], [4], [4, 4], attention_dropout=0.1, stochastic_depth_prob=0.0)
