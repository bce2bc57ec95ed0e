"""A saved folder to send."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from saved_models import armour

from armour_surgery import SurgeryPlan, save


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As of weights whose license nobody knows."""
    model = armour()
    plan: SurgeryPlan = model.surgery  # type: ignore[assignment]
    assert plan.source is not None
    model.surgery = replace(plan, source=replace(plan.source, license=None))  # type: ignore[assignment]
    return save(model, tmp_path_factory.mktemp("saved") / "tiny-armour")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to do with as one likes. Its card names no license."""
    shutil.copytree(saved, tmp_path / "tiny-armour")
    return tmp_path / "tiny-armour"
