"""A package that is not installed is told before the work, with the extra that brings it."""

import sys
from pathlib import Path

import pytest
import torch
from command_line import bad
from small_models import refused, vit

from armour_surgery import benchmark, export
from armour_surgery.errors import ExportError

ONNX = ["onnx", "onnxscript", "onnxruntime"]
HIDDEN = [*(("onnx", package) for package in ONNX), *(("openvino", package) for package in [*ONNX, "openvino"])]
ENDINGS = {"onnx": ".onnx", "openvino": ".xml"}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a model that is read nor a graph that is followed would be before the work."""

    def work(*_: object, **__: object) -> None:
        pytest.fail("the work had begun")

    monkeypatch.setattr("armour_surgery.saving.any_model.load_any", work)
    monkeypatch.setattr(torch.export, "export", work)
    monkeypatch.setattr("armour_surgery.exporting.formats.full_copy", work)
    monkeypatch.setattr("armour_surgery.benchmarking.benchmark.full_copy", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("format", "package"), HIDDEN)
def test_a_missing_package_is_told_before_the_work(
    format: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    said = f"{format} needs {package}, which is not installed; pip install 'armour-surgery[{format}]'"
    file = f"m{ENDINGS[format]}"
    assert refused(ExportError, lambda: export(vit(depth=1), file, format=format)) == said
    assert refused(ExportError, lambda: benchmark({"vit": vit(depth=1)}, runtime=format)) == said
    assert said in bad("export", "vit_tiny_patch16_224", "--format", format, "--out", file)
    assert said in bad("bench", "vit_tiny_patch16_224", "--runtime", format)


@pytest.mark.usefixtures("no_work")
def test_all_that_are_missing_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ONNX:
        monkeypatch.setitem(sys.modules, package, None)
    message = refused(ExportError, lambda: export(vit(depth=1), tmp_path / "m.onnx", format="onnx"))
    assert message.startswith("onnx needs onnx, onnxscript, onnxruntime, which are not installed; ")


def test_other_formats_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in [*ONNX, "openvino"]:
        monkeypatch.setitem(sys.modules, package, None)
    assert export(vit(depth=1), tmp_path / "m.pt2", format="pt2").max_relative_error == 0
