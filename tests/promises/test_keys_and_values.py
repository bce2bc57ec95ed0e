"""Attention whose queries are no tokens, or whose keys are more than tokens: exact, or refused with the reason."""

import pytest
import torch
import torch.nn.functional as F
from oracle import check, randomize
from own_attentions import D, H, K
from small_models import refused
from torch import Tensor, nn
from written_attentions import I, Packed, join, split

from armour_surgery import convert, inspect, redundancy
from armour_surgery.errors import ConversionError, NothingToConvertError, TraceError

ALL_THREE = ("qv", "qk", "kv")


class Own(nn.Module):
    """Projections of its own for all three, and learned tensors to ask with or to be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, I) for _ in range(3))
        self.other_k, self.other_v = (nn.Linear(D, I) for _ in range(2))
        self.out = nn.Linear(I, D)
        self.learned = nn.Parameter(torch.randn(1, 2, D))
        self.heads = nn.Parameter(torch.randn(1, H, 2, K))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))

    def tokens(self, x: Tensor) -> Tensor:
        return self.learned.expand(x.shape[0], -1, -1)


class PrefixForHeads(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(2, 1, H, 3, K))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (torch.cat([p.expand(x.shape[0], -1, -1, -1), t], 2) for p, t in zip(self.prefix, (k, v), strict=True))
        return self.out(join((q @ k.mT * self.scale).softmax(-1) @ v))


class PrefixForTokens(Own):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(1, 2, I))

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory.expand(x.shape[0], -1, -1)
        k, v = (torch.cat([project(x), memory], 1) for project in (self.k, self.v))
        return self.attend(*map(split, (self.q(x), k, v)))


class ZeroKey(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        zero = k.new_zeros(k.shape[0], H, 1, K)
        k, v = torch.cat((zero, k), -2), torch.cat((zero, v), -2)
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class Latents(Own):
    """As in Perceiver's resamplers: learned tokens ask all others and each other."""

    def forward(self, x: Tensor) -> Tensor:
        asked = torch.cat([x, self.tokens(x)], 1)
        return self.attend(*map(split, (self.q(self.tokens(x)), self.k(asked), self.v(asked))))


class LearnedQueries(Own):
    """As in AIMv2's head: what asks is learned, and goes through no projection."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.heads.expand(x.shape[0], -1, -1, -1), split(self.k(x)), split(self.v(x)))


class PooledQuery(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*map(split, (x.mean(1, keepdim=True)[..., :I], self.k(x), self.v(x))))


class ClassAsks(Own):
    """As in CaiT."""

    def forward(self, x: Tensor) -> Tensor:
        asked = self.attend(*map(split, (self.q(x[:, :1]), self.k(x), self.v(x))))
        return torch.cat([asked, x[:, 1:]], 1)


class OneHeadAsked(Own):
    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(D, 2 * K)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (part.unsqueeze(1) for part in self.kv(x).chunk(2, -1))
        return self.out(join((split(self.q(x)) @ k.mT).softmax(-1) @ v))


class ChangesTokens(Own):
    """Queries are made before, keys and values after the tokens are changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        q = self.q(x)
        x.add_(x.roll(1, -1))
        return self.attend(*map(split, (q, self.k(x), self.v(x))))


class PreparesEach(Own):
    """Every projection gets its own view of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*(split(project(x.transpose(0, 1)).transpose(0, 1)) for project in (self.q, self.k, self.v)))


class OtherMakesOne(Own):
    def forward(self, x: Tensor) -> Tensor:
        k = torch.cat([self.other_k(self.tokens(x)), self.k(x)], 1)
        v = torch.cat([self.other_v(self.tokens(x)), self.v(x)], 1)
        return self.attend(*map(split, (self.q(x), k, v)))


class CalledTwice(Own):
    def forward(self, x: Tensor) -> Tensor:
        k, v = (torch.cat([project(self.tokens(x)), project(x)], 1) for project in (self.k, self.v))
        return self.attend(*map(split, (self.q(x), k, v)))


class ChannelsBeside(Own):
    def forward(self, x: Tensor) -> Tensor:
        beside = self.heads[:, :, :1].expand(x.shape[0], -1, x.shape[1], -1)
        q, k = (torch.cat([split(project(x)), beside], -1) for project in (self.q, self.k))
        return self.attend(q, k, split(self.v(x)))


class HeadsBeside(Own):
    def forward(self, x: Tensor) -> Tensor:
        beside = self.heads[:, :1, :1].expand(x.shape[0], -1, x.shape[1], -1)
        q, k, v = (torch.cat([split(project(x)), beside], 1) for project in (self.q, self.k, self.v))
        return self.out(join(F.scaled_dot_product_attention(q, k, v)[:, :H]))


CONVERTED: dict[type[nn.Module], tuple[str, ...]] = {
    PrefixForHeads: ALL_THREE,
    PrefixForTokens: ALL_THREE,
    ZeroKey: ALL_THREE,
    Latents: ("kv",),
    LearnedQueries: ("kv",),
    PooledQuery: ("kv",),
    ClassAsks: ("kv",),
    OneHeadAsked: ("kv",),
    ChangesTokens: ("kv",),
    PreparesEach: ALL_THREE,
}
REFUSED: dict[type[nn.Module], str] = {
    OtherMakesOne: "its keys are made by several projections (other_k, k)",
    CalledTwice: "its keys are made by several projections (k, k)",
    ChannelsBeside: "only some channels of its queries are made by q",
    HeadsBeside: "only some channels of its queries are made by q",
}


def host(kind: type[nn.Module]) -> nn.Module:
    return randomize(kind()).double().eval()


def tokens(batch: int = 2, count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(batch + 10 * count)
    return torch.randn(batch, count, D, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", CONVERTED, ids=lambda kind: kind.__name__)
def test_the_modes_that_fit(kind: type[nn.Module]) -> None:
    (site,) = inspect(host(kind), example_input=tokens())
    assert tuple(mode for mode in site.modes if mode != "qk-diag") == CONVERTED[kind]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind, modes in CONVERTED.items() for mode in modes],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_surgery_changes_nothing_where_the_projections_are_equal(kind: type[nn.Module], mode: str) -> None:
    errors = check(host(kind), mode, [{"x": tokens()}, {"x": tokens(5, 9)}, {"x": tokens(1, 4)}])
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_is_not_sure_is_refused_with_the_reason(kind: type[nn.Module]) -> None:
    message = refused(NothingToConvertError, lambda: convert(host(kind), "kv", example_input=tokens()))
    assert REFUSED[kind] in message


def test_queries_without_a_projection_are_told_of() -> None:
    model = host(LearnedQueries)
    (site,) = inspect(model, example_input=tokens())
    assert site.q is None
    assert site.num_heads == H
    assert site.refused["qv"] == "no Linear or convolution was found behind its queries"
    reason = site.refused["qv"]
    assert reason in refused(ConversionError, lambda: convert(model, "kv", init="joint-svd", example_input=tokens()))
    assert reason in refused(NothingToConvertError, lambda: convert(model, "kv", rank=2, example_input=tokens()))
    assert reason in refused(TraceError, lambda: redundancy(model, example_input=tokens()))
