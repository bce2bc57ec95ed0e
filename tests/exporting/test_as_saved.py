"""What is exported for timm and transformers is what `save` writes, said in their words, and loaded by them."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from saved_models import armour, host, outputs
from small_models import Own, refused
from torch import nn

from armour_surgery import convert, export, load
from armour_surgery.errors import ExportError, NotOursError, UsageError


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))


def test_timm_loads_it_and_so_do_we(tmp_path: Path) -> None:
    told = export(armour("levit"), tmp_path / "out", format="timm")
    assert (told.max_relative_error, told.checked_with) == (0.0, f"timm {timm.__version__}")
    assert equal(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval(), armour("levit"))
    assert equal(load(tmp_path / "out"), armour("levit"))
    assert 'timm.create_model("local-dir:FOLDER", pretrained=True)' in (tmp_path / "out/README.md").read_text()
    export(armour("vit"), tmp_path / "out", format="timm")  # an earlier export is replaced
    assert equal(load(tmp_path / "out"), armour("vit"))


def test_transformers_loads_it(tmp_path: Path) -> None:
    told = export(armour("hf-vit-eager"), tmp_path / "out", format="hf")
    assert (told.max_relative_error, told.checked_with) == (0.0, f"transformers {transformers.__version__}")
    model: Any = transformers.AutoModel.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert equal(model.eval(), armour("hf-vit-eager"))
    assert 'AutoModel.from_pretrained("FOLDER")' in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("name", "format", "said"),
    [
        ("vit", "hf", "--format hf is for models of transformers, and VisionTransformer is of timm; --format timm"),
        ("hf-vit", "timm", "is of transformers; --format hf is"),
        ("own", "timm", "Own is of own; --format compat is"),
    ],
)
def test_models_of_another_library_are_refused(name: str, format: str, said: str, tmp_path: Path) -> None:
    model = convert(Own().eval(), example_input=(2, 3, 32, 32)) if name == "own" else armour(name)
    assert said in refused(ExportError, lambda: export(model, tmp_path / "out", format=format))
    assert list(tmp_path.iterdir()) == []


def test_what_was_saved_or_is_not_converted_is_left_alone(tmp_path: Path) -> None:
    refused(UsageError, lambda: export(host("vit"), tmp_path / "out", format="timm"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.log").write_text("epoch 1")
    refused(NotOursError, lambda: export(armour("vit"), tmp_path / "mine", format="timm"))
