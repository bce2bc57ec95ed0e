"""Remembered shapes are those that torch works out, and only what is new is remembered."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from armour_surgery import shapes
from armour_surgery.shapes import RememberedShapes


class Noted(TorchDispatchMode):
    """Notes the operators that are really worked out: it is asked after the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def layout(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type


@pytest.fixture(autouse=True)
def _forgetful() -> None:
    shapes._known.clear()


FUNCTIONS = {
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "linear": lambda x: F.linear(x, torch.empty(7, x.shape[-1], dtype=x.dtype, device="meta")),
    "softmax": lambda x: x.softmax(-1),
    "gelu": F.gelu,
    "product": lambda x: x @ x.transpose(-2, -1),
    "transposed": lambda x: x.transpose(0, 1) * x.transpose(0, 1),
    "half": lambda x: x * 0.5,
    "one more": lambda x: x + 1,
    "as whole numbers": lambda x: x.long() * 0.5,
    "whole numbers": lambda x: x.long() + 1,
    "mean": lambda x: x.mean(-1, keepdim=True),
    "largest": lambda x: x.max(-1).values,
    "beside": lambda x: torch.cat([x, x], 1),
    "type": lambda x: x.to(torch.float16),
    "mask": lambda x: x.masked_fill(x > 0, float("-inf")),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=12, deadline=None)
@given(st.tuples(*[st.integers(1, 5)] * 3), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_layouts_are_those_that_torch_works_out(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    function, x = FUNCTIONS[name], torch.empty(shape, dtype=dtype, device="meta")
    wanted = layout(function(x))
    for _ in range(3):
        with RememberedShapes():
            assert layout(function(x)) == wanted


def test_what_is_known_is_not_worked_out_again() -> None:
    norm, x = nn.LayerNorm(6, device="meta"), torch.empty(2, 3, 6, device="meta")
    names = []
    for _ in range(3):
        with Noted() as noted, RememberedShapes(), torch.no_grad():
            norm(x)
        names.append(noted.names)
    assert "aten::native_layer_norm" in names[0]
    assert names[1:] == [{"aten::empty_strided"}] * 2


IN_PLACE = {
    "add": lambda x: x.add_(x.new_empty(x.shape[-1])),
    "sigmoid": lambda x: x.sigmoid_(),
    "clamp": lambda x: x.clamp_(min=0.0),
    "of a view": lambda x: x[0].tanh_(),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_tensor_whose_numbers_change_stays_that_tensor(name: str) -> None:
    function = IN_PLACE[name]
    wanted = layout(function(torch.empty(2, 3, 4, device="meta")))
    names = []
    for _ in range(2):
        x = torch.empty(2, 3, 4, device="meta")
        with Noted() as noted, RememberedShapes():
            result = function(x)
        assert layout(result) == wanted
        assert result is x or result._base is x
        names.append({changed for changed in noted.names if changed.partition(".")[0].endswith("_")})
    assert names[0]
    assert not names[1]


def test_views_in_place_and_wrong_sums_are_never_remembered() -> None:
    for _ in range(2):
        x = torch.empty(2, 1, device="meta")
        with RememberedShapes():
            assert x.squeeze_(1).shape == x.shape == (2,)
            with pytest.raises(RuntimeError, match="shape"):
                x.add_(torch.empty(3, 2, device="meta"))


def test_results_are_new_tensors() -> None:
    x = torch.empty(2, 3, device="meta")
    with RememberedShapes():
        first, second = x.exp(), x.exp()
        assert first is not second
        assert first.untyped_storage() is not second.untyped_storage()
        assert x.view(3, 2)._base is x
        assert x.add_(1) is x


def test_the_default_type_is_asked_for_anew() -> None:
    numbers = torch.empty(3, dtype=torch.int64, device="meta")
    with RememberedShapes():
        assert (numbers / 2).dtype is torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert (numbers / 2).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_numbers_on_other_devices_are_computed() -> None:
    x = torch.randn(4, 5)
    with RememberedShapes():
        assert torch.equal(x.softmax(-1), x.softmax(-1))
        assert not torch.equal(torch.rand(5), torch.rand(5))
    assert not shapes._known


def test_mistakes_stay_mistakes() -> None:
    x = torch.empty(2, 3, device="meta")
    for _ in range(2):
        with RememberedShapes(), pytest.raises(RuntimeError):
            x @ x


def test_it_forgets_before_it_gets_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_MOST", 3)
    with RememberedShapes():
        for size in range(1, 10):
            torch.empty(size, device="meta").exp()
    assert len(shapes._known) <= 3
