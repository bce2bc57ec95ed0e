"""Inputs have names, and go to a forward by them, or in their order where it has no names for them."""

from typing import Any

import pytest
import torch
from small_models import Own, vit
from torch import nn

from armour_surgery import convert, deploy, inspect, plan
from armour_surgery.calls import first_name, given_in_order, run
from armour_surgery.errors import ExampleInputError

SHAPE = (2, 3, 32, 32)


class Args(Own):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return super().forward(*args)


class ArgsAndKeywords(Own):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs)


class Unnamed(Own):
    def forward(self, pictures: torch.Tensor, /) -> torch.Tensor:
        return super().forward(pictures)


class Keywords(Own):
    def forward(self, **kwargs: torch.Tensor) -> torch.Tensor:
        return super().forward(**kwargs)


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [
        (Own, ["pictures"], ()),
        (Own, ["images"], ()),
        (Args, ["args"], ("args",)),
        (Args, ["pictures", "mask"], ("pictures", "mask")),
        (ArgsAndKeywords, ["args"], ("args",)),
        (ArgsAndKeywords, ["pictures"], ()),
        (Unnamed, ["pictures"], ("pictures",)),
        (Keywords, ["pictures"], ()),
    ],
)
def test_names_that_a_forward_does_not_have(kind: type[nn.Module], given: list[str], wanted: tuple[str, ...]) -> None:
    assert given_in_order(kind(), given) == wanted


def test_inputs_keep_their_order_and_their_names() -> None:
    class Echo(nn.Module):
        def forward(self, first: Any, /, *args: Any, last: Any, **kwargs: Any) -> Any:
            return first, args, last, kwargs

    assert run(Echo(), {"last": 1, "first": 2, "args": 3, "other": 4}) == (2, (3,), 1, {"other": 4})
    assert [first_name(model) for model in (Echo(), Args(), Keywords(), vit())] == ["first", "args", None, "x"]


@pytest.mark.parametrize("kind", [Args, ArgsAndKeywords, Unnamed])
def test_a_model_that_passes_on_what_it_gets_converts(kind: type[Own]) -> None:
    model = kind().eval()
    converted = convert(model, "qv", example_input=SHAPE)
    by_name = convert(model, "qv", example_input={"pictures": torch.zeros(SHAPE)})
    assert plan(model, "qv", example_input=SHAPE).macs_after == converted.surgery.macs_after  # type: ignore[union-attr]
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        deployed = deploy(converted, example_input=SHAPE)
        expected = Own.forward(by_name, x)  # type: ignore[arg-type]
        assert torch.equal(converted(x), expected)
        assert torch.allclose(deployed(x), expected, atol=1e-6)


def test_a_forward_of_keywords_alone_needs_their_names() -> None:
    with pytest.raises(ExampleInputError, match=r"Keywords has no name for its first input; .* a dictionary"):
        inspect(Keywords(), example_input=SHAPE)
    assert inspect(Keywords(), example_input={"pictures": torch.zeros(SHAPE)})
