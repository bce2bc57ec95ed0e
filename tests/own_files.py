"""A user's own model, in files of their own: what `FILE.py:CALLABLE` names."""

from pathlib import Path

__all__ = ["EXAMPLE", "write_vit"]

EXAMPLE = ("--example", "1,3,16,24")

_LAYERS = """
from torch import nn

class Mlp(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
"""

_VIT = """
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from {dot}layers import Mlp


@dataclass
class Config:
    width: int = 20
    heads: int = 2
    depth: int = {depth}


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MyViT(nn.Module):
    def __init__(self, classes=3, config=Config()):
        super().__init__()
        self.embed = nn.Conv2d(3, config.width, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.depth))
        self.mixers = nn.ModuleList(Attention(config.width, config.heads) for _ in range(config.depth))
        self.mlp = Mlp(config.width)
        self.head = nn.Linear(config.width, classes)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        for norm, mixer in zip(self.norms, self.mixers):
            x = x + mixer(norm(x))
        return self.head(self.mlp(x).mean(1))


class Chatty(MyViT):
    def forward(self, images):
        print("a user's own words")
        return super().forward(images)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = MyViT()
        self.words = nn.Embedding(7, 3)

    def forward(self, pictures, ids):
        return self.model.vision_tower(pictures) + self.words(ids).mean(1)


class Sizes:
    image = MyViT


def trained():
    print("loading")
    torch.manual_seed(0)
    return MyViT()


def needs(width, *, depth):
    return MyViT()


def nothing():
    pass


def breaks():
    raise ValueError("no such width")


model = MyViT()
"""


def write_vit(folder: Path, *, depth: int = 2, dot: str = "", width: str = "2 * width") -> Path:
    """`vit.py` and the `layers.py` that it imports, in a folder; `width` is its MLP's."""
    folder.mkdir(exist_ok=True)
    (folder / "layers.py").write_text(_LAYERS.replace("2 * width", width), encoding="utf-8")
    (folder / "vit.py").write_text(_VIT.format(dot=dot, depth=depth), encoding="utf-8")
    return folder / "vit.py"
