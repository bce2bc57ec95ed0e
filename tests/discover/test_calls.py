"""One module may be called in many ways: which arguments are one tensor is part of a call, and a mode fits a call."""

import pytest
import torch
import torch.nn.functional as F
from oracle import check, randomize, relative_error
from own_attentions import PerHead
from torch import Tensor, nn

from armour_surgery import convert, inspect
from armour_surgery.errors import NothingToConvertError, SpecializationError

CHANNELS, HEADS, TOKENS = 24, 3, 7


class TwoInputs(nn.Module):
    """Attention of some tokens to others, which may be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            layer(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, tokens in ((self.q, query), (self.k, key), (self.v, value))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Siblings(nn.Module):
    """Two attentions of one class: one reads one tensor three times, the other one tensor twice (as SAM's does)."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = TwoInputs(), TwoInputs()

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x, x, x)
        asked = x + 1
        return self.cross(asked, asked, x)


class Shared(nn.Module):
    """One attention for both: tokens look at each other, and then at `y` where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = TwoInputs()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.attn(x, x, x)
        return x if y is None else self.attn(x, y, y)


def tokens(count: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randn(2, count, CHANNELS, generator=torch.Generator().manual_seed(seed))


def seeded(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


def test_modules_of_one_class_that_are_called_differently_do_not_share_a_trace() -> None:
    model = seeded(Siblings)
    own, cross = inspect(model, example_input={"x": tokens()})
    assert own.modes == ("qv", "qk", "qk-diag", "kv")
    assert cross.modes == ("qk", "qk-diag")
    assert "projected from different inputs" in cross.refused["qv"]
    with torch.no_grad():
        for target in (model.own, model.cross):
            target.k.load_state_dict(target.q.state_dict())
        converted = convert(model, "qk", example_input={"x": tokens()})
        assert [site.fqn for site in converted.surgery.sites] == ["own", "cross"]
        assert relative_error([model(tokens())], [converted(tokens())]) < 1e-6
    assert [site.fqn for site in convert(model, "qv", example_input={"x": tokens()}).surgery.sites] == ["own"]


@pytest.mark.parametrize("count", [TOKENS, 9], ids=["as many tokens", "more tokens"])
def test_a_later_call_that_the_mode_does_not_fit_raises(count: int) -> None:
    model = seeded(Shared)
    model.attn.v.load_state_dict(model.attn.q.state_dict())
    converted = convert(model, "qv", example_input={"x": tokens()})
    with torch.no_grad():
        assert torch.equal(converted(tokens()), model(tokens()))
        with pytest.raises(SpecializationError, match="qv does not fit it: Q and V are .* different .* leads to this"):
            converted(tokens(), tokens(count, seed=1))
        assert torch.equal(converted(tokens()), model(tokens()))


@pytest.mark.parametrize("count", [TOKENS, 9], ids=["as many tokens", "more tokens"])
def test_a_later_call_that_the_mode_fits_is_followed(count: int) -> None:
    model = seeded(Shared)
    model.attn.v.load_state_dict(model.attn.k.state_dict())
    converted = convert(model, "kv", example_input={"x": tokens()})
    with torch.no_grad():
        # The branch for two inputs, added first, must not take over what has one.
        for y in (None, tokens(count, seed=1), None, tokens(count, seed=2)):
            assert relative_error([model(tokens(), y)], [converted(tokens(), y)]) < 1e-6


def test_self_attention_that_comes_second_is_known_by_its_one_input() -> None:
    """A branch that is traced later has the same conditions as one that was traced at the conversion."""
    model = seeded(Shared)
    model.attn.v.load_state_dict(model.attn.k.state_dict())
    converted = convert(model, "kv", example_input={"x": tokens()})
    converted.train()
    with torch.no_grad():
        converted(tokens(), tokens(9, seed=1))
    assert "key is query and value is query" in converted.attn.code
    assert "value is key" in converted.attn.code


def test_what_is_called_in_several_ways_takes_the_modes_that_fit_all_of_them() -> None:
    model, example = seeded(Shared), {"x": tokens(), "y": tokens(9, seed=1)}
    (site,) = inspect(model, example_input=example)
    assert site.modes == ("kv",)
    assert site.refused["qv"].startswith("it is called in several ways, and in one of them Q and V are")
    with pytest.raises(NothingToConvertError, match="called in several ways"):
        convert(model, "qv", example_input=example)
    model.attn.v.load_state_dict(model.attn.k.state_dict())
    converted = convert(model, "kv", example_input=example)
    with torch.no_grad():
        assert relative_error([model(**example)], [converted(**example)]) < 1e-6


class OneWay(TwoInputs):
    """A second way to call it in which nothing can be followed."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = value if key is value else value * torch.sigmoid(query)
        return super().forward(query, key, mixed)


class ThenMixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = OneWay()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x, x, x)
        return self.attn(x, x + 1, x)


def test_modes_of_a_second_call_that_reads_something_made_of_two_are_refused() -> None:
    (site,) = inspect(seeded(ThenMixed), example_input={"x": tokens()})
    assert "qv" not in site.modes
    assert site.refused["qv"].startswith("it is called in several ways")


class TakesSizes(PerHead):
    """Is told the size of its grid, as pyramids do."""

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        height, width = size
        return super().forward(x.unflatten(1, (height, width)).flatten(1, 2))


class Pyramid(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.inner, self.kind = TakesSizes(), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, self.kind((2, x.shape[1] // 2)))


@pytest.mark.parametrize("kind", [tuple, list, torch.Size])
def test_sizes_that_are_handed_on_are_told_apart_by_what_they_are(kind: type) -> None:
    """A host makes a tuple anew at every call."""
    model = randomize(Pyramid(kind)).double().eval()
    batches = [torch.randn(2, count, 20, dtype=torch.float64) for count in (6, 8)]
    assert max(check(model, "qv", [{"x": batch} for batch in batches]).values()) <= 1e-12
    converted = convert(model, "qv", example_input=batches[0])
    counts = []
    for batch in (*batches, *batches):
        converted(batch)
        counts.append(len(type(converted.inner).armour_variants))
    assert counts[1:] == [counts[0] + 1] * 3
