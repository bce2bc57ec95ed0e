"""The table of a model of each class: from the rows of earlier runs, and what became of runs that were too long."""

import json
import time
from pathlib import Path

import each_class
import pytest
from class_table import CHECKS, class_table
from torch import nn

SAME = dict.fromkeys(CHECKS, "same")
ROWS = (
    {"library": "timm", "class": "Attention", "architecture": "vit", **SAME},
    {"library": "torchvision", "class": "Window", "architecture": "swin", **SAME, "deploy": "refused: nothing to do"},
)


def test_it_says_how_many_classes_were_examined_and_each_reason_once() -> None:
    long = dict.fromkeys(CHECKS, "not examined: too long")
    failing = {**SAME, "load 1": "FAILS: 1e+00", "load 3": "FAILS: 1e+00"}
    others = [
        {"library": "timm", "class": "Slow", "architecture": "slow", **long},
        {"library": "timm", "class": "Wrong", "architecture": "wrong", **failing},
    ]
    page = class_table([*ROWS, *others], {"timm": 4, "torchvision": 1}, "python x.py", "For every class.")
    assert "3 of 5 classes (2 of timm's 4, 1 of torchvision's 1), of which 1 fail in something" in page
    assert "| timm | Attention | vit | same | same | same | same | same | same |" in page
    assert page.splitlines()[-3:] == [
        "- Window, deploy: refused: nothing to do",
        f"- Slow, {', '.join(CHECKS)}: not examined: too long",
        "- Wrong, load 1, load 3: FAILS: 1e+00",
    ]


def test_the_table_is_made_of_the_rows_of_several_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    libraries: dict[str, dict[str, list[dict[str, object]]]] = {}
    for number, row in enumerate(ROWS):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        kind = {"host": row["class"], "auto": True}
        libraries[row["library"]] = {"list": [{"name": row["architecture"], "seconds": 1.0, "kinds": [kind]}]}
    (tmp_path / "coverage.json").write_text(json.dumps({"libraries": libraries}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = ["each_class.py", "coverage.json", "--rows", "0.jsonl", "1.jsonl", "--markdown", "page.md"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        each_class.main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["classes"] == list(ROWS)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "`python benchmarks/each_class.py coverage.json --rows 0.jsonl 1.jsonl --markdown page.md`" in page
    assert "2 of 2 classes" in page


def test_what_the_original_does_not_do_either_is_no_failure() -> None:
    converted, original = nn.Identity(), nn.Identity()

    def never(_: nn.Module) -> str:
        raise ValueError("no")

    def differs(model: nn.Module) -> str:
        return "FAILS: 4e-01" if model is converted else "FAILS: 6e-01"

    def ours(model: nn.Module) -> str:
        return "FAILS: 4e-01" if model is converted else "0e+00"

    assert each_class._attempt("train", never, converted, original) == "the original does not train: ValueError: no"
    assert each_class._attempt("compile", differs, converted, original) == "the original does not compile: 6e-01"
    assert each_class._attempt("compile", ours, converted, original) == "FAILS: 4e-01"
    assert each_class._attempt("copy", differs, converted, original) == "FAILS: 4e-01"


def test_too_much_memory_is_told_from_what_torch_says_of_memory_otherwise() -> None:
    full = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    assert each_class._failed(RuntimeError(full)) == "not examined: it takes more than 14 GiB"
    assert each_class._failed(MemoryError()) == "not examined: it takes more than 14 GiB"
    traced = "Caffe2 uses a lazy allocation, so you will need to call mutable_data() to actually allocate memory."
    assert each_class._failed(RuntimeError(traced)).startswith("FAILS: RuntimeError: Caffe2")


def test_processor_time_is_limited_and_waiting_for_a_processor_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(*_: object) -> dict[str, str]:
        time.sleep(2)
        return SAME

    def busy(*_: object) -> dict[str, str]:
        while True:
            pass

    monkeypatch.setattr(each_class, "_LONGEST", 1)
    monkeypatch.setattr(each_class, "_SLOWEST", 100)
    monkeypatch.setattr(each_class, "_examine", idle)
    assert each_class._examined_apart("timm", "any") == SAME
    monkeypatch.setattr(each_class, "_examine", busy)
    assert set(each_class._examined_apart("timm", "any").values()) == {
        "not examined: it took longer than 1 s of a processor"
    }
