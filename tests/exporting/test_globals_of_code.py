"""The globals of generated code become source that means the same."""

import math
import operator
from typing import Any

import pytest
import torch
from small_models import refused
from torch import nn

from armour_surgery.errors import ExportError
from armour_surgery.exporting.globals_of_code import Preamble, names_in
from armour_surgery.hosts.attention_interface import attention_of_chunks

VALUES: dict[str, Any] = {
    "softmax": nn.functional.softmax,
    "Linear": nn.Linear,
    "T": torch,
    "pytree": torch.utils._pytree,
    "inf": math.inf,
    "NoneType": type(None),
    "getattr": getattr,
    "add": operator.add,
    "attend": nn.functional.scaled_dot_product_attention,
    "_fixed_0": (torch.Tensor, torch.fx.proxy.Proxy),
    "many": attention_of_chunks,
}


def test_each_kind_of_value_comes_back() -> None:
    preamble = Preamble("a forward")
    for name, value in VALUES.items():
        preamble.add(name, value)
        preamble.add(name, value)  # once more is once
    text = "from __future__ import annotations\n" + "\n".join([*preamble.imports, *preamble.definitions])
    scope: dict[str, Any] = {}
    exec(text, scope)
    for name, value in VALUES.items():
        if name == "many":
            assert scope["_CHUNKS"] == "cu_seq_lens_q"
            assert scope["attention_of_chunks"] is scope["many"]
        elif name != "getattr":
            assert scope[name] is value or scope[name] == value


def test_names_are_those_of_functions_inside_too() -> None:
    assert {"sorted", "outer"} <= names_in(compile("def f():\n    return [sorted(outer) for _ in ()]", "", "exec"))


@pytest.mark.parametrize(("value", "said"), [(object(), "has no source"), (torch.zeros(2), "has no source")])
def test_what_has_no_source_is_told(value: Any, said: str) -> None:
    assert said in refused(ExportError, lambda: Preamble("a forward").add("value", value))


def test_a_name_has_one_meaning() -> None:
    preamble = Preamble("a forward")
    preamble.add("size", 3)
    assert "size means two things in a forward" in refused(ExportError, lambda: preamble.add("size", 4))
