"""ONNX, by torch's own exporter; run by ONNX Runtime."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.errors import ExportError
from armour_surgery.exporting.comparison import Inputs
from armour_surgery.exporting.graphs import BATCH, free_axes, traced

__all__ = ["load_onnx", "to_int8", "write_onnx"]

# A protobuf file cannot be larger, and the weights are in it.
_LARGEST = 2**31
_KEY = "armour_surgery"


def write_onnx(model: nn.Module, inputs: Inputs, path: Path, origin: dict[str, Any], *, any_size: bool) -> None:
    """Write a model as one ONNX file with its weights in it, for any batch size.

    Raises:
        ExportError: torch cannot follow the model, or the weights do not fit one file.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > _LARGEST:
        raise ExportError(
            f"{type(model).__name__} has {size / 2**30:.1f} GiB of weights, and one ONNX file holds 2 GiB; convert it "
            "to bfloat16 or float16 first, or export to pt2 or openvino"
        )

    axes = free_axes(inputs, any_size=any_size)

    def follow() -> Any:
        with _quiet():
            # Not left to the ONNX exporter: that of torch 2.9 follows no ViT of transformers with a free batch.
            graph = torch.export.export(model, (), kwargs=inputs, dynamic_shapes=axes, strict=False)
            return torch.onnx.export(
                graph, (), kwargs=inputs, dynamo=True, dynamic_shapes=axes, external_data=False, verbose=False
            )

    program = traced(model, "ONNX", follow)
    program.model.metadata_props[_KEY] = json.dumps(origin)
    program.save(str(path), include_initializers=True, external_data=False)


def to_int8(source: Path, target: Path) -> None:
    """Quantize the weights of matrix products to 8 bits, and activations while it runs (dynamic quantization)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    # torch writes the shapes of weights there too, and ONNX Runtime before 1.32 transposes weights without them.
    del model.graph.value_info[:]
    with _quiet():
        quantize_dynamic(model, target, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)


def load_onnx(path: Path, threads: int | None = None, batch: int | None = None) -> Callable[[Inputs], list[Tensor]]:
    """A function that runs the file with ONNX Runtime on the CPU.

    `threads` None lets ONNX Runtime choose; with `batch` it is prepared for so many images alone. Idle threads do not
    spin: whoever runs beside them would be slower.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own optimizations
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    if batch is not None:
        options.add_free_dimension_override_by_name(BATCH, batch)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def loaded(inputs: Inputs) -> list[Tensor]:
        # An argument that the graph does not read is none of its inputs.
        given = {name: inputs[name].numpy() for name in names}
        return [torch.from_numpy(array) for array in session.run(None, given)]

    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and the quantizer log and warn about themselves."""
    logger = logging.getLogger()
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
