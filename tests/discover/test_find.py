"""Attention that nobody here has seen before is found by what it computes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check, merge, relative_error
from own_attentions import SHAPE, D, H, K, PerHead, example, model_of
from torch import nn
from torch.overrides import TorchFunctionMode

from armour_surgery.surgery.conversion import convert, inspect

EVEN = ("qv", "qk", "qk-diag", "kv")
WIDE = ("qk", "qk-diag", "concat-half", "concat-full", "concat-key", "grouped", "grouped-shuffled")


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
