"""Attention whose tokens are pooled, padded, overlapping or joined with others on their way from the projections.

As in `written_attentions`; `x` is [B, N, D], and N tokens are a picture of `SIDE` by `SIDE` where that matters.
"""

import torch
import torch.nn.functional as F
from own_attentions import D, H, K
from torch import Tensor, nn
from written_attentions import Packed, join, split

__all__ = ["FOLLOWED", "MIXED", "SIDE", "Interpolated", "OverlappingWindows"]

SIDE = 4
I = H * K  # noqa: E741 - the inner width


def picture(tensor: Tensor) -> Tensor:
    """[B, N, C] to [B, C, SIDE, SIDE]."""
    return tensor.transpose(1, 2).unflatten(2, (SIDE, -1))


def tokens_of(tensor: Tensor) -> Tensor:
    return tensor.flatten(2).transpose(1, 2)


class Three(nn.Module):
    """A projection each, with channels only; `attend` takes them as [B, N, H * K]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, I) for _ in range(3))
        self.out = nn.Linear(I, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.out(join(F.scaled_dot_product_attention(*map(split, (q, k, v)))))


class MaxPooledQueries(Packed):
    """As in SAM2's Hiera."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = map(split, (tokens_of(self.pool(picture(q))), k, v))
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class PoolsWithNorms(nn.Module):
    """As in MViTv2: each role has a strided depthwise convolution, for each head the same, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * I)
        self.out = nn.Linear(I, D)
        self.pools = nn.ModuleList([nn.Conv2d(K, K, 3, stride, 1, groups=K) for stride in (1, 2, 2)])
        self.norms = nn.ModuleList([nn.LayerNorm(K) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for part, pool, norm in zip(self.qkv(x).chunk(3, -1), self.pools, self.norms, strict=True):
            pictures = split(part).flatten(0, 1).transpose(1, 2).unflatten(2, (SIDE, -1))
            parts.append(norm(tokens_of(pool(pictures))).unflatten(0, (-1, H)))
        return self.out(join(F.scaled_dot_product_attention(*parts)))


class PooledByPadding(Three):
    """Where the padding counts, tokens at the border are smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (tokens_of(self.pool(picture(part))) for part in (self.k(x), self.v(x)))
        return self.attend(self.q(x), k, v)


class AdaptivelyPooled(Three):
    def forward(self, x: Tensor) -> Tensor:
        k, v = (tokens_of(F.adaptive_avg_pool2d(picture(part), (2, 3))) for part in (self.k(x), self.v(x)))
        return self.attend(self.q(x), k, v)


class Interpolated(Three):
    def forward(self, x: Tensor) -> Tensor:
        small = (F.interpolate(picture(part), scale_factor=0.5, mode="bilinear") for part in (self.k(x), self.v(x)))
        return self.attend(self.q(x), *map(tokens_of, small))


class TokensMixed(Three):
    """As in Linformer: learned mixtures of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mixtures = nn.Parameter(torch.randn(5, SIDE * SIDE))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.q(x), self.mixtures @ self.k(x), self.mixtures @ self.v(x))


class LearnedTokens(Three):
    """Keys and values that nothing is projected to come before the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first_keys, self.first_values = (nn.Parameter(torch.randn(1, 2, I)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        k, v = ([first.expand(len(x), -1, -1), part] for first, part in
                ((self.first_keys, self.k(x)), (self.first_values, self.v(x))))  # fmt: skip
        return self.attend(self.q(x), torch.cat(k, 1), torch.cat(v, 1))


class OverlappingWindows(nn.Module):
    """As in HaloNet: windows of queries, and around each of them more keys, some of them padding."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Conv2d(D, I, 1)
        self.kv = nn.Conv2d(D, 2 * I, 1)
        self.out = nn.Linear(I, D)

    def forward(self, x: Tensor) -> Tensor:
        batch, pictures = len(x), picture(x)
        q = self.q(pictures).unfold(2, 2, 2).unfold(3, 2, 2)  # [B, C, rows, columns, 2, 2]
        kv = F.pad(self.kv(pictures), (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)
        q, kv = (part.unflatten(1, (H, -1)).flatten(5).flatten(3, 4).permute(0, 1, 3, 4, 2) for part in (q, kv))
        k, v = kv.split(K, -1)
        found = (q @ k.mT).softmax(-1) @ v  # [B, H, windows, 4, K]
        rows = found.unflatten(2, (2, -1)).unflatten(4, (2, 2)).permute(0, 2, 4, 3, 5, 1, 6)
        return self.out(rows.reshape(batch, -1, I))


class WidenedKeys(Three):
    """Several channels in one: no number of K is a channel any more."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = (F.avg_pool1d(part, 2) for part in (self.q(x), self.k(x)))
        q, k = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in (q, k))
        return self.out(join(F.scaled_dot_product_attention(q, k, split(self.v(x)))))


ALL_THREE = ("qv", "qk", "kv")
# Which modes fit, and whether `qk-diag` does.
FOLLOWED: dict[type[nn.Module], tuple[str, ...]] = {
    MaxPooledQueries: ALL_THREE,
    PoolsWithNorms: ALL_THREE,
    PooledByPadding: ALL_THREE,
    AdaptivelyPooled: ALL_THREE,
    Interpolated: ALL_THREE,
    TokensMixed: ALL_THREE,
    LearnedTokens: ALL_THREE,
    OverlappingWindows: ALL_THREE,
}
MIXED: dict[type[nn.Module], str] = {
    WidenedKeys: "no Linear or convolution was found behind its queries",
}
