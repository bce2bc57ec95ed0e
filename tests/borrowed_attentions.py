"""Attention in the manner of libraries that this suite does not install, one for each kind of thing they do.

All take `x` [B, N, D] and have the names of `written_attentions`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from own_attentions import D, H, K
from torch import Tensor, einsum, nn
from written_attentions import ALL_THREE, N, Packed, join

__all__ = ["BORROWED", "PadsLogits"]

I = H * K  # noqa: E741 - the inner width


class MixesHeads(Packed):
    """Logits, and weights, of all heads are mixed by a matrix (CaiT, DeepViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.randn(H, H))
        self.after = nn.Parameter(torch.randn(H, H))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=H) for part in self.qkv(x).chunk(3, -1))
        logits = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        logits = einsum("b h i j, h g -> b g i j", logits, self.before)
        weights = self.drop(logits.softmax(-1))
        weights = einsum("b h i j, h g -> b g i j", weights, self.after)
        return self.out(rearrange(einsum("b h i j, b h j d -> b h i d", weights, v), "b h n d -> b n (h d)"))


class MixesWeights(Packed):
    """Mixed behind the softmax alone, and normalized (DeepViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(H, H))
        self.norm = nn.LayerNorm(H)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (einsum("b h i d, b h j d -> b h i j", q, k) * self.scale).softmax(-1)
        weights = einsum("b h i j, h g -> b g i j", weights, self.mix)
        weights = self.norm(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out(join(einsum("b h i j, b h j d -> b h i d", weights, v)))


class PositionsBeside(Packed):
    """Queries meet a table of positions in a product of their own (segment-anything, ViTDet)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(2 * N - 1, K))

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        q, k, v = (part.flatten(0, 1) for part in self.heads(x))
        places = torch.arange(count)
        table = self.rows[places[:, None] - places[None, :] + count - 1]
        logits = (q * self.scale) @ k.transpose(-2, -1)
        logits = logits.view(-1, count, count) + torch.einsum("bic,ijc->bij", q, table)
        return self.out(join((logits.softmax(-1) @ v).view(-1, H, count, K)))


class OneHeadOfKeys(nn.Module):
    """Keys and values have no axis of heads at all."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, I), nn.Linear(D, K), nn.Linear(D, K)
        self.out = nn.Linear(I, D)

    def forward(self, x: Tensor) -> Tensor:
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=H)
        weights = (einsum("b h i d, b j d -> b h i j", q, self.k(x)) * 0.5).softmax(-1)
        return self.out(join(einsum("b h i j, b j d -> b h i d", weights, self.v(x))))


class EinsumOfList(Packed):
    """Operands of einsum in one list (CvT), the softmax and its dropout in an nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.Sequential(nn.Softmax(dim=-1), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=H) for part in self.qkv(x).chunk(3, -1))
        logits = einsum("bhlk,bhtk->bhlt", [q, k]) * self.scale
        found = einsum("bhlt,bhtv->bhlv", [self.attend(logits), v])
        return self.out(rearrange(found, "b h n d -> b n (h d)"))


class MaskedBias(nn.Linear):
    """The bias of keys is masked at every call (DINOv3)."""

    def __init__(self) -> None:
        super().__init__(D, 3 * I)
        mask = torch.ones(3 * I)
        mask[I : 2 * I] = 0
        self.register_buffer("bias_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class EditedBias(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = MaskedBias()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class ZeroedBias(Packed):
    """A part of a copy of the bias is written to (SwinV2 of torchvision)."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        q, k, v = (
            part.unflatten(-1, (H, K)).transpose(1, 2) for part in F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        )
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class JoinedBiases(nn.Module):
    """Biases of three layers are joined, and taken apart again where they are added (CLIP's attention pool)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, I) for _ in range(3))
        self.out = nn.Linear(I, D)

    def forward(self, x: Tensor) -> Tensor:
        biases = torch.cat([self.q.bias, self.k.bias, self.v.bias]).chunk(3)
        layers = (self.q, self.k, self.v)
        q, k, v = (F.linear(x, layer.weight, bias) for layer, bias in zip(layers, biases, strict=True))
        q, k, v = (part.unflatten(-1, (H, K)).transpose(1, 2) for part in (q, k, v))
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class SoftmaxInSequence(Packed):
    """The softmax is in an nn.Sequential (MaxViT of vit-pytorch)."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.Sequential(nn.Softmax(dim=-1), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.out(join(self.attend(q @ k.mT * self.scale) @ v))


class PadsLogits(Packed):
    """What is added to the logits is padded for two tokens that it knows nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=H) for part in self.qkv(x).chunk(3, -1))
        gate = F.pad((q @ k[:, :, 2:].mT).sigmoid(), (2, 0), value=1.0)
        weights = (q @ k.mT * self.scale + gate.log()).softmax(-1)
        return self.out(rearrange(weights @ v, "b h n d -> b n (h d)"))


@dataclass
class Seen:
    weights: Tensor
    values: tuple[Tensor, Tensor] | None = None


class Pair(NamedTuple):
    found: Tensor
    keys: Tensor


class Gives(Packed):
    """What it gives is an object of the library's own (x-transformers)."""

    def forward(self, x: Tensor) -> tuple[Pair, Seen]:
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=H) for part in self.qkv(x).chunk(3, -1))
        weights = (q @ k.mT * self.scale).softmax(-1)
        found = rearrange(weights @ v, "b h n d -> b n (h d)")
        return Pair(self.out(found), k), Seen(weights, values=(q, k))


class ReturnsObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Gives()

    def forward(self, x: Tensor) -> Tensor:
        pair, seen = self.attn(x)
        assert seen.values is not None
        return pair.found + seen.weights.mean() + seen.values[0].mean()


class AsksAutocast(Packed):
    """Rotations are kept out of autocast, which knows nothing of devices without numbers."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=H) for part in self.qkv(x).chunk(3, -1))
        with torch.autocast(x.device.type, enabled=False):
            q = q * 2
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


# Those that stand for a kind of attention, and the modes that fit.
BORROWED: dict[Callable[[], nn.Module], tuple[str, ...]] = {
    MixesHeads: ALL_THREE,
    MixesWeights: ALL_THREE,
    PositionsBeside: ALL_THREE,
    OneHeadOfKeys: ("kv",),
    EinsumOfList: ALL_THREE,
    EditedBias: ALL_THREE,
    ZeroedBias: ALL_THREE,
    JoinedBiases: ALL_THREE,
    SoftmaxInSequence: ALL_THREE,
    PadsLogits: ALL_THREE,
    ReturnsObject: ALL_THREE,
    AsksAutocast: ALL_THREE,
}
