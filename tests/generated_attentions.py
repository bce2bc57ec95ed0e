"""A generator of attentions: hypothesis draws how each step is written, and `Generated` is the module that does so.

Steps are plain functions that a module keeps, as engineers write variants: how tokens become q, k and v, in which order
and layout their channels lie, what acts on a head's vectors, how weights are computed, and how heads are put together.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["Generated", "Recipe", "recipes"]

D = 20  # channels of the tokens


@dataclass(frozen=True)
class Recipe:
    """One way to write attention. `value_dim` is of a head, as `key_dim`; `groups` heads share their K and V."""

    heads: int
    key_dim: int
    value_dim: int
    groups: int
    packing: str
    order: str
    layout: str
    split: str
    weight: str
    biases: tuple[bool, bool, bool]
    norm: str
    rotary: bool
    scale: str
    mask: str
    softmax: str
    product: str
    join: str
    dropout: float

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes that make sense: what is packed in one projection has the same number of heads."""

    def one_of(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    heads, key_dim = draw(st.integers(1, 4)), one_of(2, 4, 6)
    value_dim = one_of(key_dim, key_dim, key_dim + 3, 2 * key_dim + 1)
    packing = one_of("separate", "packed", "query and rest")
    groups = one_of(1, 1, *(n for n in range(2, heads + 1) if heads % n == 0)) if packing != "packed" else 1
    softmax = one_of("function", "method", "module", "fused", "written out")
    return Recipe(
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        groups=groups,
        packing=packing,
        order="".join(draw(st.permutations("qkv"))),
        layout=one_of("role first", "head first"),
        split=one_of("view", "unflatten", "einops", "transposed"),
        weight=one_of("linear", "conv", "function", "subclass"),
        biases=(draw(st.booleans()), draw(st.booleans()), draw(st.booleans())),
        norm=one_of("none", "none", "LayerNorm", "RMSNorm", "cosine"),
        rotary=draw(st.booleans()),
        scale=one_of("on q", "on the product", "on both"),
        mask=one_of("none", "bias", "table", "causal", "lowest"),
        softmax=softmax,
        product="matmul"
        if softmax == "fused"
        else one_of("matmul", "bmm", "einsum", "named", "ellipsis", "keys first"),
        join=one_of("transpose", "einops", "permute"),
        dropout=one_of(0.0, 0.3),
    )


class _Own(nn.Linear):
    """A Linear as a host writes its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Parameters(nn.Module):
    """Weights without a layer."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, D))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Conv(nn.Module):
    """A 1x1 convolution of tokens, which hosts that think in images use."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


_WEIGHTS: dict[str, Callable[[int, bool], nn.Module]] = {
    "linear": lambda width, bias: nn.Linear(D, width, bias),
    "subclass": lambda width, bias: _Own(D, width, bias),
    "function": _Parameters,
    "conv": _Conv,
}

# [B, N, H * d] to [B, H, N, d].
_SPLITS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "view": lambda x, heads: x.reshape(*x.shape[:2], heads, x.shape[-1] // heads).permute(0, 2, 1, 3),
    "unflatten": lambda x, heads: x.unflatten(-1, (heads, -1)).transpose(1, 2),
    "einops": lambda x, heads: rearrange(x, "b n (h d) -> b h n d", h=heads),
    "transposed": lambda x, heads: x.transpose(1, 2).unflatten(1, (heads, -1)).transpose(-2, -1),
}

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda dim: nn.Identity(),
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
}

# The scores [B, H, N, N'] of queries [B, H, N, d] and keys [B, H, N', d].
_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: q @ k.transpose(-2, -1),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, q.shape[:2]),
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
    "named": lambda q, k: einsum(q, k, "b h i d, b h j d -> b h i j"),
    "ellipsis": lambda q, k: torch.einsum("...id,...jd->...ij", q, k),
    "keys first": lambda q, k: (k @ q.mT).mT,
}

# What the heads find, [B, H, N, e], of weights and values.
_RESULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda weights, v: weights @ v,
    "bmm": lambda weights, v: torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, v.shape[:2]),
    "einsum": lambda weights, v: torch.einsum("bhij,bhjd->bhid", weights, v),
    "named": lambda weights, v: einsum(weights, v, "b h i j, b h j d -> b h i d"),
    "ellipsis": lambda weights, v: torch.einsum("...ij,...jd->...id", weights, v),
    "keys first": lambda weights, v: (v.mT @ weights.mT).mT,
}

# [B, H, N, e] to [B, N, H * e].
_JOINS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda y: y.transpose(1, 2).reshape(y.shape[0], y.shape[2], y.shape[1] * y.shape[3]),
    "einops": lambda y: rearrange(y, "b h n d -> b n (h d)"),
    "permute": lambda y: y.permute(0, 2, 1, 3).flatten(2),
}


def _exponentials(scores: Tensor) -> Tensor:
    raised = (scores - scores.amax(-1, keepdim=True)).exp()
    return raised / raised.sum(-1, keepdim=True)


def _softmax(written: str) -> Callable[[Tensor], Tensor]:
    """A softmax over the last axis."""
    if written == "module":
        return nn.Softmax(-1)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "function": lambda scores: F.softmax(scores, dim=-1),
        "method": lambda scores: scores.softmax(-1),
        "written out": _exponentials,
    }
    return ways[written]


def _rotated(x: Tensor) -> Tensor:
    """Positions as rotations of pairs of channels, worked out on the way."""
    half = x.shape[-1] // 2
    speed = torch.arange(1, half + 1, device=x.device, dtype=x.dtype) / half
    angle = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None] * speed
    first, second = x.chunk(2, -1)
    return torch.cat((first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()), -1)


class Generated(nn.Module):
    """Attention over tokens [B, N, D], N up to `LONGEST`, as a recipe writes it."""

    LONGEST = 12

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        widths = {"q": recipe.heads * recipe.key_dim, "k": self.few * recipe.key_dim, "v": self.few * recipe.value_dim}
        together = {"separate": ("q", "k", "v"), "packed": (recipe.order,), "query and rest": ("q", self.rest)}
        self.projections = nn.ModuleDict()
        for roles, bias in zip(together[recipe.packing], recipe.biases, strict=False):
            self.projections[roles] = _WEIGHTS[recipe.weight](sum(widths[role] for role in roles), bias)
        if recipe.norm != "cosine":
            self.q_norm, self.k_norm = (_NORMS[recipe.norm](recipe.key_dim) for _ in range(2))
        if recipe.mask == "table":
            self.distances = nn.Parameter(torch.empty(recipe.heads, 2 * self.LONGEST - 1))
        if recipe.mask == "bias":
            self.register_buffer("added", torch.empty(self.LONGEST, self.LONGEST))
        if recipe.softmax != "fused":
            self.softmax = _softmax(recipe.softmax)
        self.drop = nn.Dropout(recipe.dropout)
        self.out = nn.Linear(recipe.heads * recipe.value_dim, D)

    @property
    def few(self) -> int:
        """Heads of K and V."""
        return self.recipe.heads // self.recipe.groups

    @property
    def rest(self) -> str:
        """K and V in the order in which one projection makes them."""
        return self.recipe.order.replace("q", "")

    def roles(self, x: Tensor) -> dict[str, Tensor]:
        """q, k and v, each [B, heads, N, its channels]."""
        recipe = self.recipe
        found = {}
        for roles, projection in self.projections.items():
            dims = [recipe.value_dim if role == "v" else recipe.key_dim for role in roles]
            heads = recipe.heads if "q" in roles else self.few
            made = projection(x)
            if recipe.layout == "head first":
                parts = _SPLITS[recipe.split](made, heads).split(dims, -1)
            else:
                lanes = made.split([heads * dim for dim in dims], -1)
                parts = tuple(_SPLITS[recipe.split](lane, heads) for lane in lanes)
            found.update(zip(roles, parts, strict=True))
        return found

    def mask(self, scores: Tensor) -> Tensor | None:
        """What is added to scores [.., N, N]."""
        kind, count = self.recipe.mask, scores.shape[-1]
        if kind == "bias":
            return self.added[:count, :count]
        if kind == "table":
            place = torch.arange(count, device=scores.device)
            return self.distances[:, place[:, None] - place + self.LONGEST - 1]
        if kind == "none":
            return None
        lowest = float("-inf") if kind == "causal" else torch.finfo(scores.dtype).min
        seen = torch.ones(count, count, dtype=torch.bool, device=scores.device).tril()
        return torch.zeros(count, count, dtype=scores.dtype, device=scores.device).masked_fill(~seen, lowest)

    def forward(self, x: Tensor) -> Tensor:
        recipe, roles = self.recipe, self.roles(x)
        q, k, v = roles["q"], roles["k"], roles["v"]
        if recipe.norm == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        if recipe.rotary:
            q, k = _rotated(q), _rotated(k)
        if recipe.groups > 1:
            k, v = k.repeat_interleave(recipe.groups, 1), v.repeat_interleave(recipe.groups, 1)
        factor = recipe.key_dim**-0.5
        if recipe.softmax == "fused":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(q @ k.mT), scale=factor)
        else:
            y = _RESULTS[recipe.product](self.weights(q, k, factor), v)
        return self.out(_JOINS[recipe.join](y))

    def weights(self, q: Tensor, k: Tensor, factor: float) -> Tensor:
        """softmax(q k^T + mask), and dropout."""
        if self.recipe.scale == "on q":
            q = q * factor
        elif self.recipe.scale == "on both":
            q, k = q * math.sqrt(factor), k * math.sqrt(factor)
        scores = _SCORES[self.recipe.product](q, k)
        if self.recipe.scale == "on the product":
            scores = scores * factor
        mask = self.mask(scores)
        weights = self.softmax(scores if mask is None else scores + mask)
        return self.drop(weights)
