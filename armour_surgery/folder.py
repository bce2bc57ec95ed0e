"""The folder format: `model.safetensors`, `surgery.json`, `README.md`. No pickle anywhere.

Loading rebuilds the host on the meta device from its library alone, does the surgery again from the plan, and fills in
the weights strictly. A folder comes from anywhere: nothing in it is believed before it is checked.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from armour_surgery import hosts
from armour_surgery.conversion import replay, surgery_of
from armour_surgery.errors import (
    ArmourError,
    ConversionError,
    CorruptFileError,
    DiscoveryError,
    FolderError,
    KeyMismatchError,
    NotOursError,
    SchemaError,
    TraceError,
)
from armour_surgery.hosts.skeleton import changed_attributes, first_difference
from armour_surgery.model_card import model_card
from armour_surgery.sites import Source, SurgeryPlan

__all__ = ["SCHEMA_VERSION", "check_output", "is_saved_folder", "load", "read_plan", "save"]

SCHEMA_VERSION = 1
PLAN, WEIGHTS, CARD = "surgery.json", "model.safetensors", "README.md"
_KEYS = {"schema_version", "tool", "versions", "weights", "sha256", "tied", "buffer_dtypes", "plan"}
_TOOL = "armour-surgery"


def is_saved_folder(path: str | Path) -> bool:
    """Whether a path is a folder with a `surgery.json` in it."""
    return (Path(path) / PLAN).is_file()


def check_output(path: str | Path) -> None:
    """Make sure that a folder may be written at `path`: nothing is there, an empty folder, or one of ours.

    Raises:
        NotOursError: something else is there.
    """
    target = Path(path)
    if target.is_dir() and (is_saved_folder(target) or not any(target.iterdir())):
        return
    if target.exists() or target.is_symlink():
        what = "is a folder with other things in it" if target.is_dir() else "exists and is not a folder"
        raise NotOursError(f"{target} {what}, so nothing was written; name another --out")


def save(model: nn.Module, path: str | Path, *, model_args: Mapping[str, Any] | None = None) -> Path:
    """Write a converted model to a folder; `load` gives back a model with bit-identical outputs.

    The folder appears whole or not at all: it is written beside its place and renamed. A folder of ours that is there
    already is replaced, and keeps what else lies in it.

    Args:
        model: what `convert` returned, trained or not.
        model_args: builder arguments that the model itself does not show (timm and torchvision keywords, config
            entries of transformers).

    Raises:
        UsageError: the model is not converted.
        FolderError: it cannot be rebuilt from its library (the message says what differs),
            or could not be written.
        NotOursError: `path` exists and is not ours.
    """
    surgery = surgery_of(model)
    target = Path(path)
    check_output(target)
    source = _rebuildable(model, surgery, dict(model_args or {}))
    tensors, tied = _tensors(model)
    try:
        with _written_aside(target) as folder:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            os.chmod(folder / WEIGHTS, 0o644)
            document = {
                "schema_version": SCHEMA_VERSION,
                "tool": _TOOL,
                "versions": _versions(),
                "weights": WEIGHTS,
                "sha256": _digest(folder / WEIGHTS),
                "tied": tied,
                "buffer_dtypes": _buffer_dtypes(model),
                "plan": replace(surgery, source=source).to_dict(),
            }
            (folder / CARD).write_text(model_card(replace(surgery, source=source), target.name), encoding="utf-8")
            (folder / PLAN).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise FolderError(f"could not write {target}: {error}; what was there before is untouched") from error
    return target


def load(path: str | Path) -> nn.Module:
    """Rebuild a saved model, in eval mode, with bit-identical outputs.

    Raises:
        SchemaError: no such folder, or `surgery.json` is unreadable, of another schema, or names what it must not.
        CorruptFileError: the weights are truncated or were changed after saving.
        KeyMismatchError: tensors are missing, left over or of the wrong shape.
    """
    folder = Path(path)
    document, surgery = _read(folder)
    if surgery.source is None:
        raise SchemaError(f"{folder / PLAN} does not say how to build the model")
    weights = _weights_path(folder, document["weights"])
    tensors = _read_weights(weights, document["sha256"])
    try:
        model = replay(hosts.build(surgery.source), surgery)
    except (ConversionError, DiscoveryError, TraceError) as error:
        raise SchemaError(f"{folder / PLAN} does not fit its own model: {error}") from error
    tied = document["tied"]
    _fill(model, tensors, tied, weights)
    for name, dtype in document["buffer_dtypes"].items():
        owner, _, attribute = name.rpartition(".")
        buffer = dict(model.named_buffers()).get(name)
        if buffer is None or not hasattr(torch, str(dtype)):
            raise SchemaError(f"{folder / PLAN} names a buffer {name!r} of type {dtype!r}, which there is not")
        setattr(model.get_submodule(owner), attribute, buffer.to(getattr(torch, str(dtype))))
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise KeyMismatchError(f"{weights} leaves {left[0]} and {len(left) - 1} more tensors of the model empty")
    return model.eval()


def read_plan(path: str | Path) -> SurgeryPlan:
    """The plan of a saved folder, without its weights.

    Raises:
        SchemaError: see `load`.
    """
    return _read(Path(path))[1]


def _rebuildable(model: nn.Module, surgery: SurgeryPlan, model_args: dict[str, Any]) -> Source:
    """A source from which the host is rebuilt, and after the surgery equals the model in all but weights."""
    candidates: list[Source] = []
    if surgery.source is not None:
        given = surgery.source
        candidates.append(replace(given, arguments={**given.arguments, **model_args}))
    try:
        # After the conversion the head may have changed: read the arguments off the model as it is.
        base = surgery.source.arguments if surgery.source is not None else {}
        candidates.append(hosts.outline(model, model_args))
        candidates.append(hosts.outline(model, {**base, **model_args}))
    except FolderError as error:
        if not candidates:
            raise FolderError(
                f"{error}; a saved folder could not build it again. Save its state_dict instead"
            ) from error
    problem = ""
    for candidate in candidates:
        try:
            built = replay(hosts.build(replace(candidate, attributes={})), surgery)
        except ArmourError as error:
            problem = problem or str(error)
            continue
        difference = first_difference(built, model)
        if difference is None:
            return replace(candidate, attributes=changed_attributes(built, model))
        problem = problem or difference
    raise FolderError(
        f"{type(model).__name__} could not be rebuilt from its library: {problem}. Pass "
        "model_args={...}: the arguments that the model was built with"
    )


def _tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What goes into the file, each storage once, and which other names share one."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise FolderError(f"{name} is on the meta device: the model has no weights to save")
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in places:
            tied[name] = places[place]
        else:
            places[place] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, tied


def _buffer_dtypes(model: nn.Module) -> dict[str, str]:
    """Types of the floating buffers that are not in the state dict: they are rebuilt in float32."""
    saved = set(model.state_dict())
    return {
        name: str(buffer.dtype)[6:]
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point() and buffer.dtype is not torch.float32
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in ("armour-surgery", "torch", "timm", "transformers", "torchvision", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends well, and is gone when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder.chmod(0o755)
        yield folder
        if target.is_dir():
            written = {entry.name for entry in folder.iterdir()}
            for entry in list(target.iterdir()):
                if entry.name not in written:
                    # Logs and checkpoints that a training run put there belong to the user.
                    os.rename(entry, folder / entry.name)
            old = folder.with_name(f"{folder.name}.old")
            os.rename(target, old)
            os.rename(folder, target)
            shutil.rmtree(old)
        else:
            os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path) -> tuple[dict[str, Any], SurgeryPlan]:
    path = folder / PLAN
    if not path.is_file():
        raise SchemaError(f"{folder} is not a folder saved by armour-surgery: there is no {PLAN} in it")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SchemaError(f"{path} is not readable JSON ({error}); save the model again") from error
    if not isinstance(document, dict) or document.get("tool") != _TOOL:
        raise SchemaError(f"{path} was not written by armour-surgery")
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise SchemaError(
            f"{path} has schema version {version!r}, and this armour-surgery reads {SCHEMA_VERSION}; "
            "use the version that wrote it"
        )
    if set(document) != _KEYS:
        wrong = sorted(set(document) ^ _KEYS)
        raise SchemaError(f"{path} lacks or adds {', '.join(wrong)}; save the model again")
    try:
        surgery = SurgeryPlan.from_dict(document["plan"])
        _check_types(document, surgery)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SchemaError(f"the plan in {path} is not one: {type(error).__name__} {error}") from error
    return document, surgery


def _check_types(document: dict[str, Any], surgery: SurgeryPlan) -> None:
    """The parts that are used before the surgery is replayed.

    Raises:
        TypeError: something is of another kind than `save` writes.
    """
    strings = [document["weights"], document["sha256"], surgery.mode, surgery.init]
    strings += [text for site in surgery.sites for text in (site.fqn, site.mode, site.layout)]
    for mapping in (document["tied"], document["buffer_dtypes"]):
        strings += [*mapping.keys(), *mapping.values()]
    for name, shape, dtype in surgery.example:
        strings += [name, dtype]
        if not all(isinstance(size, int) and 0 < size < 100_000 for size in shape):
            raise TypeError(f"example shape {shape}")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise TypeError(f"example type {dtype!r}")
    wrong = [text for text in strings if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"{wrong[0]!r} is not text")


def _weights_path(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).name != name or not path.resolve().is_relative_to(folder.resolve()):
        raise SchemaError(f"{folder / PLAN} names the weights {name!r}, which is outside its folder")
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing; copy the whole folder again")
    return path


def _read_weights(path: Path, digest: str) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in list(stream.keys())}
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path} is truncated or damaged ({error}); copy it again") from error
    if _digest(path) != digest:
        raise CorruptFileError(f"{path} is not the file that was saved (its sha256 differs); copy it again")
    return tensors


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], tied: dict[str, str], path: Path) -> None:
    """Put the tensors in, all of them and nothing else, and tie again what was tied."""
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in tensors and name not in tied]
    extra = [name for name in tensors if name not in wanted] + [name for name in tied if name not in wanted]
    loose = [name for name in tied.values() if name not in tensors]
    wrong = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    problems = [
        ("lacks", missing),
        ("has left over", extra),
        ("ties to absent", loose),
        ("has the wrong shape for", wrong),
    ]
    found = [f"{verb} {', '.join(names[:3])}{' and more' * (len(names) > 3)}" for verb, names in problems if names]
    if found:
        raise KeyMismatchError(f"{path} {'; '.join(found)}: it does not belong to this surgery.json")
    model.load_state_dict({**tensors, **{name: tensors[other] for name, other in tied.items()}}, assign=True)
    for name, other in tied.items():
        owner, _, attribute = name.rpartition(".")
        source, _, original = other.rpartition(".")
        setattr(model.get_submodule(owner), attribute, getattr(model.get_submodule(source), original))
