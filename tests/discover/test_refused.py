"""Attention that cannot be converted is refused with a reason, or done right, and never guessed at."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check, randomize
from own_attentions import SHAPE, D, H, Hidden, K, PerHead, example, model_of
from torch import nn

from armour_surgery.errors import NoAttentionError, NothingToConvertError, TraceError
from armour_surgery.surgery.conversion import convert, inspect


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

    # On meta tensors the question itself fails, in the dry run already; with numbers it has an answer.
    (site,) = inspect(Hidden(Peeks()), example_input=torch.empty(SHAPE))
    assert not site.modes
    assert set(site.refused.values()) == {"its forward branches on the contents of a tensor"}


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

    with pytest.raises(NoAttentionError, match="a softmax in the model itself weighs what one layer made"):
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
