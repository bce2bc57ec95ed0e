"""Attention as engineers write it: with einops, masks, sizes and weights of their own, in no library.

All have D channels in and out, H heads of K channels, and take `x` [B, N, D]; `N` tokens are what conversions see.
"""

import math

import einops
import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from own_attentions import D, H, K
from torch import Tensor, nn

__all__ = ["CONVERTED", "REFUSED", "N", "Packed", "join"]

N = 6
I = H * K  # noqa: E741 - the inner width


def split(tensor: Tensor) -> Tensor:
    """[B, N, H * K] to [B, H, N, K]."""
    return tensor.unflatten(-1, (H, K)).transpose(1, 2)


def join(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(2)


class Packed(nn.Module):
    """What most have: one projection for all three, and one behind the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * I)
        self.out = nn.Linear(I, D)
        self.scale = K**-0.5

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(split, self.qkv(x).chunk(3, -1)))


class EinopsFunctions(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=H) for part in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        return self.out(rearrange(weights @ v, "b h n d -> b n (h d)"))


class EinopsPacked(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=H)
        weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(self.scale).softmax(-1)
        return self.out(rearrange(torch.einsum("bhij,bhjd->bhid", weights, v), "b h n d -> b n (h d)"))


class EinopsLayers(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.split = Rearrange("b n (qkv h d) -> qkv b h n d", qkv=3, h=H)
        self.join = Rearrange("b h n d -> b n (h d)")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(x)).unbind(0)
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v)))


class EinopsEinsum(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=H)
        weights = einops.einsum(q, k, "b h i d, b h j d -> b h i j").mul(self.scale).softmax(-1)
        return self.out(rearrange(einops.einsum(weights, v, "b h i j, b h j d -> b h i d"), "b h n d -> b n (h d)"))


class EllipsisEinsum(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, K)).unbind(-3)
        weights = torch.einsum("...ihd,...jhd->...hij", q * self.scale, k).softmax(-1)
        return self.out(torch.einsum("...hij,...jhd->...ihd", weights, v).flatten(-2))


class LowestNumber(Packed):
    """A mask made of the lowest number of whatever type the weights have."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = q @ k.mT * self.scale
        earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return self.out(join(weights.masked_fill(~earlier, torch.finfo(weights.dtype).min).softmax(-1) @ v))


class ChoosesBySize(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        side = int(math.sqrt(x.shape[1] - 2))
        factor = 2.0 if side * side == x.shape[1] - 2 else 0.5
        return self.out(join(F.scaled_dot_product_attention(q * factor, k, v)))


class TupleOfSizes(Packed):
    def forward(self, x: Tensor, size: tuple[int, int] = (2, 3)) -> Tensor:
        height, width = size
        q, k, v = self.heads(x.view(-1, height * width, D))
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class ComplexRotation(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.rand(N, K // 2), persistent=False)

    def rotated(self, tensor: Tensor) -> Tensor:
        pairs = torch.view_as_complex(tensor.reshape(*tensor.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(self.angles), self.angles)).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.out(join(F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)))


class Registers(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(1, 2, D))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.registers.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.heads(x)
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))[:, 2:]


class Windows(Packed):
    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        windows = torch.roll(x, 1, 1).reshape(batch * (count // 3), 3, D)
        q, k, v = self.heads(windows)
        attended = self.out(join(F.scaled_dot_product_attention(q, k, v)))
        return torch.roll(attended.reshape(batch, count, D), -1, 1)


class PooledQueries(Packed):
    """As in Hiera: two neighbors ask together."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q = q.unflatten(2, (2, -1)).amax(2)
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class Casts(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.out(join(F.scaled_dot_product_attention(q.double().type_as(v), k.double().type_as(v), v)))


class CastsApart(nn.Module):
    """As in Sapiens 2: queries are cast to the type of values, which are another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, H * K) for _ in range(3))
        self.out = nn.Linear(H * K, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        return self.out(join(F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v)))


class OwnLayer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class OwnLinear(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = OwnLayer(D, 3 * I)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class LayerMadeInForward(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.out(join(nn.Softmax(dim=-1)(q @ k.mT * self.scale) @ v))


class SharedKeys(nn.Module):
    """Four heads of Q share two of K and V."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(D, 4 * K)
        self.kv = nn.Linear(D, 2 * 2 * K)
        self.out = nn.Linear(4 * K, D)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        q, *kv = self.q(x), *self.kv(x).chunk(2, -1)
        return tuple(tensor.unflatten(-1, (-1, K)).transpose(1, 2) for tensor in (q, *kv))


class SharedKeysRepeated(SharedKeys):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class SharedKeysExpanded(SharedKeys):
    def forward(self, x: Tensor) -> Tensor:
        q, *kv = self.heads(x)
        k, v = (tensor[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for tensor in kv)
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class SharedKeysFused(SharedKeys):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.out(join(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


class CrossAttention(nn.Module):
    """Separate projections, named as in many repositories; without `context` the tokens ask each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.to_q = nn.Linear(D, I, bias=False)
        self.to_kv = nn.Linear(D, 2 * I, bias=False)
        self.to_out = nn.Sequential(nn.Linear(I, D), nn.Dropout(0.1))
        self.attend = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        context = context if context is not None else x
        parts = (self.to_q(x), *self.to_kv(context).chunk(2, dim=-1))
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=H) for part in parts)
        weights = self.attend(torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.5)
        return self.to_out(rearrange(torch.einsum("b h i j, b h j d -> b h i d", weights, v), "b h n d -> b n (h d)"))


class FewAsk(nn.Module):
    """Learned tokens ask, and all answer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 2, D))
        self.q = nn.Linear(D, I)
        self.kv = nn.Linear(D, 2 * I)
        self.out = nn.Linear(I, D)

    def forward(self, x: Tensor) -> Tensor:
        q = split(self.q(self.tokens.expand(x.shape[0], -1, -1)))
        k, v = map(split, self.kv(x).chunk(2, -1))
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class Looks(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.training and bool((x > 0).any()):
            q = q * 2
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


ALL_THREE = ("qv", "qk", "kv")
# Which modes fit, `qk-diag` apart, which goes with `qk`.
CONVERTED: dict[type[nn.Module], tuple[str, ...]] = {
    EinopsFunctions: ALL_THREE,
    EinopsPacked: ALL_THREE,
    EinopsLayers: ALL_THREE,
    EinopsEinsum: ALL_THREE,
    EllipsisEinsum: ALL_THREE,
    LowestNumber: ALL_THREE,
    ChoosesBySize: ALL_THREE,
    TupleOfSizes: ALL_THREE,
    ComplexRotation: ALL_THREE,
    Registers: ALL_THREE,
    Windows: ALL_THREE,
    PooledQueries: ALL_THREE,
    CastsApart: ALL_THREE,
    Casts: ALL_THREE,
    OwnLinear: ALL_THREE,
    LayerMadeInForward: ALL_THREE,
    SharedKeysRepeated: ("kv",),
    SharedKeysExpanded: ("kv",),
    SharedKeysFused: ("kv",),
    CrossAttention: ALL_THREE,
    FewAsk: ("kv",),
}
REFUSED: dict[type[nn.Module], str] = {
    Looks: "its forward branches on the contents of a tensor",
}
