"""Modules are built without weights, however many numbers all of these together would be."""

import weakref

import pytest
import torch
from torch import nn

from armour_surgery.hosts.skeleton import meta_parameters


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
