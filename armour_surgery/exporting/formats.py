"""`export`: a model in a format that other tools load, checked by loading it there."""

import importlib.metadata
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery import __version__, hosts
from armour_surgery.copies import full_copy
from armour_surgery.deployment.pipeline import RUNTIMES
from armour_surgery.deployment.pipeline import deploy as deployed
from armour_surgery.errors import ExportError, FolderError, UsageError
from armour_surgery.exporting.as_saved import LIBRARIES, write_saved
from armour_surgery.exporting.comparison import Inputs, answers, batches, largest_error, other_size
from armour_surgery.exporting.compat import ORIGIN, write_compat
from armour_surgery.exporting.onnx import load_onnx, to_int8, write_onnx
from armour_surgery.exporting.openvino import load_openvino, write_openvino
from armour_surgery.exporting.packages import require
from armour_surgery.exporting.pt2 import load_pt2, write_pt2
from armour_surgery.hosts.library_folder import read_converted, read_folder
from armour_surgery.images.for_calibration import SYNTHETIC
from armour_surgery.notes import ArmourWarning
from armour_surgery.patching import on_cpu_by_default
from armour_surgery.records import SurgeryPlan
from armour_surgery.report.whole_file import check_target
from armour_surgery.rewrite.fixed import FixedProjection
from armour_surgery.saving.occupied import refuse_foreign
from armour_surgery.spelled import names_only
from armour_surgery.surgery.targets import plain_example_of

__all__ = ["FORMATS", "Exported", "check_export", "export"]

# Format and the ending of its file; a folder has none.
FORMATS = {"timm": "", "hf": "", "compat": "", "onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
_GRAPHS = ("onnx", "openvino", "pt2")
# The largest relative difference of outputs in other runtimes; in torch the operations are the same ones.
_NEAR = {"onnx": 1e-4, "openvino": 1e-4, "pt2": 1e-6, "compat": 1e-5, "timm": 1e-6, "hf": 1e-6}
_CHECKERS = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "torch"}


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its outputs are from the model's: max|a - b| / max|a| over all outputs.

    `bytes` are those of all files, `checked_with` is what loaded it again.
    """

    model: str
    format: str
    out: str
    bytes: int
    max_relative_error: float
    checked_with: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def check_export(
    path: str | Path, format: str, *, deploy: bool = False, int8: bool = False, remote_code: bool = False
) -> None:
    """Refuse what cannot be, before the work.

    Raises:
        UsageError: there is no such format, an option is not for it, or the file is named otherwise.
        ExportError: a package that the format needs is not installed.
        FolderError: nothing can be written there.
    """
    if format not in FORMATS:
        raise UsageError(f"--format {format!r} is none; choose {', '.join(FORMATS)}")
    for option, asked, formats in (
        ("--deploy", deploy, _GRAPHS),
        ("--int8", int8, ("onnx",)),
        ("--remote-code", remote_code, ("hf",)),
    ):
        if asked and format not in formats:
            raise UsageError(f"{option} is for --format {' or '.join(formats)}, not for {format}; leave it out")
    suffix = FORMATS[format]
    if suffix and Path(path).suffix != suffix:
        raise UsageError(f"--out {str(path)!r}: a file of --format {format} ends in {suffix}; name it so")
    require(format)
    if suffix:
        check_target(path, f"{format} file")
    else:
        refuse_foreign(Path(path), lambda folder: (folder / ORIGIN).is_file())


@on_cpu_by_default
def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str,
    deploy: bool = False,
    int8: bool = False,
    remote_code: bool = False,
    images: object = SYNTHETIC,
    into: nn.Module | None = None,
    name: str | None = None,
) -> Exported:
    """Write a model for other tools, load it there, and compare its outputs with the model's; in eval mode.

    What is written appears whole, and only after its outputs were found equal within rounding (but for `int8`, whose
    difference is told). The model stays as it is, and may be unconverted for graphs.

    Args:
        format: `timm`, `hf`: what `save` writes, for `timm.create_model("local-dir:...")` and transformers'
            `from_pretrained` after `import armour_surgery`; `compat`: weights of the original's own shape, for timm,
            transformers, torchvision or the user's class, with what is shared stored twice; `onnx` (ONNX Runtime),
            `openvino` (IR), `pt2` (torch.export): graphs that take any batch size, and other image sizes where the
            model does; a warning says where torch can follow it for one size alone.
        deploy: make it ready for inference first, as `armour_surgery.deploy` does.
        remote_code: for `hf`, a modeling file beside it, which loads with `trust_remote_code=True` and without this
            tool. It knows the kinds of calls that were made until now (training or not, these image sizes).
        int8: for `onnx`, weights of matrix products in 8 bits (dynamic quantization).
        images: what outputs are compared on: a folder of photos, "synthetic" (drawn), or batches.
        into: for `compat` and a model of no library, a fresh one.
        name: what the model is called in the file.

    Raises:
        UsageError: `format` is unknown, or an option is not for it.
        ExportError: the format cannot hold the model, its package is missing, or the outputs differ.
        ExampleInputError: it is not known what the model takes.
        FolderError: nothing can be written at `path`, or something else is there.
    """
    check_export(path, format, deploy=deploy, int8=int8, remote_code=remote_code)
    hosts.refuse_wrapped(model)
    plain_example_of(model, None)  # says what cannot be run on images
    target = Path(path)
    origin = _origin(model, name or type(model).__name__, deploy)
    with torch.inference_mode(False), torch.no_grad():
        if not FORMATS[format]:
            return _folder(model, format, target, origin, images, into, remote_code=remote_code)
        runtime = format if format in RUNTIMES else "torch"
        ready = deployed(model, runtime=runtime) if deploy else full_copy(model).eval()
        ready = ready.cpu()
        own = batches(ready, images)
        # torch takes an axis of size one for fixed.
        larger = other_size(ready, own[1])
        with _written_aside(target) as place:
            write = partial(_graph, format, ready, place=place, origin=origin, int8=int8)
            if larger is None:
                error = write(own, own[1], any_size=False)
            else:
                try:
                    # Many hosts leave their positions alone where images have the size that they were made for. In a
                    # graph of that branch they fit no other size; in one of larger images they are resized to any.
                    error = write([*own, larger], larger, any_size=True)
                except ExportError as problem:
                    error = write(own, own[1], any_size=False)
                    _tell_fixed(format, problem)
            size = _bytes_in(place.parent)
        if int8 and any(isinstance(module, FixedProjection) for module in model.modules()):
            _tell_coarse(error)
    return Exported(origin["model"], format, str(path), size, error, _checked_with(_CHECKERS[format]))


def _graph(
    format: str,
    model: nn.Module,
    compared: list[Inputs],
    traced_with: Inputs,
    *,
    any_size: bool,
    place: Path,
    origin: dict[str, Any],
    int8: bool,
) -> float:
    """Write the file, and run it; returns how far its outputs are from the model's."""
    wanted = [answers(model, inputs) for inputs in compared]
    load = _write(format, model, traced_with, place, origin, any_size=any_size, int8=int8)
    error = largest_error(wanted, compared, load, f"the {format} file")
    if not int8:
        _refuse_different(error, format)
    return error


def _tell_fixed(format: str, problem: ExportError) -> None:
    warnings.warn(
        f"the {format} file takes images of the model's own size alone, and the model takes others too; when it was "
        f"written for any size, {problem}",
        ArmourWarning,
        stacklevel=4,  # past `export` and `on_cpu_by_default`
    )


def _tell_coarse(error: float) -> None:
    warnings.warn(
        f"a fixed gauge makes the rounding of weights to 8 bits count for more: outputs differ by {error:.2g} in all. "
        "Compare with a conversion without gauge before you use it",
        ArmourWarning,
        stacklevel=4,  # past `export` and `on_cpu_by_default`
    )


def _write(
    format: str, model: nn.Module, inputs: Inputs, place: Path, origin: dict[str, Any], *, any_size: bool, int8: bool
) -> Callable[[Inputs], list[Tensor]]:
    """Write the file; returns what runs it."""
    if format == "pt2":
        write_pt2(model, inputs, place, origin, any_size=any_size)
        return load_pt2(place)
    with tempfile.TemporaryDirectory(dir=place.parent.parent) as aside:
        whole = Path(aside) / "model.onnx"
        write_onnx(model, inputs, whole if int8 or format == "openvino" else place, origin, any_size=any_size)
        if int8:
            to_int8(whole, place)
        if format == "openvino":
            write_openvino(whole, place, origin)
    return load_openvino(place) if format == "openvino" else load_onnx(place)


def _folder(
    model: nn.Module,
    format: str,
    target: Path,
    origin: dict[str, Any],
    images: object,
    into: nn.Module | None,
    *,
    remote_code: bool,
) -> Exported:
    """A folder of weights, loaded by the library that it is for."""
    ready = full_copy(model).cpu().eval()
    compared = batches(ready, images)
    if format in LIBRARIES and (larger := other_size(ready, compared[-1])) is not None:
        compared.append(larger)
    wanted = [answers(ready, inputs) for inputs in compared]
    with _written_aside(target) as folder:
        if format in LIBRARIES:
            source = write_saved(ready, format, folder, origin, compared, remote_code=remote_code)
            loaded = read_converted(folder, ready, source, by_its_code=remote_code)
        else:
            stock, source = write_compat(ready, into, folder, origin)
            loaded = read_folder(folder, stock, source, into)
        error = largest_error(wanted, compared, partial(answers, loaded), "what was written")
        _refuse_different(error, format)
        size = _bytes_in(folder)
    return Exported(origin["model"], format, str(target), size, error, _checked_with(source.library))


def _refuse_different(error: float, format: str) -> None:
    if not error <= _NEAR[format]:
        raise ExportError(
            f"the outputs of what was written differ by {error:.1e} (relative), and {_NEAR[format]:.0e} is what "
            f"rounding may do; nothing was written. In {format} this model does not compute the same"
        )


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _origin(model: nn.Module, name: str, deploy: bool) -> dict[str, Any]:
    """What a file says of where it came from."""
    surgery: SurgeryPlan | None = getattr(model, "surgery", None)
    # What is handed on says nothing of where files lay on this machine.
    origin: dict[str, Any] = {"model": names_only(name), "class": type(model).__name__, "deployed": deploy}
    origin["versions"] = {"armour-surgery": __version__, "torch": torch.__version__}
    if surgery is not None:
        source = surgery.source
        origin |= {
            "converted_from": names_only(source.name) if source else None,
            "license": source.license if source else None,
        }
        origin |= {"mode": surgery.mode, "init": surgery.init, "params": surgery.params_after}
    return origin


def _checked_with(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"torch {torch.__version__}"  # a class of the user's own


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """The target's name in a folder of its own; what is there by then is moved into place when the block ends well."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".armour-", dir=target.parent))
    place = aside / "files" / target.name
    place.parent.mkdir()
    try:
        yield place
        # The one that was named comes last: where it is, the others are.
        for made in sorted(place.parent.iterdir(), key=lambda made: made == place):
            final = target.parent / made.name
            for file in (made, *made.rglob("*")):
                file.chmod(0o755 if file.is_dir() else 0o644)  # mkdtemp and safetensors write for the owner alone
            if final.is_dir():
                os.replace(final, aside / "earlier")
            os.replace(made, final)
    except OSError as error:
        raise FolderError(f"{target} could not be written: {error.strerror or error}; name another place") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
