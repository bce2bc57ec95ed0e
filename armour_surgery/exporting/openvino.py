"""OpenVINO's IR: an .xml with the graph and a .bin with the weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armour_surgery.exporting.comparison import Inputs

__all__ = ["load_openvino", "write_openvino"]

_KEY = "armour_surgery"


def write_openvino(source: Path, path: Path, origin: dict[str, Any]) -> None:
    """Write an ONNX file as IR, in the same precision."""
    import openvino

    model = openvino.convert_model(source)
    model.set_rt_info(json.dumps(origin), _KEY)
    openvino.save_model(model, path, compress_to_fp16=False)


def load_openvino(path: Path, threads: int | None = None, batch: int | None = None) -> Callable[[Inputs], list[Tensor]]:
    """A function that runs the IR, or an ONNX file, on the CPU.

    `threads` None lets OpenVINO choose; with `batch` it is prepared for so many images alone.
    """
    import openvino

    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    model = core.read_model(path)
    if batch is not None:
        shapes = {port: port.get_partial_shape() for port in model.inputs}
        for shape in shapes.values():
            if shape.rank.get_length() and shape[0].is_dynamic:
                shape[0] = batch
        model.reshape(shapes)
    compiled = core.compile_model(model, "CPU", options)
    names = [port.get_any_name() for port in compiled.inputs]

    def loaded(inputs: Inputs) -> list[Tensor]:
        given = {name: inputs[name].numpy() for name in names}
        result = compiled(given)
        return [torch.from_numpy(result[port].copy()) for port in compiled.outputs]

    return loaded
