"""What is handed on, a folder's card and a report, does not say where anything lies on this machine."""

from pathlib import Path

import numpy as np
import pytest
from command_line import good
from own_files import EXAMPLE, write_vit
from PIL import Image

from armour_surgery.saving.folder import read_plan


@pytest.fixture
def elsewhere(tmp_path: Path, models: Path) -> Path:
    """A folder far from the one that the commands run in, with models and photos."""
    root = tmp_path / "home" / "jane doe"
    root.mkdir(parents=True)
    for name in ("tiny", "hf"):
        (root / name).symlink_to(models / name)
    write_vit(root)
    noise = np.random.default_rng(0)
    for number in range(24):
        folder = root / "photos" / ("val" if number < 4 else "train") / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (34, 36, 3), np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("model", ["local-dir:{}/tiny", "{}/tiny", "hf:{}/hf", "{}/hf", "{}/vit.py:trained"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_conversion(model: str, relative: bool, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(elsewhere.parents[1])
    root = "home/jane doe" if relative else str(elsewhere)
    extra = EXAMPLE if "vit.py" in model else ()
    given = ("--init", "calibrated", "--calib", f"{root}/photos", "--calib-images", "8")
    good("convert", model.format(root), *extra, *given, "--out", f"{root}/out", "--report", f"{root}/page.html")
    card = (elsewhere / "out" / "README.md").read_text(encoding="utf-8")
    page = (elsewhere / "page.html").read_text(encoding="utf-8")
    for text in (card, page):
        assert "jane" not in text
        assert str(elsewhere.parents[1]) not in text
        assert "photos" in text
        assert model.rpartition("/")[2] in text
    near = read_plan(elsewhere / "out").fidelity
    assert near is not None
    assert near.source == "photos"


def test_a_model_that_was_trained(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(elsewhere.parents[1])
    good("convert", f"local-dir:{elsewhere}/tiny", "--num-classes", "3", "--out", f"{elsewhere}/out")
    settings = (
        "data.batch_size=4",
        "data.images_per_epoch=8",
        "schedule.epochs=1",
        "data.workers=0",
        "judge.keep=last",
    )
    changes = [part for setting in settings for part in ("--set", setting)]
    training = ("--recipe", "recover_labels", "--data", f"{elsewhere}/photos", "--out", f"{elsewhere}/trained")
    good("finetune", f"{elsewhere}/out", *training, *changes)
    card = (elsewhere / "trained" / "README.md").read_text(encoding="utf-8")
    assert "jane" not in card
    assert "images of photos" in card
