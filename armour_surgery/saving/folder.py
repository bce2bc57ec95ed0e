"""The folder format: `model.safetensors`, `surgery.json`, `README.md`. No pickle anywhere.

Loading rebuilds the host on the meta device from its library alone, does the surgery again from the plan, and fills in
the weights strictly. A folder comes from anywhere: nothing in it is believed before it is checked.
"""

import importlib.metadata
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from armour_surgery import hosts
from armour_surgery.errors import (
    ArmourError,
    CorruptFileError,
    FolderError,
    KeyMismatchError,
    NotOursError,
    SchemaError,
)
from armour_surgery.hosts.limits import Limits
from armour_surgery.hosts.skeleton import changed_attributes, first_difference
from armour_surgery.records import Source, SurgeryPlan
from armour_surgery.saving.document import LARGEST, SCHEMA_VERSION, TOOL, Document, read_document
from armour_surgery.saving.model_card import model_card
from armour_surgery.saving.replay import replay
from armour_surgery.saving.staging import (
    CARD,
    PATIENCE,
    PLAN,
    STAGE,
    WEIGHTS,
    check_stage,
    digest_of,
    state_of,
    stays_inside,
    written_aside,
)
from armour_surgery.surgery.perform import surgery_of
from armour_surgery.surgery.targets import refuse_deployed

__all__ = ["TRAINING", "check_output", "is_saved_folder", "load", "read_plan", "save"]

# A training run's record; it makes a folder ours before there is a model in it.
TRAINING = "training.json"
# Each takes a moment to read, however small it is.
MOST_TENSORS = 50_000


def is_saved_folder(path: str | Path) -> bool:
    """Whether a path is a folder with a `surgery.json` in it."""
    return (Path(path) / PLAN).is_file()


def _is_ours(path: Path) -> bool:
    """Whether a folder's `surgery.json`, or the record of a run, says that this tool wrote it."""
    for name in (PLAN, TRAINING):
        try:
            with (path / name).open("rb") as stream:
                document = json.loads(stream.read(LARGEST + 1))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(document, dict) and document.get("tool") == TOOL:
            return True
    return False


def check_output(path: str | Path) -> None:
    """Make sure that a folder may be written at `path`: nothing is there, an empty folder, or one of ours.

    Raises:
        NotOursError: something else is there.
    """
    target = Path(path)
    if target.is_dir() and (_is_ours(target) or not any(target.iterdir())):
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
        UsageError: the model is not converted, or a wrapper is around it.
        AlreadyDeployedError: it is deployed; save it first, and deploy it after loading.
        FolderError: it cannot be rebuilt from its library (the message says what differs), or could not be written.
        NotOursError: `path` exists and is not ours.
    """
    hosts.refuse_wrapped(model)
    refuse_deployed(model)
    surgery = surgery_of(model)
    target = Path(path)
    check_output(target)
    target = target.resolve()  # a link stays a link, and the folder behind it is written
    surgery = replace(surgery, source=_rebuildable(model, surgery, dict(model_args or {})))
    tensors, tied = _tensors(model)
    try:
        with written_aside(target) as folder:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            # safetensors may write for the owner alone, and a folder is there to be handed on.
            os.chmod(folder / WEIGHTS, 0o644)
            document = {
                "schema_version": SCHEMA_VERSION,
                "tool": TOOL,
                "versions": _versions(),
                "weights": WEIGHTS,
                "sha256": digest_of(folder / WEIGHTS),
                "tied": tied,
                "buffer_dtypes": _buffer_dtypes(model),
                "plan": surgery.to_dict(),
            }
            (folder / CARD).write_text(model_card(surgery, target.name), encoding="utf-8")
            text = json.dumps(document, indent=1, allow_nan=False) + "\n"
            if len(text) > LARGEST:
                raise FolderError(
                    f"the plan has {len(text) // 2**20} MiB, and {LARGEST // 2**20} are read at most; convert again "
                    "with the mode that was chosen instead of a budget, or with fewer label names"
                )
            (folder / PLAN).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise FolderError(f"could not write {target}: {error}; what was there before is untouched") from error
    return target


def load(path: str | Path) -> nn.Module:
    """Rebuild a saved model, in eval mode, with bit-identical outputs.

    Raises:
        SchemaError: no such folder, or `surgery.json` is unreadable, of another schema, or names what it must not.
        CorruptFileError: the weights are truncated or were changed after saving.
        KeyMismatchError: tensors are missing, left over, of the wrong shape or of another kind of numbers.
        FolderError: there is a link among the unfinished files in it, or somebody writes to it all the time.
    """
    folder = Path(path)
    document, weights, tensors = _read_whole(folder)
    surgery = document.plan
    if surgery.source is None:
        raise SchemaError(f"{folder / PLAN} does not say how to build the model: its source is missing")
    limits = Limits(sum(tensor.numel() for tensor in tensors.values()), len(tensors) + len(document.tied))
    try:
        with limits.in_time():
            model = replay(hosts.build(surgery.source, limits), surgery)
    except Exception as error:
        # Whatever a plan that was edited makes a host or torch run into, it is the plan that is wrong.
        kind = "" if isinstance(error, ArmourError) else f"{type(error).__name__}: "
        raise SchemaError(f"{folder / PLAN} does not fit its own model: {kind}{error}") from error
    _fill(model, tensors, document.tied, weights)
    _cast_buffers(model, document.buffer_dtypes, folder)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise KeyMismatchError(f"{weights} leaves {left[0]} and {len(left) - 1} more tensors of the model empty")
    return model.eval()


def read_plan(path: str | Path) -> SurgeryPlan:
    """The plan of a saved folder, without its weights.

    Raises:
        SchemaError: see `load`.
    """
    return read_document(Path(path)).plan


def _rebuildable(model: nn.Module, surgery: SurgeryPlan, model_args: dict[str, Any]) -> Source:
    """A source from which the host is rebuilt, and after the surgery equals the model in all but weights."""
    candidates: list[Source] = []
    base: dict[str, Any] = {}
    if surgery.source is not None:
        base = surgery.source.arguments
        candidates.append(replace(surgery.source, arguments={**base, **model_args}))
    try:
        # After the conversion the head may have changed: read the arguments off the model as it is.
        candidates.append(hosts.outline(model, model_args))
        candidates.append(hosts.outline(model, {**base, **model_args}))
    except FolderError as error:
        if not candidates:
            raise FolderError(
                f"{error}; a saved folder could not build it again. Save its state_dict instead"
            ) from error
    # What is saved has to be within what `load` allows.
    parameters = list(model.parameters())
    limits = Limits(sum(parameter.numel() for parameter in parameters), len(parameters))
    # Of several problems the first is told, since the first candidate is the likeliest.
    problem = ""
    for candidate in candidates:
        try:
            built = replay(hosts.build(replace(candidate, attributes={}), limits), surgery)
        except ArmourError as error:
            problem = problem or str(error)
            continue
        difference = first_difference(built, model)
        if difference is None:
            return replace(candidate, attributes=changed_attributes(built, model))
        problem = problem or difference
    raise FolderError(
        f"{type(model).__name__} could not be rebuilt from its library: {problem}. Pass model_args={{...}}: the "
        "arguments that the model was built with; if it was changed after that, keep its state_dict()"
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
        # Empty tensors have no storage to share, and all the same address.
        if tensor.numel() and place in places:
            tied[name] = places[place]
        else:
            places[place] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, tied


def _buffer_dtypes(model: nn.Module) -> dict[str, str]:
    """Types of the floating buffers that are not in the state dict: they are rebuilt in float32."""
    saved = set(model.state_dict())
    dtypes = {}
    for name, buffer in model.named_buffers():
        if name not in saved and buffer.is_floating_point() and buffer.dtype is not torch.float32:
            dtypes[name] = str(buffer.dtype).removeprefix("torch.")
    return dtypes


def _cast_buffers(model: nn.Module, dtypes: Mapping[str, str], folder: Path) -> None:
    """Give rebuilt buffers the types of `_buffer_dtypes`."""
    for name, type_name in dtypes.items():
        owner, _, attribute = name.rpartition(".")
        buffer, dtype = dict(model.named_buffers()).get(name), getattr(torch, type_name, None)
        # `type_name` comes from a file, and torch has attributes of many kinds.
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if buffer is None or not buffer.is_floating_point() or not floating:
            raise SchemaError(f"{folder / PLAN} names a buffer {name!r} of type {type_name!r}, which there is not")
        setattr(model.get_submodule(owner), attribute, buffer.to(dtype))


def _versions() -> dict[str, str]:
    """What the folder was written with, for whoever has to load it in some years."""
    versions = {}
    for package in ("armour-surgery", "torch", "timm", "transformers", "torchvision", "safetensors"):
        # A library whose models nobody here uses need not be installed.
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _read_whole(folder: Path) -> tuple[Document, Path, dict[str, torch.Tensor]]:
    """A plan, where its weights lie, and these; all of one version, also while somebody writes a new one."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        before = state_of(folder)
        try:
            document = read_document(folder)
            weights = _weights_path(folder, document)
            tensors = _read_weights(weights, document.sha256)
        except CorruptFileError:
            if state_of(folder) == before:
                raise
        else:
            if state_of(folder) == before:
                return document, weights, tensors
        time.sleep(0.01)
    raise FolderError(f"{folder} was written again and again for {PATIENCE:.0f} s; load it when nobody writes to it")


def _weights_path(folder: Path, document: Document) -> Path:
    path = folder / WEIGHTS
    if document.weights != WEIGHTS or not stays_inside(folder, path):
        raise SchemaError(
            f"{folder / PLAN} takes its weights from {document.weights!r}, and only {WEIGHTS} in its own folder is "
            "read, nothing outside"
        )
    check_stage(folder)
    staged = folder / STAGE / WEIGHTS
    with suppress(OSError):  # a writer moves it away, or takes it back
        if staged.is_file() and digest_of(staged) == document.sha256:
            return staged  # saving was cut short after the new surgery.json had been put in place
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing; copy the whole folder again")
    return path


def _read_weights(path: Path, digest: str) -> dict[str, torch.Tensor]:
    tensors = {}
    try:
        with safe_open(path, framework="pt") as stream:
            names = list(stream.keys())
            if len(names) > MOST_TENSORS:
                raise CorruptFileError(f"{path} holds {len(names)} tensors, and no model has more than {MOST_TENSORS}")
            for name in names:
                # Cloned: in the file, which is mapped, tensors begin where their neighbors end, and for memory that is
                # not aligned torch takes other kernels, whose sums round differently.
                tensors[name] = stream.get_tensor(name).clone()
        found = digest_of(path)
    except (SafetensorError, OSError, RuntimeError) as error:  # torch opens the file too, with errors of its own
        raise CorruptFileError(f"{path} is truncated or damaged ({error}); copy it again") from error
    if found != digest:
        raise CorruptFileError(f"{path} is not the file that was saved (its sha256 differs); copy it again")
    return tensors


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], tied: dict[str, str], path: Path) -> None:
    """Put the tensors in, all of them and nothing else, and tie again what was tied."""
    wanted = model.state_dict()
    wrong, numbers = [], []
    for name, other in {**{name: name for name in tensors}, **tied}.items():
        if name not in wanted or other not in tensors:
            continue
        tensor, place = tensors[other], wanted[name]
        said = name if name == other else f"{name}, tied to {other}:"
        if tensor.shape != place.shape:
            wrong.append(f"{said} {tuple(tensor.shape)} instead of {tuple(place.shape)}")
        # A model may have been saved in another precision than it is built in, and never in another kind of number.
        elif tensor.dtype != place.dtype and not (tensor.is_floating_point() and place.is_floating_point()):
            numbers.append(f"{said} {tensor.dtype} instead of {place.dtype}")
    problems: list[str] = []
    for verb, names in (
        ("lacks", [name for name in wanted if name not in tensors and name not in tied]),
        ("has in full what is tied:", [name for name in tied if name in tensors]),
        ("has left over", [name for name in (*tensors, *tied) if name not in wanted]),
        ("ties to absent", [name for name in tied.values() if name not in tensors]),
        ("has the wrong shape for", wrong),
        ("has the wrong kind of numbers for", numbers),
    ):
        if names:
            problems.append(f"{verb} {', '.join(names[:3])}{' and more' * (len(names) > 3)}")
    if problems:
        raise KeyMismatchError(f"{path} {'; '.join(problems)}: it does not belong to this surgery.json")
    whole = dict(tensors)
    for name, other in tied.items():
        whole[name] = tensors[other]
    # Assigned and not copied: the model's own parameters are on the meta device, and have nowhere to copy to.
    model.load_state_dict(whole, assign=True)
    # Loading makes a parameter of its own for each name, so that ties are gone until here.
    for name, other in tied.items():
        owner, _, attribute = name.rpartition(".")
        source, _, original = other.rpartition(".")
        setattr(model.get_submodule(owner), attribute, getattr(model.get_submodule(source), original))
