"""`bench` as a command: every format of its files, tables that fit, mistakes told before anything is timed."""

import csv
import json
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import command_line
import pytest
from command_line import failed
from PIL import Image
from quick_benchmarks import ARGUMENTS, vit
from timm.models import save_for_hf

from armour_surgery import benchmark, convert, save
from armour_surgery.benchmarking import benchmark as benchmarking
from armour_surgery.benchmarking.intervals import TOO_FEW
from armour_surgery.cli.bench import bench
from armour_surgery.saving.any_model import load_any

pytestmark = pytest.mark.usefixtures("short_turns")

QUICK = ("--rounds", "2", "--budget", "0.1", "--batch-size", "3")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`tiny`, and `armour` converted from it."""
    monkeypatch.chdir(tmp_path)
    save_for_hf(vit(), "tiny", model_args=ARGUMENTS, safe_serialization=True)
    model, source = load_any("local-dir:tiny")
    save(convert(model, "qv", source=source), "armour")
    return tmp_path


document = partial(command_line.document, "bench")


def bad(*arguments: str, code: int = 2) -> str:
    return failed("bench", *arguments, code=code).stderr


def test_a_folder_against_its_original_in_every_format(here: Path) -> None:
    files = [word for name in ("s.json", "s.csv", "s.md", "s.png", "s.svg") for word in ("--out", name)]
    found = document("local-dir:tiny", "--vs", "armour", "--vs", "armour", "--profile", *QUICK, *files)
    assert list(found) == [
        "environment", "settings", "batch_size", "models", "pairs", "noise", "batches", "profile",
    ]  # fmt: skip
    assert [one["name"] for one in found["models"]] == ["local-dir:tiny", "armour", "armour (2)"]
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [
        ("local-dir:tiny", "armour"), ("local-dir:tiny", "armour (2)"),
    ]  # fmt: skip
    assert found["models"][1]["params"] < found["models"][0]["params"]
    assert json.loads(Path("s.json").read_text()) == found
    with Path("s.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["name"], row["batch_size"]) for row in rows[:2]] == [("local-dir:tiny", "1"), ("armour", "1")]
    assert float(rows[4]["speedup"]) == found["pairs"][0]["speedup"]
    assert (rows[3]["speedup"], rows[4]["verdict"]) == ("", TOO_FEW)
    text = Path("s.md").read_text()
    assert "| armour over local-dir:tiny | fp32, eager | 3 |" in text
    assert "aten::addmm" in text
    with Image.open("s.png") as picture:
        assert picture.width > 800
    assert "<svg" in Path("s.svg").read_text()


def test_tables_fit_a_terminal(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = command_line.good("bench", "local-dir:tiny", "--vs", "armour", "--profile", *QUICK, "--out", "s.md")
    assert max(map(len, result.stdout.splitlines())) <= 80
    flat = " ".join(result.stdout.split())
    for part in ("images/s", "p90", "99 % interval", "a copy of itself", TOO_FEW, "aten::addmm", "Written: s.md"):
        assert part in flat
    assert "…" not in result.stdout.partition("Where the time goes")[0]


def test_what_cannot_be_done_is_said_before_anything_is_timed(here: Path) -> None:
    assert "no format for 's.txt'; name a file that ends in .json, .csv, .md" in bad("armour", "--out", "s.txt")
    assert "is not a folder" in bad("armour", "--out", "nowhere/s.md", code=1)
    assert "dtype 'int8' is none of fp32, bf16, fp16" in bad("armour", "--dtype", "int8")
    assert "device 'tpu' cannot be used here" in bad("armour", "--device", "tpu")
    assert "rounds must be an even number" in bad("armour", "--rounds", "5")
    assert "more than 0 seconds" in bad("armour", "--budget", "0")
    assert "did you mean deit_tiny" in bad("armour", "--vs", "deit_tinny_patch16_224", code=1)


def test_an_interrupted_run_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(path.name for path in here.iterdir())
    monkeypatch.setattr(benchmarking, "compare", interrupted)
    assert "interrupted; nothing was left half-written" in bad("armour", "--out", "s.csv", "--out", "s.png", code=130)
    assert sorted(path.name for path in here.iterdir()) == before


def test_help_names_every_option_and_the_defaults_are_those_of_python() -> None:
    text = command_line.good("bench", "--help").stdout
    for option in ("--vs", "--device", "--dtype", "--batch-size", "--compile", "--deploy", "--profile", "--rounds",
                   "--budget", "--threads", "--out", "--no-pretrained", "--json"):  # fmt: skip
        assert option in text
    command, python = (signature(one).parameters for one in (bench, benchmark))
    assert command["rounds"].default == python["rounds"].default
    assert command["budget"].default == python["budget_s"].default
