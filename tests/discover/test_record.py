"""A model is run without weights, or, where it looks at numbers, with them."""

import copy

import pytest
import torch
from oracle import check, randomize
from own_attentions import D, PerHead
from torch import nn

from armour_surgery import convert, inspect
from armour_surgery.copies import meta_copy
from armour_surgery.discover.record import record
from armour_surgery.errors import ExampleInputError


class LooksAround(nn.Module):
    """Takes a length from a table, a factor from what it is given, and makes a table on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PerHead()
        self.register_buffer("lengths", torch.tensor([3.0, 5.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = int(self.lengths.max().item())
        factor = 2.0 if bool(x.isfinite().all()) else 0.0
        return self.inner(factor * x[:, :length]) + torch.arange(length)[:, None]


def model() -> nn.Module:
    made = randomize(LooksAround()).double().eval()
    made.lengths.copy_(torch.tensor([3.0, 5.0]))
    return made


def test_a_model_that_looks_at_numbers_is_examined_and_stays_as_it_was() -> None:
    host = model()
    before = copy.deepcopy(host.state_dict())
    seen: list[int] = []
    host.inner.register_forward_hook(lambda *_: seen.append(1))
    recording = record(host, {"x": torch.empty(2, 6, D, dtype=torch.float64, device="meta")})
    assert list(recording.innermost) == ["inner"]
    assert all(parameter.is_meta for parameter in recording.model.parameters())
    ((call,),) = [recording.calls["inner"]]
    assert call.args[0].is_meta
    assert call.args[0].shape == (2, 5, D)
    assert seen == []
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())


def test_it_converts_exactly() -> None:
    batches = [{"x": torch.randn(batch, 6, D, dtype=torch.float64)} for batch in (2, 3)]
    assert max(check(model(), "qv", batches).values()) <= 1e-12


def test_without_weights_it_runs_on_zeros_and_the_tables_that_it_has() -> None:
    skeleton = meta_copy(model(), buffers=False)
    (site,) = inspect(skeleton, example_input=torch.empty(2, 6, D, dtype=torch.float64))
    assert "qv" in site.modes


def test_a_model_that_runs_on_neither_tells_what_happened_with_numbers() -> None:
    class Picky(LooksAround):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if bool((x == x.round()).all()):
                return super().forward(x)
            raise ValueError("only whole numbers, please")

    shape = torch.empty(2, 6, D, dtype=torch.float64, device="meta")
    with pytest.raises(ExampleInputError, match=r"x': \(2, 6, 20\).*ValueError: only whole numbers, please"):
        convert(Picky().double(), "qv", example_input=shape)
