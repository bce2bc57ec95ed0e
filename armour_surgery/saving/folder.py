"""The folder format: `model.safetensors`, `surgery.json`, `README.md`, and `config.json` for timm and transformers.

Loading rebuilds the host on the meta device from its library alone, does the surgery again from the plan, and fills in
the weights strictly. A folder comes from anywhere: nothing in it is believed before it is checked. No pickle anywhere.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from armour_surgery import hosts
from armour_surgery.copies import meta_copy
from armour_surgery.errors import (
    ArmourError,
    FolderError,
    SchemaError,
    UsageError,
)
from armour_surgery.hosts.gone import placeholders
from armour_surgery.hosts.library_config import write_config
from armour_surgery.hosts.limits import Limits
from armour_surgery.hosts.skeleton import changed_attributes, first_difference
from armour_surgery.hosts.weights_file import digest_of
from armour_surgery.patching import on_cpu_by_default
from armour_surgery.records import Source, SurgeryPlan
from armour_surgery.saving.document import LARGEST, SCHEMA_VERSION, TOOL, installed_versions, read_document
from armour_surgery.saving.filling import fill
from armour_surgery.saving.from_hub import folder_of_plan, whole_folder
from armour_surgery.saving.model_card import model_card
from armour_surgery.saving.occupied import AS_CONVERTED, TRAINING, check_output, check_replaceable
from armour_surgery.saving.reading import read_whole
from armour_surgery.saving.replay import replay
from armour_surgery.saving.staging import (
    CARD,
    PLAN,
    WEIGHTS,
    written_aside,
)
from armour_surgery.surgery.perform import surgery_of
from armour_surgery.surgery.targets import refuse_converted, refuse_deployed

__all__ = ["distinct_tensors", "find_folder", "load", "read_plan", "rebuildable", "save", "save_conversion"]


def find_folder(path: str | Path) -> Path:
    """A saved folder on this machine: `path` itself, or what hf-hub:ORG/NAME means, downloaded if it has to be.

    Raises:
        UnknownModelError: there is no such repository, or none that may be read.
        HubUnreachableError: it is not in the cache and the hub did not answer.
    """
    if (Path(path) / PLAN).is_file():
        return Path(path)
    return whole_folder(str(path)) or Path(path)


@on_cpu_by_default
def save(model: nn.Module, path: str | Path, *, model_args: Mapping[str, Any] | None = None) -> Path:
    """Write a converted model to a folder; `load` gives back a model with bit-identical outputs.

    Modules inside of a model that were converted by themselves and put back are saved with it. A model of no library
    is saved too; `load` then wants a fresh one to do the surgery on (`into=`).

    The folder appears whole or not at all: it is written beside its place and renamed. A folder of ours that is there
    already is replaced, and keeps what else lies in it.

    Args:
        model: what `convert` returned, trained or not.
        model_args: builder arguments that the model itself does not show (timm and torchvision keywords, config
            entries of transformers).

    Raises:
        UsageError: the model is not converted, or a wrapper is around it; or `model_args` for a model of no library.
        AlreadyDeployedError: it is deployed; save it first, and deploy it after loading.
        FolderError: it cannot be rebuilt from its library (the message says what differs), or could not be written.
        NotOursError: `path` exists and is not ours.
    """
    hosts.refuse_wrapped(model)
    for module in model.modules():
        refuse_deployed(module)  # a part of it may be
    surgery = surgery_of(model)
    check_output(path)
    return _write(model, surgery, Path(path), dict(model_args or {}), {})


@on_cpu_by_default
def save_conversion(model: nn.Module, path: str | Path, *, force: bool = False) -> Path:
    """`save` for a model as `convert` returned it: the folder may be replaced by another conversion of that model.

    `force` replaces whatever folder is there, and a training run's record with it; other files stay.

    Raises:
        NotOursError, OccupiedError: see `occupied.check_replaceable`; and what `save` raises.
    """
    surgery = surgery_of(model)
    target = Path(path)
    check_replaceable(target, surgery.source, force=force)
    written = _write(model, surgery, target, {}, AS_CONVERTED)
    (written / TRAINING).unlink(missing_ok=True)
    return written


def _write(
    model: nn.Module, surgery: SurgeryPlan, target: Path, model_args: dict[str, Any], marks: Mapping[str, str]
) -> Path:
    target = target.resolve()  # a link stays a link, and the folder behind it is written
    source = rebuildable(model, surgery, model_args)
    surgery = replace(surgery, source=source)
    tensors, tied = distinct_tensors(model)
    if source.library == "transformers":
        hosts.mark_converted(model, surgery)  # its parts may have been converted by themselves
        tensors |= placeholders(model)
    try:
        with written_aside(target) as folder:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **marks})
            # safetensors may write for the owner alone, and a folder is there to be handed on.
            os.chmod(folder / WEIGHTS, 0o644)
            document = {
                "schema_version": SCHEMA_VERSION,
                "tool": TOOL,
                "versions": installed_versions(),
                "weights": WEIGHTS,
                "sha256": digest_of(folder / WEIGHTS),
                "tied": tied,
                "buffer_dtypes": _buffer_dtypes(model),
                "plan": surgery.to_dict(),
            }
            write_config(model, source, folder)
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


@on_cpu_by_default
def load(path: str | Path, into: nn.Module | None = None) -> nn.Module:
    """Rebuild a saved model, in eval mode, with bit-identical outputs.

    Args:
        path: a folder that `save` wrote, or `hf-hub:ORG/NAME`, where `push` put one (`hf-hub:ORG/NAME@REVISION` for a
            branch, a tag or a commit).
        into: a fresh model of the class that was converted, built as it was then; a model of no library needs it. The
            surgery is done again on it, in place, and it gets the weights; where anything does not fit, it stays as it
            was.

    Raises:
        SchemaError: no such folder, or `surgery.json` is unreadable, of another schema, names what it must not, or
            does not fit `into`.
        CorruptFileError: the weights are truncated or were changed after saving.
        KeyMismatchError: tensors are missing, left over, of the wrong shape or of another kind of numbers.
        FolderError: no library builds the model and `into` is missing; or there is a link among the unfinished files
            in it, or somebody writes to it all the time.
        UsageError: `into` is wrapped; AlreadyConvertedError: it is converted.
        UnknownModelError, HubUnreachableError: the hub has no such repository, or does not answer.
    """
    folder = find_folder(path)
    if into is not None:
        if not isinstance(into, nn.Module):
            raise UsageError(f"into is {into!r}, and has to be a model: a fresh one, such as MyViT()")
        hosts.refuse_wrapped(into)
        refuse_converted(into)
    document, tensors = read_whole(folder)
    source = document.plan.source
    if source is None:
        raise SchemaError(f"{folder / PLAN} does not say how to build the model: its source is missing")
    if into is None and source.library == hosts.OWN:
        raise FolderError(
            f"{folder} holds a {source.architecture} ({source.name}), which no library can build: pass a fresh one, "
            f"load({str(path)!r}, into={source.architecture}()), or --into FILE.py:CALLABLE on the command line"
        )
    limits = Limits(sum(tensor.numel() for tensor in tensors.values()), len(tensors) + len(document.tied))
    blame = f"it does not belong to this {PLAN}"
    if into is not None:
        blame = f"pass as into a model like the one that was saved, {source.name}, built with the same arguments"
        # Tried out on a copy, so that what does not fit leaves the caller's model as it was.
        copied = meta_copy(into, buffers=False)
        fill(_replayed(copied, document.plan, folder, limits), tensors, document, folder, blame)
    model = _replayed(into if into is not None else source, document.plan, folder, limits)
    fill(model, tensors, document, folder, blame)
    return model.eval()


def _replayed(host: nn.Module | Source, surgery: SurgeryPlan, folder: Path, limits: Limits) -> nn.Module:
    """A host, or one that is built, with the surgery done again."""
    given = isinstance(host, nn.Module)
    try:
        with limits.in_time():
            return replay(host if isinstance(host, nn.Module) else hosts.build(host, limits), surgery)
    except Exception as error:
        # Whatever a plan that was edited makes a host or torch run into, it is the plan that is wrong.
        kind = "" if isinstance(error, ArmourError) else f"{type(error).__name__}: "
        whose = f"the {type(host).__name__} that was passed as into" if given else "its own model"
        raise SchemaError(f"{folder / PLAN} does not fit {whose}: {kind}{error}") from error


def read_plan(path: str | Path) -> SurgeryPlan:
    """The plan of a saved folder, here or on the hub, without its weights.

    Raises:
        SchemaError, UnknownModelError, HubUnreachableError: see `load`.
    """
    local = (Path(path) / PLAN).is_file()
    return read_document((None if local else folder_of_plan(str(path))) or Path(path)).plan


def rebuildable(model: nn.Module, surgery: SurgeryPlan, model_args: dict[str, Any]) -> Source:
    """A source from which the host is rebuilt, and after the surgery equals the model in all but weights."""
    if surgery.source is not None and surgery.source.library == hosts.OWN:
        return _own(model, model_args, surgery.source)
    if hosts.library_of(model) is None:
        return _own(model, model_args, hosts.source_of_own(model))
    candidates: list[Source] = []
    base: dict[str, Any] = {}
    if surgery.source is not None:
        base = surgery.source.arguments
        candidates.append(replace(surgery.source, arguments={**base, **model_args}))
    try:
        # After the conversion the head may have changed: read the arguments off the model as it is.
        for arguments in (model_args, {**base, **model_args}):
            candidates.append(_of_same_origin(hosts.outline(model, arguments), surgery.source))
    except FolderError as error:
        if not candidates and hosts.is_users_class(model):
            return _own(model, model_args, hosts.source_of_own(model))
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
    if hosts.is_users_class(model):
        return _own(model, model_args, hosts.source_of_own(model))
    raise FolderError(
        f"{type(model).__name__} could not be rebuilt from its library: {problem}. Pass model_args={{...}}: the "
        "arguments that the model was built with; if it was changed after that, keep its state_dict()"
    )


def _of_same_origin(outlined: Source, source: Source | None) -> Source:
    """A source that was read off a model, with what only the one that loaded it knew of its weights."""
    if source is None:
        return outlined
    return replace(
        outlined,
        name=source.name,
        revision=source.revision,
        license=source.license,
        options=source.options,
        checkpoint=source.checkpoint,
    )


def _own(model: nn.Module, model_args: dict[str, Any], source: Source) -> Source:
    """What a folder says of a model that only its user can build."""
    if model_args:
        raise UsageError(
            f"model_args are for the builder of a library, and {type(model).__name__} is of none; leave them out: "
            "load(path, into=...) takes a fresh model, built with whatever arguments"
        )
    return source


def distinct_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
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
