"""Attention of users' own, in no library, and what discovery and surgery make of it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracle import randomize
from torch import nn

from armour_surgery.discover import find_sites
from armour_surgery.modes import get_mode
from armour_surgery.rewrite.contract import Part, Surgery, parts_of
from armour_surgery.traced import FoundSite

__all__ = [
    "SHAPE",
    "D",
    "H",
    "Hidden",
    "K",
    "PerHead",
    "Pieces",
    "Plain",
    "ReadsWidth",
    "Shuffles",
    "UsesPacked",
    "Wide",
    "alone",
    "example",
    "model_of",
    "surgery_on",
    "tokens",
    "traced_of",
]

D, H, K = 20, 3, 4  # channels, heads, channels per head


class Hidden(nn.Module):
    """Where a test's attention lives: something before it, something after it, a residual around it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.before = nn.LayerNorm(D)
        self.inner = attention
        self.after = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x + self.inner(self.before(x)))


class PerHead(nn.Module):
    """`[H, q | k | v]`: each head's channels side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(D, H * 3 * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.foo(x).unflatten(-1, (H, 3 * K)).transpose(1, 2).chunk(3, dim=-1)
        return self.bar(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


SHAPE = (2, 6, D)


def alone(kind: Callable[[], nn.Module]) -> nn.Module:
    """An attention with nothing around it, in float64 and eval mode."""
    return randomize(kind()).double().eval()


def tokens(batch: int = 2, count: int = 6) -> torch.Tensor:
    """Tokens [batch, count, D], the same ones every time."""
    generator = torch.Generator().manual_seed(batch + 10 * count)
    return torch.randn(batch, count, D, generator=generator, dtype=torch.float64)


def model_of(kind: type[nn.Module]) -> nn.Module:
    return randomize(Hidden(kind())).double()


def example() -> torch.Tensor:
    return torch.empty(SHAPE, dtype=torch.float64)


class ReadsWidth(nn.Module):
    """Splits by the packed tensor's own width, and keeps a statistic of all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 36)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        width = qkv.shape[-1] // 3
        qkv = qkv.unflatten(-1, (3, 4, width // 4)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        y = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Shuffles(nn.Module):
    """Takes the channels of q, k and v from interleaved places: q0 k0 v0 q1 k1 v1 and so on, backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(20, 36)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(x).unflatten(-1, (12, 3)).unbind(-1)
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class UsesPacked(nn.Module):
    """Adds something made of the whole packed tensor, so no role meets its users at an anchor alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 36)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y) + qkv.square().mean(-1, keepdim=True)


class Pieces(nn.Module):
    """Values put together from two slices of the packed tensor, the later one first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 36)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        q, k, v = qkv[..., :12], qkv[..., 16:28], torch.cat([qkv[..., 28:], qkv[..., 12:16]], -1)
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Plain(nn.Module):
    """Packed `[3, H, d]`, fused."""

    def __init__(self, width: int = 36) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, width)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def traced_of(model: nn.Module, example: dict[str, torch.Tensor] | None = None) -> Any:
    found = find_sites(model, example or {"x": torch.empty(2, 6, 20)})[0]
    assert isinstance(found, FoundSite), found.reason
    return found.traced


def surgery_on(model: nn.Module, mode: str) -> Surgery:
    traced = traced_of(model)
    chosen = get_mode(mode)
    sizes = {letter: getattr(traced, letter).head_dim for letter in "qkv"}
    return Surgery(
        traced=traced,
        mode=chosen,
        graph=traced.trace.graph,
        query=Part("q", 0, sizes["q"]),
        key=parts_of(chosen.key, "k", sizes),
        value=parts_of(chosen.value, "v", sizes),
    )


class Wide(nn.Module):
    """Values twice as wide as keys, a head after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 3 * 16)
        self.out = nn.Linear(24, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 16)).transpose(1, 2).split([4, 4, 8], -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
