"""Which folders the command `convert` may write to, asked of the functions behind it."""

from dataclasses import replace
from pathlib import Path

import pytest
from saved_models import contents
from small_models import refused, surgery_of
from torch import nn

from armour_surgery import load
from armour_surgery.errors import NotOursError, OccupiedError
from armour_surgery.saving.folder import save_conversion
from armour_surgery.saving.occupied import check_replaceable


def test_a_conversion_gives_way_to_another_one_of_the_same_model(vit: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = surgery_of(vit).source
    assert source is not None
    for _ in range(2):
        check_replaceable(out, source)
        save_conversion(vit, out)
    check_replaceable(out, replace(source, arguments={**source.arguments, "depth": 7}))
    for other in (replace(source, architecture="other"), replace(source, name="other"), replace(source, library="own")):
        message = refused(OccupiedError, lambda other=other: check_replaceable(out, other))  # type: ignore[misc]
        assert "holds a conversion of another model" in message
        check_replaceable(out, other, force=True)
    check_replaceable(tmp_path / "absent", source)


def test_what_python_saved_stays(vit: nn.Module, broken: Path) -> None:
    before = contents(broken)
    message = refused(OccupiedError, lambda: save_conversion(vit, broken))
    assert str(broken) in message
    assert "saved in Python" in message
    assert contents(broken) == before
    save_conversion(vit, broken, force=True)
    assert surgery_of(load(broken)).mode == "kv"
    save_conversion(vit, broken)


@pytest.mark.parametrize("weights", [b"", b"\x00" * 7, b"\xff" * 64])
def test_damaged_weights_have_no_mark(vit: nn.Module, weights: bytes, tmp_path: Path) -> None:
    out = save_conversion(vit, tmp_path / "out")
    (out / "model.safetensors").write_bytes(weights)
    refused(OccupiedError, lambda: check_replaceable(out))


def test_the_folder_of_others_is_written_to_with_force(vit: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    message = refused(NotOursError, lambda: save_conversion(vit, tmp_path))
    assert "README.md, config.json and preprocessor_config.json in it with --force; other files stay" in message
    assert (tmp_path / "README.md").read_text() == "mine"
    load(save_conversion(vit, tmp_path, force=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"
