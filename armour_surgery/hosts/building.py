"""How a model was built, and building it again: on the meta device, from the code of its library alone."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from armour_surgery.errors import ArmourError, FolderError, ModelError, SchemaError, UsageError
from armour_surgery.hosts.examples import keep_image_size
from armour_surgery.hosts.hub import offline, quiet
from armour_surgery.hosts.libraries import LIBRARIES, adapter, library_of
from armour_surgery.hosts.limits import Limits
from armour_surgery.hosts.skeleton import (
    WithoutDrawing,
    changed_attributes,
    first_difference,
    meta_parameters,
    restore_attributes,
    to_meta,
)
from armour_surgery.records import Source, SurgeryPlan

__all__ = ["build", "compared", "describe", "mark_converted", "outline"]

# Pixels; what a folder says of images is fed to the model later on.
LARGEST_IMAGE = 2**14


def describe(model: nn.Module, arguments: Mapping[str, Any] | None = None) -> Source:
    """How to build this unconverted model again, verified by building it.

    `arguments` are those of its builder, where the model does not show them: keyword arguments for timm and
    torchvision, config entries for transformers. They win over what was read off the model.

    The build has the same module types and state_dict keys and shapes; plain attributes that differ are listed.

    Raises:
        UsageError: `arguments` holds what JSON cannot.
        FolderError: the library is unknown, or what it builds differs; the message says where it differs first.
    """
    source, difference = compared(model, arguments)
    if difference:
        raise FolderError(
            f"{source.library} builds another {type(model).__qualname__} from {source.architecture} "
            f"{_short(source.arguments)}: {difference}. Pass model_args={{...}}: the arguments that the model was "
            "built with"
        )
    return source


def compared(model: nn.Module, arguments: Mapping[str, Any] | None = None) -> tuple[Source, str | None]:
    """How its library would build this unconverted model, and where what it builds differs first; None where nowhere.

    Raises:
        UsageError, FolderError: see `describe`.
    """
    kind = type(model).__qualname__
    try:
        # Through JSON and back: what is compared below is built from what a folder would hold.
        given: dict[str, Any] = json.loads(json.dumps(dict(arguments or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"model_args of {kind} must be JSON values (numbers, strings, lists): {error}") from error
    library = library_of(model)
    if library is None:
        raise FolderError(
            f"{type(model).__module__}.{kind} is not a model of timm, transformers or torchvision, so a saved folder "
            "could not build it again; save its state_dict, or unwrap the model (DataParallel, torch.compile) first"
        )
    try:
        source = adapter(library).source_of(model, given)
        built = build(source)
    except (ModelError, SchemaError) as error:
        raise FolderError(
            f"cannot describe this {kind}: {error}. Pass model_args={{...}}: the builder's arguments"
        ) from error
    difference = first_difference(built, model)
    if difference:
        return source, difference
    return replace(source, attributes=changed_attributes(built, model)), None


def outline(model: nn.Module, arguments: Mapping[str, Any]) -> Source:
    """How to build the model, read off it and off `arguments`, which win. Unlike `describe`, nothing is verified.

    Raises:
        FolderError: the library is unknown, or the model does not say what it is.
    """
    library = library_of(model)
    if library is None:
        raise FolderError(f"{type(model).__qualname__} is not a model of timm, transformers or torchvision")
    try:
        return adapter(library).source_of(model, dict(arguments))
    except ModelError as error:
        raise FolderError(str(error)) from error


def mark_converted(model: nn.Module, plan: SurgeryPlan | None = None) -> None:
    """Keep a converted model from being taken for an unconverted one by its library's own save and load.

    With the `plan` the library's own load does the surgery again, where it has a place for that.
    """
    if library_of(model) == "transformers":
        # The only library whose saved folders name a class that rebuilds the model from the type of its config.
        from armour_surgery.hosts.transformers_marks import mark

        mark(model, plan)


def build(source: Source, limits: Limits | None = None) -> nn.Module:
    """The host that `source` describes: Parameters on the meta device, buffers real and right, in eval mode.

    `source` may come from a file that nobody checked. Only registered names of the three libraries are built, and
    nothing is downloaded. With `limits` the sizes in it are not believed either.

    Raises:
        SchemaError: the source names a library, an architecture, an argument or an attribute that it must not, or a
            host that is beyond the limits.
    """
    if source.library not in LIBRARIES:
        raise SchemaError(f"library {source.library!r} is unknown; known: {', '.join(LIBRARIES)}")
    if not isinstance(source.architecture, str):
        raise SchemaError(f"architecture must be a name, not {source.architecture!r}")
    for what, value in (("arguments", source.arguments), ("attributes", source.attributes)):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise SchemaError(f"{what} of {source.architecture} must be an object with names, not {value!r}")
        if limits is not None:
            limits.check_arguments(source.architecture, value)
    library = adapter(source.library)
    try:
        charged = limits.builds() if limits else nullcontext()
        # What is drawn all the same must not change the caller's random numbers.
        with torch.random.fork_rng(devices=[]), offline(), quiet(), charged, WithoutDrawing():
            try:
                # What a folder says is charged for what it would take, and on meta it would take nothing.
                with meta_parameters(huge=limits is None):
                    model = library.build(source.architecture, source.arguments)
                whole = not any(buffer.is_meta for buffer in model.buffers())
            except (NotImplementedError, RuntimeError):
                # A builder looked at values (`.item()`, `.tolist()`) that a meta tensor does not have, or ran a part of
                # the model to see what comes out of it.
                whole = False
            if not whole:
                # Some hosts (timm's Swin, RoPE with learned frequencies) make buffers from a parameter or on its
                # device, which has to be real for a while.
                model = to_meta(library.build(source.architecture, source.arguments))
    except ArmourError:
        raise
    except Exception as error:
        # The builders raise whatever their code runs into, TypeError for an unknown argument most of all.
        raise SchemaError(
            f"{source.library} could not build {source.architecture} with {_short(source.arguments)}: {_short(error)}"
        ) from error
    restore_attributes(model, source.attributes)
    if source.library == "transformers" and (size := (source.options or {}).get("img_size")) is not None:
        if type(size) is not int or not 0 < size <= LARGEST_IMAGE:
            raise SchemaError(f"the options of {source.architecture} name an img_size of {size!r}, which no image has")
        # Where positions are interpolated, the config has the size that they were trained for.
        keep_image_size(model, library.example(model), size)
    return model.eval()


def _short(value: object) -> str:
    """The first line, cut: configs with a thousand label names are not for an error message."""
    text = str(value).strip().splitlines()
    line = text[0] if text else type(value).__name__
    return line if len(line) <= 200 else f"{line[:200]}..."
