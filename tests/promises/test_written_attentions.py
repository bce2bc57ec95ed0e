"""Attention as engineers write it converts exactly, or is refused with the reason."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from oracle import check, merge, outputs, randomize
from own_attentions import H, Hidden, K, alone, tokens
from small_models import refused
from torch import nn
from written_attentions import CONVERTED, REFUSED, N, Packed, join

from armour_surgery import convert
from armour_surgery.discover import find_sites
from armour_surgery.errors import NothingToConvertError, TraceError
from armour_surgery.traced import SeenSite

EVERY = [(kind, mode) for kind, modes in CONVERTED.items() for mode in modes]


def hidden(kind: type[nn.Module]) -> nn.Module:
    return randomize(Hidden(kind())).double().eval()


def host(kind: type[nn.Module]) -> nn.Module:
    # Where its neighbors cannot be added (the residual of `Hidden`), it stands alone.
    return alone(kind) if kind.__name__ in ("PooledQueries", "FewAsk") else hidden(kind)


@functools.cache
def searched(kind: type[nn.Module]) -> tuple[nn.Module, list[SeenSite]]:
    """A host that nobody changes, searched once for all modes that are tried on it."""
    model = host(kind)
    return model, find_sites(model, {"x": tokens()})


@pytest.mark.parametrize("kind", CONVERTED, ids=lambda kind: kind.__name__)
def test_the_modes_that_fit(kind: type[nn.Module]) -> None:
    _, (found,) = searched(kind)
    assert tuple(mode for mode in found.site.modes if mode != "qk-diag") == CONVERTED[kind]


@pytest.mark.parametrize(("kind", "mode"), EVERY, ids=lambda value: getattr(value, "__name__", value))
def test_surgery_changes_nothing_where_the_projections_are_equal(kind: type[nn.Module], mode: str) -> None:
    model, sites = searched(kind)
    errors = check(model, mode, [{"x": tokens()}, {"x": tokens(5)}, {"x": tokens(1)}], sites)
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("count", [3, 11, 18])
@pytest.mark.parametrize("name", ["EinopsPacked", "EinopsLayers", "LowestNumber", "ChoosesBySize"])
def test_another_number_of_tokens_is_followed(name: str, count: int) -> None:
    kind = next(kind for kind in CONVERTED if kind.__name__ == name)
    model, sites = searched(kind)
    errors = check(model, "qv", [{"x": tokens()}, {"x": tokens(2, count)}, {"x": tokens(3, count)}], sites)
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_type_is_followed(dtype: torch.dtype) -> None:
    """A number that a type gave, such as its lowest, is another one in another type."""
    kind = next(kind for kind in CONVERTED if kind.__name__ == "LowestNumber")
    model = host(kind).to(dtype)
    fresh = convert(model, "qk", example_input=tokens().to(dtype))
    cast = convert(host(kind), "qk", example_input=tokens()).to(dtype)
    batch = {"x": tokens(3).to(dtype)}
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh, batch), outputs(cast, batch), strict=True))


class GivenTables(Packed):
    """Gets two tables in a tuple, as transformers hands rotary positions on, and asks for their size and type."""

    def forward(self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        first, second = tables
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=H) for part in self.qkv(x).chunk(3, -1))
        if first.shape[0] > 4:
            q = q * first.to(x.dtype)
        return self.out(join(F.scaled_dot_product_attention(q, k + second, v)))


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = GivenTables()
        self.first, self.second = (nn.Parameter(torch.randn(N, K)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, (self.first[: x.shape[1]], self.second[: x.shape[1]]))


def test_what_was_decided_by_a_nested_argument_is_a_condition() -> None:
    batches = [{"x": tokens(2, count)} for count in (6, 5, 3, 6)]
    errors = check(randomize(Tables()).double().eval(), "qv", batches)
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("name", ["LowestNumber", "EinopsFunctions"])
def test_autocast_is_followed(name: str) -> None:
    """Under it, what a type gave is of another type than the inputs'."""
    kind = next(kind for kind in CONVERTED if kind.__name__ == name)
    model = host(kind).float()
    batch = tokens().float()
    assert merge(model, "kv", {"x": batch.to("meta")})
    converted = convert(model, "kv", example_input=batch)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(converted(batch), model(batch))
        assert torch.equal(converted(batch), model(batch))


def test_factors_that_are_set_afterwards_are_followed() -> None:
    kind = next(kind for kind in CONVERTED if kind.__name__ == "EinopsFunctions")
    model = host(kind)
    converted = convert(model, "kv", example_input=tokens())
    before = converted(tokens())
    for changed in (model, converted):
        changed.inner.scale = 2.0
    again = convert(model, "kv", example_input=tokens())
    assert torch.equal(converted(tokens()), again(tokens()))
    assert not torch.allclose(converted(tokens()), before)


def test_what_was_recorded_reads_like_the_host() -> None:
    kind = next(kind for kind in CONVERTED if kind.__name__ == "LowestNumber")
    code = convert(host(kind), "qv", example_input=tokens()).inner.code
    assert "self.qkv(x)" in code
    assert "x.device" in code
    assert "torch.ones(size, size, dtype = torch.bool" in code.replace("size_1", "size")
    compile(code, "code", "exec")


@pytest.mark.parametrize("kind", CONVERTED, ids=lambda kind: kind.__name__)
def test_gradients_and_copies(kind: type[nn.Module]) -> None:
    model = host(kind)
    converted = copy.deepcopy(convert(model, CONVERTED[kind][0], example_input=tokens())).train()
    converted(tokens(3)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in converted.parameters())


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_cannot_be_followed_is_refused_with_the_reason(kind: type[nn.Module]) -> None:
    model = hidden(kind)
    message = refused(
        (NothingToConvertError, TraceError),  # type: ignore[arg-type]
        lambda: convert(model, "qv", example_input=tokens()),
    )
    assert REFUSED[kind] in message


class GroupsInTraining(Packed):
    """As in RF-DETR: while it trains, tokens are two groups that do not see each other, and have to be as many."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grouped = torch.cat(x.chunk(2, dim=1)) if self.training else x
        q, k, v = self.heads(grouped)
        attended = self.out(join(F.scaled_dot_product_attention(q, k, v)))
        return torch.cat(attended.split(len(x)), dim=1)


def test_a_host_that_takes_other_calls_while_it_trains() -> None:
    model = hidden(GroupsInTraining)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        model.train()(tokens(2, 5))
    model.eval()
    merge(model, "qv", {"x": tokens(2, 5)})
    converted = convert(model, "qv", example_input=tokens(2, 5))
    for training, count in ((False, 5), (True, 6), (False, 6), (True, 4)):
        model.train(training)
        converted.train(training)
        given = {"x": tokens(2, count)}
        for wanted, got in zip(outputs(model, given), outputs(converted, given), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
