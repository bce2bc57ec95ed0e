"""Loading, naming and rebuilding models of timm, transformers and torchvision.

All that is known about a library is here, and nothing about attention. A library is imported when a model
of it is asked for, and not before.
"""

import difflib
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from armour_surgery.errors import (
    ArmourError,
    ExampleInputError,
    FolderError,
    ModelError,
    SchemaError,
    UnknownModelError,
    UsageError,
)
from armour_surgery.hosts.hub import offline, quiet
from armour_surgery.hosts.skeleton import (
    changed_attributes,
    first_difference,
    meta_parameters,
    restore_attributes,
    to_meta,
)
from armour_surgery.records import Source

__all__ = [
    "build",
    "describe",
    "example_input",
    "features",
    "library_of",
    "load_model",
    "mark_converted",
    "outline",
    "suggest",
]

# transformers first: its TimmWrapper models are transformers' to build, whatever they hold.
LIBRARIES = ("transformers", "timm", "torchvision")
PREFIXES = {
    "timm": "timm",
    "hf-hub": "timm",
    "local-dir": "timm",
    "hf": "transformers",
    "torchvision": "torchvision",
}
GRAMMAR = "NAME or timm:NAME, hf-hub:ORG/NAME, local-dir:DIR, hf:ID_OR_DIR, torchvision:NAME"


def load_model(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    img_size: int | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
) -> tuple[nn.Module, Source]:
    """The model that MODEL names, in float32 and eval mode, and how to build it again.

    `checkpoint` is a file of weights which replaces the pretrained ones; every key in it has to fit.
    Weights come
    from there, from the library's cache, from the hub, or (`pretrained=False`) are random.

    Raises:
        UsageError: a size is below 1, or the architecture does not take it.
        UnknownModelError: no library knows the name; the message suggests up to three.
        HubUnreachableError: config or weights are not on this machine and the hub does not answer.
        CheckpointError: the file is unreadable, could run code, or belongs to another architecture.
        ModelError: the name is ambiguous, has no weights, or the library refused it.
    """
    given = {"img_size": img_size, "num_classes": num_classes, "in_chans": in_chans}
    sizes = {option: value for option, value in given.items() if value is not None}
    for option, value in sizes.items():
        if value < 1:
            raise UsageError(f"{option} must be 1 or more, not {value}; see --{option.replace('_', '-')}")
    library, rest = _parse(name)
    loaded: tuple[nn.Module, Source]
    try:
        loaded = _adapter(library).load(rest, pretrained=pretrained, checkpoint=checkpoint, sizes=sizes)
    except UnknownModelError as error:
        close = suggest(name)
        if not close:
            raise
        raise UnknownModelError(f"{error}; did you mean {' or '.join(close)}?") from error
    return loaded


def describe(model: nn.Module, arguments: Mapping[str, Any] | None = None) -> Source:
    """How to build this unconverted model again, verified by building it.

    `arguments` are those of its builder, where the model does not show them: keyword arguments for timm and
    torchvision, config entries for transformers. They win over what was read off the model.

    The build has the same module types and state_dict keys and shapes; plain attributes that differ are
    listed.

    Raises:
        UsageError: `arguments` holds what JSON cannot.
        FolderError: the library is unknown, or what it builds differs; the message says where it differs
            first.
    """
    kind = type(model).__qualname__
    try:
        given: dict[str, Any] = json.loads(json.dumps(dict(arguments or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"model_args of {kind} must be JSON values (numbers, strings, lists): {error}") from error
    library = library_of(model)
    if library is None:
        raise FolderError(
            f"{type(model).__module__}.{kind} is not a model of timm, transformers or torchvision, so a "
            "saved folder could "
            "not build it again; save its state_dict, or unwrap the model (DataParallel, torch.compile) first"
        )
    try:
        source: Source = _adapter(library).source_of(model, given)
        built = build(source)
    except (ModelError, SchemaError) as error:
        raise FolderError(
            f"cannot describe this {kind}: {error}. Pass model_args={{...}}: the builder's arguments"
        ) from error
    difference = first_difference(built, model)
    if difference:
        raise FolderError(
            f"{library} builds another {kind} from {source.architecture} {_short(source.arguments)}: "
            f"{difference}. "
            "Pass model_args={...}: the arguments that the model was built with"
        )
    return replace(source, attributes=changed_attributes(built, model))


def outline(model: nn.Module, arguments: Mapping[str, Any]) -> Source:
    """How to build the model, read off it and off `arguments`, which win. Unlike `describe`, nothing is verified.

    Raises:
        FolderError: the library is unknown, or the model does not say what it is.
    """
    library = library_of(model)
    if library is None:
        raise FolderError(f"{type(model).__qualname__} is not a model of timm, transformers or torchvision")
    try:
        source: Source = _adapter(library).source_of(model, dict(arguments))
    except ModelError as error:
        raise FolderError(str(error)) from error
    return source


def mark_converted(model: nn.Module) -> None:
    """Keep a converted model from being taken for an unconverted one by its library's own save and load."""
    if library_of(model) == "transformers":
        _adapter("transformers").mark_converted(model)


def build(source: Source) -> nn.Module:
    """The host that `source` describes: Parameters on the meta device, buffers real and right, in eval mode.

    `source` may come from a file that nobody checked. Only registered names of the three libraries are
    built, and
    nothing is downloaded.

    Raises:
        SchemaError: the source names a library, an architecture, an argument or an attribute that it must
            not.
    """
    if source.library not in LIBRARIES:
        raise SchemaError(f"library {source.library!r} is unknown; known: {', '.join(LIBRARIES)}")
    if not isinstance(source.architecture, str):
        raise SchemaError(f"architecture must be a name, not {source.architecture!r}")
    for what, value in (("arguments", source.arguments), ("attributes", source.attributes)):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise SchemaError(f"{what} of {source.architecture} must be an object with names, not {value!r}")
    adapter = _adapter(source.library)
    try:
        # The builders draw initial weights; the caller's random numbers must not depend on that.
        with torch.random.fork_rng(devices=[]), offline(), quiet():
            try:
                with meta_parameters():
                    model: nn.Module = adapter.build(source.architecture, source.arguments)
                whole = not any(buffer.is_meta for buffer in model.buffers())
            except NotImplementedError:
                whole = False
            if not whole:
                # Some hosts (timm's Swin, RoPE with learned frequencies) make buffers from a parameter or on its
                # device, which has to be real for a while.
                model = to_meta(adapter.build(source.architecture, source.arguments))
    except ArmourError:
        raise
    except Exception as error:
        # The builders raise whatever their code runs into, TypeError for an unknown argument most of all.
        raise SchemaError(
            f"{source.library} could not build {source.architecture} with {_short(source.arguments)}: {_short(error)}"
        ) from error
    restore_attributes(model, source.attributes)
    return model.eval()


def example_input(model: nn.Module, batch_size: int = 2) -> dict[str, torch.Tensor]:
    """Keyword arguments for `model.forward`: meta tensors of the size that the model was built for.

    Raises:
        UsageError: batch_size is below 1.
        ExampleInputError: the model is of no known library, or takes something other than images.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be 1 or more, not {batch_size}")
    library = library_of(model)
    if library is None:
        raise ExampleInputError(
            f"{type(model).__module__}.{type(model).__qualname__} is not a model of timm, transformers or "
            "torchvision, so "
            "its input is not known; pass example_input={name: tensor}"
        )
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {
        name: torch.empty(batch_size, *shape, dtype=floating if dtype.is_floating_point else dtype, device="meta")
        for name, (shape, dtype) in _adapter(library).example(model).items()
    }


def features(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A model's final features with channels last, and its logits `[B, classes]`, or None if it has no head.

    timm tells them by `forward_features`, transformers by `last_hidden_state` or the last of `hidden_states`; of any
    other model the first tensor of the output is taken for both.
    """
    library = library_of(model)
    if library == "timm" and hasattr(model, "forward_features"):
        (image,) = inputs.values()
        found: torch.Tensor = model.forward_features(image)  # type: ignore[operator]
        classes = getattr(model, "num_classes", 0)
        logits = model.forward_head(found) if classes else None  # type: ignore[operator]
        wide = found.ndim == 4 and found.shape[1] == getattr(model, "num_features", None)
        return (found.movedim(1, -1) if wide else found), logits
    if library == "transformers":
        output = model(**inputs, output_hidden_states=True)
        hidden: Any = getattr(output, "last_hidden_state", None)
        if hidden is None and getattr(output, "hidden_states", None):
            hidden = output.hidden_states[-1]
        scores: Any = getattr(output, "logits", None)
        if hidden is not None or scores is not None:
            return (scores if hidden is None else hidden), scores
    first = next(leaf for leaf in pytree.tree_leaves(model(**inputs)) if isinstance(leaf, torch.Tensor))
    return first, first if first.ndim == 2 else None


def library_of(model: nn.Module) -> str | None:
    """timm, transformers or torchvision, by the class of the model; None for any other."""
    for library in LIBRARIES:
        # A library that was never imported has no instances, and must not be imported to find that out.
        if library in sys.modules and _adapter(library).owns(model):
            return library
    return None


def suggest(name: str) -> list[str]:
    """Up to three MODEL strings that look like `name`, the closest first. Empty for paths and hub ids."""
    prefix, _, rest = name.rpartition(":")
    if "/" in rest or prefix not in ("", "timm", "torchvision"):
        return []
    known: dict[str, str] = {}
    if prefix != "timm":
        known.update({found: f"torchvision:{found}" for found in _adapter("torchvision").known_names()})
    if prefix != "torchvision":
        known.update({found: found for found in _adapter("timm").known_names()})
    bare = rest.partition(".")[0]
    if bare in known:
        return [known[bare]] if known[bare] != name else []
    return [known[found] for found in difflib.get_close_matches(bare, known, n=3) if known[found] != name]


def _adapter(library: str) -> ModuleType:
    return importlib.import_module(f"armour_surgery.hosts.{library}")


def _parse(name: str) -> tuple[str, str]:
    """The library and what its adapter calls the model."""
    prefix, colon, rest = name.partition(":")
    if colon and prefix in PREFIXES:
        if not rest:
            raise UsageError(f"MODEL {name!r} ends at its prefix; write {GRAMMAR}")
        library = PREFIXES[prefix]
        return library, name if prefix in ("hf-hub", "local-dir") else rest
    if not name.strip():
        raise UsageError(f"MODEL is empty; write {GRAMMAR}")
    path = Path(name).expanduser()
    if path.is_file():
        raise UnknownModelError(
            f"{name} is a file; name its architecture as MODEL and pass the file with --checkpoint {name}"
        )
    if path.is_dir():
        return _parse_folder(name, path)
    if colon:
        raise UnknownModelError(f"MODEL {name!r} has the unknown prefix {prefix!r}; write {GRAMMAR}")
    if "/" not in name:
        return "timm", name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UnknownModelError(f"{name}: there is no such folder; check the path, or write {GRAMMAR}")
    if name.startswith("timm/"):
        return "timm", f"hf-hub:{name}"
    raise ModelError(
        f"{name} is not a folder here, and on the hub it could be of two libraries; write hf:{name} for "
        "transformers or "
        f"hf-hub:{name} for timm"
    )


def _parse_folder(name: str, path: Path) -> tuple[str, str]:
    """A folder of transformers or timm, told apart by its config.json."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = {}
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path / 'config.json'} cannot be read as JSON ({error}); copy or download it again"
        ) from error
    keys = config if isinstance(config, dict) else {}
    for key, prefix in (("model_type", "hf"), ("architecture", "local-dir")):
        if key not in keys:
            continue
        if "/" not in name and name in _adapter("timm").known_names():
            raise ModelError(f"{name} is a folder here and a timm model; write {prefix}:./{name} or timm:{name}")
        return PREFIXES[prefix], str(path) if prefix == "hf" else f"local-dir:{path}"
    if "/" not in name and name in _adapter("timm").known_names():
        return "timm", name
    raise UnknownModelError(
        f"{name} is a folder without surgery.json and without a config.json of transformers or timm; name a "
        "folder that "
        f"save, save_pretrained or this tool wrote, or write {GRAMMAR}"
    )


def _short(value: object) -> str:
    """The first line, cut: configs with a thousand label names are not for an error message."""
    text = str(value).strip().splitlines()
    line = text[0] if text else type(value).__name__
    return line if len(line) <= 200 else f"{line[:200]}..."
