"""Modules are built without weights, however many numbers all of these together would be."""

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.layers import trunc_normal_tf_
from torch import nn

from armour_surgery.hosts.skeleton import WithoutDrawing, meta_parameters


def test_nothing_holds_the_numbers_of_parameters_that_have_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[nn.Parameter]] = []
    register = nn.Module.register_parameter

    def noted(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            made.append(weakref.ref(param))
        register(module, name, param)

    monkeypatch.setattr(nn.Module, "register_parameter", noted)
    with meta_parameters():
        layer = nn.Linear(3, 5)
        assert len(made) == 2
        assert [reference() for reference in made] == [None, None]
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_a_parameter_under_two_names_stays_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = nn.Parameter(torch.ones(3, 5))
            self.first, self.second = weight, weight

    with meta_parameters():
        tied = Tied()
    assert tied.first is tied.second
    assert tied.first.is_meta


def test_a_table_that_would_not_fit_into_memory_is_never_made() -> None:
    with meta_parameters():
        table = nn.Embedding(2**40, 2**9)
        small = torch.zeros(3)
    assert table.weight.is_meta
    assert not small.is_meta


def test_sizes_of_any_kind_are_taken() -> None:
    """numpy's numbers as Perceiver's, and tensors."""
    with meta_parameters():
        assert torch.zeros(np.int64(3), 5).shape == (3, 5)
        assert torch.zeros(torch.tensor(3), 5).shape == (3, 5)
        assert torch.empty([3, 5]).shape == torch.empty((3, 5)).shape == torch.empty(3, 5).shape


@pytest.mark.parametrize("draw", [nn.init.kaiming_uniform_, nn.init.normal_, nn.init.trunc_normal_, trunc_normal_tf_])
def test_parameters_are_not_filled_and_everything_else_is(draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight, table = nn.Parameter(torch.zeros(3, 5)), torch.zeros(3, 5)
    scale = nn.Parameter(torch.ones(5))
    with WithoutDrawing():
        assert draw(weight) is weight
        draw(table)
        nn.init.constant_(scale, 2)
        with torch.no_grad():
            scale.mul_(1.5)
    assert not weight.any()
    assert table.all()
    assert bool((scale == 3).all())
