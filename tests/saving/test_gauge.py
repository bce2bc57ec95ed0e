"""A fixed gauge is saved, and done again: bit for bit, and by a plan that says the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import HOSTS, PLAN, edit, put, same
from small_models import Own, refused, surgery_of
from torch import nn

from armour_surgery import convert, load, save
from armour_surgery.errors import SchemaError
from armour_surgery.rewrite.fixed import FixedProjection


def fixed(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return convert(HOSTS[name](), gauge="fixed", **options).eval()


@pytest.mark.parametrize("name", ["vit", "hf-vit"])
def test_it_comes_back_bit_identical(name: str, tmp_path: Path) -> None:
    model = fixed(name)
    loaded = load(save(model, tmp_path / "saved"))
    assert any(isinstance(module, FixedProjection) for module in loaded.modules())
    assert same(model, loaded)
    assert surgery_of(loaded).sites == surgery_of(model).sites
    assert same(model, load(save(loaded, tmp_path / "again")))


def test_the_surgery_is_done_on_a_users_own_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = convert(Own(), "kv", rank=8, gauge="fixed", example_input=x).eval()
    loaded = load(save(model, tmp_path / "saved"), into=Own())
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(fixed("vit"), tmp_path / "saved")


@pytest.mark.parametrize("start", [-8, 37, 10**9])
def test_a_block_that_is_not_there(start: int, folder: Path) -> None:
    edit(folder, lambda document: put(document, ("plan", "sites", 0, "gauge", "start"), start))
    message = refused(SchemaError, lambda: load(folder))
    assert f"fixes the gauge of 'blocks.0.attn' by 12 channels from {start!r} on, and it reads 48" in message
    assert str(folder / PLAN) in message


@pytest.mark.parametrize("gauge", [None, {"start": None}, "fixed", {"block": 8}])
def test_a_plan_of_another_gauge_does_not_fit_the_weights(gauge: Any, folder: Path) -> None:
    edit(folder, lambda document: put(document, ("plan", "sites", 0, "gauge"), gauge))
    assert str(folder) in refused(SchemaError, lambda: load(folder))


def test_plans_of_before_say_nothing_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = convert(HOSTS["vit"]()).eval()
    folder = save(model, tmp_path / "saved")

    def older(document: dict[str, Any]) -> None:
        for site in document["plan"]["sites"]:
            del site["gauge"]

    edit(folder, older)
    assert same(model, load(folder))


def test_the_card_and_the_plan_tell_of_it(folder: Path) -> None:
    assert "2 with a fixed gauge" in (folder / "README.md").read_text(encoding="utf-8")
    document = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    gauge = document["plan"]["sites"][0]["gauge"]
    assert set(gauge) == {"start", "condition", "error", "error_before"}
    assert gauge["error_before"] < gauge["error"] < 1e-3
