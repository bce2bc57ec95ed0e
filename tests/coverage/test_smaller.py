"""The smaller call of a module is one that it takes, and everything in it fits together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armour_surgery.coverage.smaller import mapped, outputs_of, smaller
from armour_surgery.traced import Call

CHANNELS = 6


class Doing(nn.Module):
    """Runs a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)


def windows(x: Tensor, mask: Tensor) -> Tensor:
    many, tokens, channels = x.shape
    logits = (x @ x.transpose(1, 2)).view(-1, len(mask), tokens, tokens) + mask
    return logits.softmax(-1).view(many, tokens, tokens) @ x


def rotated(x: Tensor, places: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    prefix = x.shape[1] - len(places[0])
    turned = torch.cat([x[:, :prefix], x[:, prefix:] * places[0] + places[1]], 1)
    return (turned @ turned.transpose(1, 2) + mask).softmax(-1) @ x


def grid(x: Tensor, size: tuple[int, int]) -> Tensor:
    image = x[:, 1:].transpose(1, 2).view(x.shape[0], -1, *size)
    return torch.cat([x[:, :1], F.max_pool2d(image, 2).flatten(2).transpose(1, 2)], 1)


def sides(x: Tensor, height: int, width: int) -> Tensor:
    return x.view(x.shape[0], height, width, -1).flip(2).flatten(1, 2)


def last(x: Tensor) -> Tensor:
    return F.linear(x, torch.ones(CHANNELS, CHANNELS))


def second(x: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, torch.ones(CHANNELS, CHANNELS, 1, 1)).flatten(2).softmax(-1) + bias


def shapes(call: Call) -> list[Any]:
    shape = mapped(call, lambda tensor: tuple(tensor.shape))  # type: ignore[arg-type, return-value]
    return [*shape.args, *shape.kwargs.values()]


CASES: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], list[Any]]] = {
    "windows": (windows, (torch.ones(128, 49, 6), torch.ones(64, 49, 49)), [(3, 49, 6), (3, 49, 49)]),
    "positions": (
        rotated,
        (torch.ones(2, 1805, 6), (torch.ones(1600, 6), torch.ones(1600, 6)), torch.ones(1, 1, 1805, 1805)[0]),
        [(2, 264, 6), ((59, 6), (59, 6)), (1, 264, 264)],
    ),
    "a grid": (grid, (torch.ones(2, 56 * 40 + 1, 6), (56, 40)), [(2, 14 * 10 + 1, 6), (14, 10)]),
    "sides": (sides, (torch.ones(1, 64 * 48, 6), 64, 48), [(1, 16 * 12, 6), 16, 12]),
    "channels last": (last, (torch.ones(1, 8, 56, 40, 6),), [(1, 8, 14, 10, 6)]),
    "channels second": (second, (torch.ones(2, 6, 64, 36), torch.ones(64 * 36)), [(2, 6, 16, 9), (16 * 9,)]),
    "windows of images": (last, (torch.ones(1024, 8, 8, 6),), [(3, 8, 8, 6)]),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_cut_where_it_can_be(name: str) -> None:
    function, args, wanted = CASES[name]
    module, call = Doing(function), Call(args, {})
    fewer = smaller(module, call)
    assert shapes(fewer) == wanted
    outputs_of(module, fewer, 0)
    assert shapes(call) == shapes(Call(args, {}))


def knows(x: Tensor) -> Tensor:
    return x + torch.ones(900, CHANNELS)


@pytest.mark.parametrize(
    ("function", "shape"),
    [(knows, (1, 900, CHANNELS)), (last, (2, 50, CHANNELS)), (last, (40, CHANNELS))],
    ids=["it knows its tokens", "few", "no tokens"],
)
def test_else_it_is_the_call_itself(function: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    call = Call((torch.ones(shape),), {})
    assert smaller(Doing(function), call) is call


def test_a_tensor_that_comes_twice_stays_one() -> None:
    x = torch.ones(16, 300, CHANNELS)
    fewer = smaller(Doing(lambda query, key: query @ key.transpose(1, 2) @ key), Call((x,), {"key": x}))
    assert fewer.args[0] is fewer.kwargs["key"]
    assert fewer.args[0].shape == (3, 59, CHANNELS)
