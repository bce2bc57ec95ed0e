"""The packages that formats and runtimes need, and the extras that bring them."""

import importlib.util

from armour_surgery.errors import ExportError

__all__ = ["require"]

_ONNX = ("onnx", "onnxscript", "onnxruntime")
# By format, or runtime, which is what its extra is called too. OpenVINO reads what was written as ONNX.
_NEEDED = {"onnx": _ONNX, "openvino": (*_ONNX, "openvino")}


def require(format: str) -> None:
    """Say which packages of a format, or runtime, are missing, and which extra brings them; many need none.

    Raises:
        ExportError: one of them is not installed.
    """
    missing = [package for package in _NEEDED.get(format, ()) if importlib.util.find_spec(package) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ExportError(
            f"{format} needs {', '.join(missing)}, which {verb} not installed; pip install 'armour-surgery[{format}]'"
        )
