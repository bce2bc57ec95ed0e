"""From a model to ONNX Runtime and OpenVINO, as a user types it, and what these runtimes then answer."""

from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from command_line import document, good

from armour_surgery import load
from armour_surgery.measure.difference import largest_difference


def test_the_way_to_other_runtimes(tiny: str, here: Path) -> None:
    good("convert", tiny, "--init", "calibrated", "--calib-images", "16", "--out", "small")
    for format, file in (("onnx", "small.onnx"), ("openvino", "small.xml")):
        told = document("export", "small", "--format", format, "--deploy", "--out", file)
        assert (told["format"], told["out"]) == (format, file)
        assert told["max_relative_error"] < 1e-4
        timed = document("bench", "small", "--vs", tiny, "--runtime", format, "--budget", "0.1", "--rounds", "2")
        assert timed["settings"]["runtime"] == format
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        wanted = load(here / "small")(images)
    session = onnxruntime.InferenceSession(here / "small.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert largest_difference([wanted], [torch.from_numpy(found)]) < 1e-4
    compiled = openvino.Core().compile_model(here / "small.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (found,) = compiled(images.numpy()).values()
    assert largest_difference([wanted], [torch.from_numpy(np.array(found))]) < 1e-4


def test_a_size_is_reached_on_the_command_line(tiny: str, here: Path) -> None:
    words = ("--init", "calibrated", "--calib-images", "64", "--params", "-12%", "--mlp", "--report", "page.html")
    told = document("convert", tiny, *words, "--out", "small")
    assert told["params_after"] <= told["params_goal"] == round(0.88 * told["params_before"])
    assert told["mlps"]
    assert all(mlp["hidden_after"] < mlp["hidden_before"] for mlp in told["mlps"])
    assert "hidden channels" in (here / "page.html").read_text(encoding="utf-8")
    assert "Hidden channels of its MLPs" in (here / "small" / "README.md").read_text(encoding="utf-8")
    text = " ".join(good("convert", tiny, *words, "--out", "small").stdout.split())
    assert "MLPs narrowed" in text
    assert "MLP parameters" in text
