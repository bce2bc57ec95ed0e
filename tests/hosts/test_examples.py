"""What a model of no library takes: as it is written down, or as the model shows."""

from typing import Any

import pytest
import torch
from named_hosts import tiny
from torch import nn

from armour_surgery.errors import ExampleInputError, UsageError
from armour_surgery.hosts import example_input
from armour_surgery.hosts.examples import keep_example, read_example


class Two(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(5, 4, 1)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor, ids: Any = None, flag: Any = None) -> torch.Tensor:
        return self.first(x)


class Pair(Two):
    def forward(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x + offset


def shapes(model: nn.Module, batch: int = 3) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in example_input(model, batch).items()}


def test_an_example_is_read_and_given_by_name() -> None:
    cases: dict[str, dict[str, Any]] = {
        "1,5,8,6": {"x": ((3, 5, 8, 6), torch.float64)},
        " 1, 5,8,6 : float ": {"x": ((3, 5, 8, 6), torch.float64)},
        "1,5,8,6;1,7:long": {"x": ((3, 5, 8, 6), torch.float64), "ids": ((3, 7), torch.int64)},
        "flag=4,9:bool;1,5,8,6": {"flag": ((3, 9), torch.bool), "x": ((1, 5, 8, 6), torch.float64)},
        # A table has not as many rows as there are images.
        "x=1,5,8,6;ids=49,2:int": {"x": ((3, 5, 8, 6), torch.float64), "ids": ((49, 2), torch.int32)},
    }
    for text, expected in cases.items():
        model = Two().double()
        keep_example(model, read_example(text))
        assert shapes(model) == expected, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no shape; write 1,3,224,224"),
        ("1,3,x", "is no shape"),
        ("1,3;", "is no shape"),
        ("1,0,3", "is 0, or too large"),
        ("1,3:half", "'half' is none of the types float, long, int, bool"),
        ("y=1,3", "has no 'y', but x, ids, flag"),
        ("x=1,3;x=1,3", "takes x, ids, flag; name each once"),
        ("1;1;1;1", "takes x, ids, flag; name each once"),
    ],
)
def test_what_is_no_example_is_told(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        keep_example(Two(), read_example(text))


def test_a_model_shows_what_it_takes() -> None:
    class Config:
        image_size, num_channels = 12, 2

    x = torch.float32
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"img_size": 8}, ((3, 5, 8, 8), x)),
        ({"image_size": (8, 6), "in_chans": 2}, ((3, 2, 8, 6), x)),
        ({"config": Config()}, ((3, 2, 12, 12), x)),
        ({"config": {"img_size": [8, 6]}}, ((3, 5, 8, 6), x)),
        ({"cfg": {"input_size": (4, 8, 6), "in_channels": 4}}, ((3, 4, 8, 6), x)),
        ({"example_input_array": torch.zeros(1, 4, 8, 6)}, ((3, 4, 8, 6), x)),
        ({"example_input_array": {"x": torch.zeros(1, 4, 8, 6)}}, ((3, 4, 8, 6), x)),
    ]
    for attributes, expected in cases:
        assert shapes(Two(**attributes)) == {"x": expected}, attributes
    with pytest.raises(ExampleInputError, match=r"Two is not .* no img_size and in_chans.*--example 1,3,224,224"):
        example_input(Two())
    with pytest.raises(ExampleInputError, match="its forward takes x, offset"):
        example_input(Pair(img_size=8))


def test_what_is_said_of_a_library_s_model_is_taken() -> None:
    model = tiny()
    keep_example(model, read_example("1,3,64,48"))
    assert shapes(model)["x"][0] == (3, 3, 64, 48)
