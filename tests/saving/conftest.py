"""Converted models and folders of them, to break as one likes."""

import shutil
from pathlib import Path

import pytest
from saved_models import armour, host
from torch import nn

from armour_surgery import convert, save


@pytest.fixture(scope="session")
def vit() -> nn.Module:
    """A converted model that nobody may change."""
    return convert(host(), "kv")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that nobody may change."""
    model = convert(host(), exclude="blocks.1*")
    return save(model, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="session")
def saved_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(armour("hf-vit"), tmp_path_factory.mktemp("saved") / "hf")


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"
