"""`demo` tells the truth: its numbers are measured again, and what it leaves can be trained."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_line import failed, run
from typer.testing import CliRunner  # noqa: TID251

from armour_surgery import load
from armour_surgery.benchmarking import speed
from armour_surgery.cli import app


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("demo")
    compare, kept = speed.compare, list[bool]()
    with pytest.MonkeyPatch.context() as patch:
        # Everything as it is, but for the patience and the images of the timing; and this process goes on after it.
        patch.setattr(
            speed, "compare", lambda models, images, **_: compare(models, lambda: images()[:8], rounds=4, budget_s=1)
        )
        patch.setattr(speed, "keep_memory", lambda: kept.append(True))
        result = CliRunner().invoke(app, ["demo", "--json", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    assert kept == [True]
    return json.loads(result.stdout), result.stderr, out


def test_a_folder_that_demo_cannot_make_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    error = failed("demo", "--out", str(tmp_path / "taken" / "out")).stderr
    assert "cannot be made: Not a directory; name another --out" in " ".join(error.split())


def test_demo_tells_the_truth(demo: tuple[dict[str, Any], str, Path]) -> None:
    found, _, _ = demo
    assert set(found) >= {"original", "modes", "environment"}
    assert found["original"]["accuracy"] > 95
    assert set(found["modes"]) == {"qv", "kv", "qk", "qk-diag"}
    for mode in found["modes"].values():
        assert mode["accuracy_reloaded"] == mode["accuracy"]
        assert mode["params"] < found["original"]["params"]
        assert mode["macs"] < found["original"]["macs"]
        low, high = mode["speedup_iqr"]
        assert 0 < low <= mode["speedup"] <= high
        assert {"wq", "calibrated"} <= set(mode["inits"])
        assert all(init["accuracy"] == init["accuracy_reloaded"] for init in mode["inits"].values())
        assert mode["inits"]["wq"] == {key: mode[key] for key in ("accuracy", "accuracy_reloaded")}
        assert mode["accuracy"] < found["original"]["accuracy"] - 10
    assert set(found["modes"]["qv"]["inits"]) == {"wq", "wq-refit", "joint-svd", "calibrated"}
    # Without any training.
    for mode in ("qv", "kv"):
        assert found["modes"][mode]["inits"]["calibrated"]["accuracy"] > found["original"]["accuracy"] - 1
    recovered = found["recovered"]
    assert recovered["steps"] > 0
    assert recovered["accuracy"] > found["original"]["accuracy"] - 1.5
    assert recovered["accuracy"] > found["modes"]["qv"]["accuracy"] + 50


def test_demo_for_a_person(demo: tuple[dict[str, Any], str, Path]) -> None:
    found, told, out = demo
    for chapter in (
        "1. inspect",
        "2. convert and evaluate",
        "3. save, and load in a new process",
        "4. time",
        "5. recover without labels",
    ):
        assert chapter in told
    assert "…" not in told, "a table does not fit into 80 columns"
    assert "the same accuracy, every one" in told
    assert f"{found['original']['accuracy']:.1f} %" in told
    told = " ".join(told.split())
    assert "without training costs nearly all accuracy" in told
    calibrated = found["modes"]["qv"]["inits"]["calibrated"]["accuracy"]
    assert f"qv gets {calibrated:.1f} % where the original gets {found['original']['accuracy']:.1f} %" in told
    endings = {"wq": "", "wq-refit": "-wq-refit", "joint-svd": "-joint-svd", "calibrated": "-calibrated"}
    folders = [
        f"digits_vit-armour-{mode}{endings[init]}" for mode in found["modes"] for init in found["modes"][mode]["inits"]
    ]
    assert len(folders) == 10
    assert sorted(os.listdir(out)) == sorted([*folders, "digits_vit-armour-qv-recovered"])


def test_what_the_demo_leaves_can_be_trained_as_the_recipe_says(
    demo: tuple[dict[str, Any], str, Path], tmp_path: Path
) -> None:
    student = str(demo[2] / "digits_vit-armour-qv")
    few = ["--set", "data.images_per_epoch=64", "--set", "schedule.epochs=1"]
    result = run("finetune", student, "--recipe", "digits_recover", "--out", str(tmp_path / "out"), *few)
    assert result.exit_code == 0, result.stderr
    assert load(tmp_path / "out").surgery.source.name == "digits_vit"


def test_demo_numbers_are_measured_again(demo: tuple[dict[str, Any], str, Path]) -> None:
    from armour_surgery.demo.digits_vit import accuracy, load_digits_vit
    from armour_surgery.images.digits import digits_split

    found, _, out = demo
    _, _, images, labels = digits_split()
    assert accuracy(load_digits_vit(), images, labels) == found["original"]["accuracy"]
    assert accuracy(load(out / "digits_vit-armour-qv"), images, labels) == found["modes"]["qv"]["accuracy"]
    recovered = load(out / "digits_vit-armour-qv-recovered")
    assert accuracy(recovered, images, labels) == found["recovered"]["accuracy"]
    calibrated = load(out / "digits_vit-armour-kv-calibrated")
    assert accuracy(calibrated, images, labels) == found["modes"]["kv"]["inits"]["calibrated"]["accuracy"]
