"""Attention that nobody here has seen before: found by what it computes, or refused with a reason."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check, merge, randomize, relative_error
from torch import nn
from torch.overrides import TorchFunctionMode

from armour_surgery.errors import (
    ExampleInputError,
    NoAttentionError,
    NothingToConvertError,
    PatternError,
    TraceError,
    UsageError,
)
from armour_surgery.surgery.conversion import convert, inspect, plan

D, H, K = 20, 3, 4  # channels, heads, channels per head
EVEN = ("qv", "qk", "qk-diag", "kv")
WIDE = ("qk", "qk-diag", "concat-half", "concat-full", "grouped", "grouped-shuffled")


class Hidden(nn.Module):
    """Where a test's attention lives: something before it, something after it, a residual around it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.before = nn.LayerNorm(D)
        self.inner = attention
        self.after = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x + self.inner(self.before(x)))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(D, 3 * H * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = self.foo(x).unflatten(-1, (3, H, K)).unbind(2)
        w = torch.einsum("bnhd,bmhd->bhnm", a * K**-0.5, b).softmax(-1)
        return self.bar(torch.einsum("bhnm,bmhd->bnhd", w, c).flatten(2))


class EinsumKeysFirst(nn.Module):
    """Logits with the keys in rows, so the softmax runs over the axis before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(D, 3 * H * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = self.foo(x).unflatten(-1, (3, H, K)).unbind(2)
        w = torch.softmax(torch.einsum("bmhd,bnhd->bhmn", b, a), dim=-2)
        return self.bar(torch.einsum("bhmn,bmhd->bnhd", w, c).flatten(2))


class FoldedHeads(nn.Module):
    """Heads folded into the batch, products by bmm and baddbmm-free, a softmax module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(D, H * K), nn.Linear(D, H * K, bias=False), nn.Linear(D, H * K)
        self.last = nn.Linear(H * K, D)
        self.norm = nn.Softmax(dim=-1)

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        return x.view(b, n, H, K).transpose(1, 2).reshape(b * H, n, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.fold(self.one(x)), self.fold(self.two(x)), self.fold(self.three(x))
        y = torch.bmm(self.norm(torch.bmm(q, k.transpose(1, 2)) / K**0.5), v)
        return self.last(y.view(b, H, n, K).transpose(1, 2).reshape(b, n, H * K))


class PerHead(nn.Module):
    """`[H, q | k | v]`: each head's channels side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(D, H * 3 * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.foo(x).unflatten(-1, (H, 3 * K)).transpose(1, 2).chunk(3, dim=-1)
        return self.bar(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Parameters(nn.Module):
    """F.linear on bare parameters, one bias for all."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(3 * H * K, D))
        self.b = nn.Parameter(torch.empty(3 * H * K))
        self.o = nn.Parameter(torch.empty(D, H * K))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = F.linear(x, self.w, self.b).reshape(*x.shape[:2], 3, H, K).permute(2, 0, 3, 1, 4)
        return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), self.o)


class PackedKeysAndValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask, self.tell = nn.Linear(D, H * K), nn.Linear(D, 2 * H * K, bias=False)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.ask(x).reshape(b, n, H, K).permute(0, 2, 1, 3)
        k, v = self.tell(x).reshape(b, n, 2, H, K).permute(2, 0, 3, 1, 4)
        w = (q @ k.mT * 0.5).softmax(dim=-1)
        return self.bar((w @ v).transpose(1, 2).reshape(b, n, -1))


class ValuesFirst(nn.Module):
    """Packed `[v | k | q]`, a norm and a learned temperature on q and k, an additive bias table."""

    def __init__(self) -> None:
        super().__init__()
        self.vkq = nn.Linear(D, 3 * H * K)
        self.nq, self.nk = nn.LayerNorm(K), nn.LayerNorm(K)
        self.heat = nn.Parameter(torch.ones(H, 1, 1))
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v, k, q = (t.unflatten(-1, (H, K)).transpose(1, 2) for t in self.vkq(x).tensor_split(3, dim=-1))
        w = F.softmax(self.nq(q) @ self.nk(k).transpose(2, 3) * self.heat, dim=-1)
        return self.bar((w @ v).transpose(1, 2).flatten(2))


class OneHead(nn.Module):
    """No axis for heads at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, 7), nn.Linear(D, 7), nn.Linear(D, 7)
        self.d = nn.Linear(7, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = torch.softmax(torch.matmul(self.a(x), self.b(x).transpose(1, 2)), 2)
        return self.d(torch.matmul(w, self.c(x)))


class Convolutions(nn.Module):
    """1x1 convolutions on an image made of the tokens, values twice as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Conv2d(D, H * K, 1), nn.Conv2d(D, H * K, 1)
        self.v = nn.Conv2d(D, H * 2 * K, 1)
        self.o = nn.Conv2d(H * 2 * K, D, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = x.transpose(1, 2).unflatten(2, (2, -1))
        q, k, v = (m(image).flatten(2).unflatten(1, (H, -1)) for m in (self.q, self.k, self.v))
        w = (q.transpose(-2, -1) @ k * 0.5).softmax(-1)
        y = (v @ w.transpose(-2, -1)).flatten(1, 2).unflatten(2, image.shape[-2:])
        return self.o(y).flatten(2).transpose(1, 2)


class WideValues(nn.Module):
    """Values wider than keys, but not twice: 6 and 4 channels a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, H * K), nn.Linear(D, H * K), nn.Linear(D, H * 6)
        self.d = nn.Linear(H * 6, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (m(x).unflatten(-1, (H, -1)).transpose(1, 2) for m in (self.a, self.b, self.c))
        return self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Branches(nn.Module):
    """Arguments by keyword, a flag, a nested tuple and another way in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.att = PerHead()
        self.att_drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.att_drop(self.att(x)) if self.training else self.att(x) * 1.5


class Gated(nn.Module):
    """The packed projection also makes a gate, which is not attention's to touch."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(D, 4 * H * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, gate = self.foo(x).chunk(4, -1)
        q, k, v = (t.unflatten(-1, (H, K)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.bar(y * gate.sigmoid())


FOUND: dict[str, tuple[type[nn.Module], tuple[int, int, int], tuple[str, ...]]] = {
    "einsum": (Einsum, (H, K, K), EVEN),
    "einsum with keys first": (EinsumKeysFirst, (H, K, K), EVEN),
    "heads in the batch": (FoldedHeads, (H, K, K), EVEN),
    "per head": (PerHead, (H, K, K), EVEN),
    "parameters": (Parameters, (H, K, K), EVEN),
    "keys and values": (PackedKeysAndValues, (H, K, K), EVEN),
    "values first": (ValuesFirst, (H, K, K), EVEN),
    "one head": (OneHead, (1, 7, 7), EVEN),
    "convolutions": (Convolutions, (H, K, 2 * K), WIDE),
    "wide values": (WideValues, (H, K, 6), tuple(mode for mode in WIDE if mode != "concat-full")),
    "branches": (Branches, (H, K, K), EVEN),
    "gated": (Gated, (H, K, K), EVEN),
}
SHAPE = (2, 6, D)


def model_of(kind: type[nn.Module]) -> nn.Module:
    return randomize(Hidden(kind())).double()


def example() -> torch.Tensor:
    return torch.empty(SHAPE, dtype=torch.float64)


@pytest.mark.parametrize("name", FOUND)
def test_it_is_found_with_its_sizes(name: str) -> None:
    kind, sizes, modes = FOUND[name]
    (site,) = inspect(model_of(kind), example_input=example())
    assert site.fqn.startswith("inner")
    assert (site.num_heads, site.key_dim, site.value_dim) == sizes
    assert site.modes == modes
    assert site.kind == "self-attention"
    assert not set(site.modes) & set(site.refused)
    assert all(reason for reason in site.refused.values())


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name, one in FOUND.items() for mode in one[2] if mode != "qk-diag"]
)
def test_the_oracle_holds_on_it(name: str, mode: str) -> None:
    model = model_of(FOUND[name][0])
    generator = torch.Generator().manual_seed(1)
    batches = [{"x": torch.randn(*shape, D, generator=generator, dtype=torch.float64)} for shape in ((2, 6), (5, 8))]
    assert max(check(model, mode, batches).values()) <= 1e-12


class Diagonal(TorchFunctionMode):
    """Every softmax and fused attention in this context leaves out what a token says to itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            return self.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5) @ v
        if func in (F.softmax, torch.softmax, torch.Tensor.softmax):
            # The one host with its keys in rows takes the softmax over the axis before the last.
            axis = kwargs["dim"] if "dim" in kwargs else args[1]
            swap = axis in (-2, args[0].ndim - 2)
            logits = self.softmax(args[0].transpose(-2, -1) if swap else args[0])
            return logits.transpose(-2, -1) if swap else logits
        return func(*args, **kwargs)

    def softmax(self, logits: torch.Tensor) -> torch.Tensor:
        weights = (logits - logits.amax(-1, keepdim=True)).exp() * (1 - torch.eye(logits.shape[-1]))
        return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", FOUND)
def test_qk_diag_is_attention_without_its_diagonal(name: str) -> None:
    model = model_of(FOUND[name][0])
    given = {"x": torch.empty(SHAPE, dtype=torch.float64)}
    merge(model, "qk-diag", given)
    converted = convert(model, "qk-diag", example_input=given).eval()
    for shape in ((2, 6, D), (5, 8, D)):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            got, plain = converted(x), model.eval()(x)
            with Diagonal():
                expected = model(x)
        assert relative_error([expected], [got]) <= 1e-12
        assert relative_error([plain], [got]) > 1e-4


def test_the_projections_are_named_with_their_channels() -> None:
    (site,) = inspect(model_of(PerHead), example_input=example())
    assert site.q.fqn == site.k.fqn == site.v.fqn == "inner.foo"
    assert site.q.channels == tuple(tuple(range(h * 12, h * 12 + 4)) for h in range(H))
    assert site.v.channels == tuple(tuple(range(h * 12 + 8, h * 12 + 12)) for h in range(H))
    assert site.q.tokens == 6
    (site,) = inspect(model_of(ValuesFirst), example_input=example())
    assert site.q.channels[0] == (24, 25, 26, 27)
    assert site.v.channels[2] == (8, 9, 10, 11)
    (site,) = inspect(model_of(PackedKeysAndValues), example_input=example())
    assert (site.q.fqn, site.k.fqn, site.v.fqn) == ("inner.ask", "inner.tell", "inner.tell")
    (site,) = inspect(model_of(Parameters), example_input=example())
    assert site.to_dict()["projections"] == {"q": "inner.w", "k": "inner.w", "v": "inner.w"}


# Refused, and why.


class TwoPaths(nn.Module):
    """A low-rank update beside each projection."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(D, 3 * H * K)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, 3 * H * K, bias=False)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.foo(x) + self.up(self.down(x))).unflatten(-1, (3, H, K)).permute(2, 0, 3, 1, 4)
        return self.bar(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ChannelAttention(nn.Module):
    """XCA: channels attend to channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * H * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, K)).permute(2, 0, 3, 4, 1)
        w = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
        return self.bar((w @ v).permute(0, 3, 1, 2).flatten(2))


class TwoCores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(D, 6 * H * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, a, b, c = self.foo(x).unflatten(-1, (6, H, K)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(a, b, c)
        return self.bar(y.transpose(1, 2).flatten(2))


class NoProjections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bar = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bar(F.scaled_dot_product_attention(x, x, x))


class CrossedHeads(nn.Module):
    """Head h of the queries meets head h + 1 of the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(D, 3 * H * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.foo(x).unflatten(-1, (3, H, K)).permute(2, 0, 3, 1, 4)
        k = torch.cat([k[:, 1:], k[:, :1]], 1)
        return self.bar(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


REFUSED = {
    "two paths": (TwoPaths, r"made by several projections \(.*foo.*up.*\)"),
    "channels": (ChannelAttention, "attend over channels, not over tokens"),
    "two cores": (TwoCores, "2 attention cores, and only one per module"),
    "no projections": (NoProjections, "no Linear or convolution was found behind its queries"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_reason(name: str) -> None:
    kind, reason = REFUSED[name]
    model = Hidden(kind())
    (site,) = inspect(model, example_input=torch.empty(SHAPE))
    assert site.modes == ()
    assert len(set(site.refused.values())) == 1
    with pytest.raises(NothingToConvertError, match=reason):
        convert(model, "qv", example_input=torch.empty(SHAPE))


class AlsoReadsItsWeight(nn.Module):
    """The packed weight is part of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(D, 3 * H * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.foo(x).unflatten(-1, (3, H, K)).permute(2, 0, 3, 1, 4)
        y = self.bar(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y + self.foo.weight.square().mean()


class CalledTwice(nn.Module):
    """One packed projection, called once for the queries and once for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(D, 3 * H * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.foo(x).unflatten(-1, (3, H, K)).permute(2, 0, 3, 1, 4)[0]
        k, v = self.foo(x).unflatten(-1, (3, H, K)).permute(2, 0, 3, 1, 4)[1:]
        return self.bar(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SharedAlready(nn.Module):
    """Reformer: queries and keys come from one projection, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.foo, self.baz = nn.Linear(D, H * K), nn.Linear(D, H * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (m(x).unflatten(-1, (H, K)).transpose(1, 2) for m in (self.foo, self.foo, self.baz))
        return self.bar(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class InPlace(nn.Module):
    """Scales its queries in place, which must not reach the values that are made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, H * K), nn.Linear(D, H * K), nn.Linear(D, H * K)
        self.d = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (m(x).unflatten(-1, (H, K)).transpose(1, 2) for m in (self.a, self.b, self.c))
        q.mul_(K**-0.5)
        return self.d(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class SlicedWeight(nn.Module):
    """F.linear on slices of one parameter, as nn.MultiheadAttention does."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(3 * H * K, D))
        self.o = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (F.linear(x, w).unflatten(-1, (H, K)).transpose(1, 2) for w in self.w.chunk(3))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SubclassedLinear(nn.Module):
    """Its projection is a Linear whose forward does something else with the result."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2 + 1

    def __init__(self) -> None:
        super().__init__()
        self.foo = self.Doubled(D, 3 * H * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.foo(x).unflatten(-1, (3, H, K)).permute(2, 0, 3, 1, 4)
        return self.bar(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ActivatedQueries(nn.Module):
    """Something non-linear between the projection and the core, for q alone; v keeps its own path."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(D, 3 * H * K)
        self.bar = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.foo(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (H, K)).transpose(1, 2) for t in (F.gelu(q), k.tanh(), v))
        return self.bar(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ClassToken(nn.Module):
    """Only the first token asks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, H * K), nn.Linear(D, H * K), nn.Linear(D, H * K)
        self.d = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.a(x[:, :1]).unflatten(-1, (H, K)).transpose(1, 2)
        k, v = (m(x).unflatten(-1, (H, K)).transpose(1, 2) for m in (self.b, self.c))
        return self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SizeBranch(PerHead):
    """Goes another way for more than seven tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.foo(x).unflatten(-1, (H, 3 * K)).transpose(1, 2).chunk(3, dim=-1)
        if x.shape[1] > 7:
            q = q * 0.5
        return self.bar(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class KeywordOnly(nn.Module):
    """All kinds of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.att = PerHeadWithArguments()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.att(x, (x, {"shift": x * 0.1}), factor=0.5, more=True)


class PerHeadWithArguments(PerHead):
    def forward(self, x: Any, nested: Any, *rest: Any, factor: float = 1.0, **options: Any) -> torch.Tensor:
        assert options["more"]
        return super().forward(x + nested[1]["shift"]) * factor


@pytest.mark.parametrize("mode", ["qv", "qk", "kv"])
@pytest.mark.parametrize(
    "kind",
    [
        AlsoReadsItsWeight,
        CalledTwice,
        SharedAlready,
        InPlace,
        SlicedWeight,
        SubclassedLinear,
        ActivatedQueries,
        ClassToken,
        SizeBranch,
        KeywordOnly,
    ],
)
def test_it_is_done_right_or_refused(kind: type[nn.Module], mode: str) -> None:
    """Odd uses of a projection: what is not refused with a reason has to pass the oracle."""
    model = model_of(kind)
    (site,) = inspect(model, example_input=example())
    generator = torch.Generator().manual_seed(1)
    batches = [{"x": torch.randn(*shape, D, generator=generator, dtype=torch.float64)} for shape in ((2, 6), (5, 8))]
    if mode not in site.modes:
        assert site.refused[mode]
        return
    try:
        errors = check(model, mode, batches)
    except NothingToConvertError:
        return
    assert max(errors.values()) <= 1e-12


def test_heads_in_another_order_are_refused_or_done_right() -> None:
    model = randomize(Hidden(CrossedHeads())).double()
    (site,) = inspect(model, example_input=example())
    if not site.modes:
        assert all("not in the same order" in reason for reason in site.refused.values())
        return
    batches = [{"x": torch.randn(2, 6, D, dtype=torch.float64)}]
    assert max(check(model, "kv", batches).values()) <= 1e-12


def test_a_branch_on_contents_is_refused() -> None:
    class Peeks(PerHead):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.foo(x).unflatten(-1, (H, 3 * K)).transpose(1, 2).chunk(3, dim=-1)
            y = F.scaled_dot_product_attention(q, k, v)
            return self.bar(y.transpose(1, 2).flatten(2)) if torch.any(x > 0) else x

    # On meta tensors the question itself fails, in the dry run already.
    with pytest.raises(ExampleInputError, match="meta"):
        inspect(Hidden(Peeks()), example_input=torch.empty(SHAPE))


def test_a_branch_on_contents_that_the_dry_run_does_not_meet_is_refused() -> None:
    class PeeksInTraining(PerHead):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.foo(x).unflatten(-1, (H, 3 * K)).transpose(1, 2).chunk(3, dim=-1)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            if self.training and (x > 0).any():
                y = y * 2
            return self.bar(y)

    model = Hidden(PeeksInTraining())
    with pytest.raises((NothingToConvertError, TraceError), match="branches on the contents of a tensor"):
        convert(model, "qv", example_input=torch.empty(SHAPE))


def test_a_convolutional_network_has_no_attention() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with pytest.raises(NoAttentionError, match="computed no attention"):
        inspect(model, example_input=(2, 3, 16, 16))

    class Classifies(nn.Module):
        """A softmax that is no attention: there is one matrix product above it and none below."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x).softmax(-1)

    sites = inspect(Classifies(), example_input=(2, 3, 16, 16))
    assert [site.modes for site in sites] == [()]
    with pytest.raises(NothingToConvertError, match=r"no softmax\(q k\^T\) v"):
        convert(Classifies(), example_input=(2, 3, 16, 16))


def test_cross_attention_keeps_its_two_inputs_apart() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(D, H * K), nn.Linear(14, H * K), nn.Linear(14, H * K)
            self.o = nn.Linear(H * K, D)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            q, k, v = (m(t).unflatten(-1, (H, K)).transpose(1, 2) for m, t in ((self.q, x), (self.k, y), (self.v, y)))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = randomize(Cross()).double()
    given = {"x": torch.empty(2, 6, D, dtype=torch.float64), "y": torch.empty(2, 9, 14, dtype=torch.float64)}
    (site,) = inspect(model, example_input=given)
    assert site.kind == "cross-attention"
    assert site.modes == ("kv",)
    assert "different tokens (6 and 9)" in site.refused["qv"]
    same = {"x": torch.empty(2, 6, D, dtype=torch.float64), "y": torch.empty(2, 6, 14, dtype=torch.float64)}
    (site,) = inspect(model, example_input=same)
    assert "different inputs" in site.refused["qv"]
    batches = [{name: torch.randn_like(value) for name, value in given.items()}]
    assert max(check(model, "kv", batches).values()) <= 1e-12


# What may be asked.


def test_examples_in_every_form() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, D, 4, 4)
            self.inner = PerHead()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.inner(self.patch(image).flatten(2).transpose(1, 2))

    model = Image()
    forms: list[Any] = [(1, 3, 8, 12), torch.empty(1, 3, 8, 12), {"image": torch.empty(2, 3, 8, 12)}]
    sites = [inspect(model, example_input=form) for form in forms]
    assert sites[0] == sites[1] == sites[2]
    assert sites[0][0].q.tokens == 6
    with pytest.raises(ExampleInputError, match="example_input"):
        inspect(model)
    for wrong in ((3, 8, 8), (0, 3, 8, 8)):
        with pytest.raises(ExampleInputError, match="not a shape"):
            inspect(model, example_input=wrong)
    with pytest.raises(ExampleInputError, match=r"could not run on inputs of shape.*\(2, 5, 8, 8\)"):
        inspect(model, example_input=(2, 5, 8, 8))


def test_wrong_names_are_told() -> None:
    model = Hidden(PerHead())
    with pytest.raises(UsageError, match="unknown mode 'vq'; choose one of auto, qv"):
        convert(model, "vq", example_input=torch.empty(SHAPE))
    with pytest.raises(UsageError, match="unknown init 'best'"):
        convert(model, init="best", example_input=torch.empty(SHAPE))
    for option in ("include", "exclude"):
        with pytest.raises(PatternError, match="matches none of the 1 attention sites"):
            convert(model, example_input=torch.empty(SHAPE), **{option: "blocks.*"})
    with pytest.raises(PatternError, match="leave none"):
        convert(model, example_input=torch.empty(SHAPE), exclude=["inner"])
    assert convert(model, example_input=torch.empty(SHAPE), include="inn*").surgery.sites[0].fqn == "inner"


def test_a_plan_tells_what_convert_does() -> None:
    model = Hidden(PerHead())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    planned = plan(model, "qv", example_input=torch.empty(SHAPE))
    done = convert(model, "qv", example_input=torch.empty(SHAPE)).surgery
    assert [site.fqn for site in planned.sites] == ["inner"]
    assert planned.sites[0].residual is None
    assert (planned.params_before, planned.params_after) == (done.params_before, done.params_after)
    assert (planned.macs_before, planned.macs_after) == (done.macs_before, done.macs_after)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
