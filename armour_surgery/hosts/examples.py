"""What a model takes that no library describes: as somebody wrote it down, or as the model itself shows it."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from armour_surgery.errors import ExampleInputError, UsageError
from armour_surgery.records import SurgeryPlan

__all__ = ["Written", "keep_example", "keep_image_size", "kept_example", "read_example", "shown_example"]

# Shape with the batch first, and type, of every input by its name.
Inputs = dict[str, tuple[tuple[int, ...], torch.dtype]]
# As written: its name ("" for the next in order), shape and type.
Written = tuple[str, tuple[int, ...], torch.dtype]

TYPES = {"float": torch.float32, "long": torch.int64, "int": torch.int32, "bool": torch.bool}
GRAMMAR = "1,3,224,224, or for several inputs x=1,3,224,224;ids=1,77:long (types: float, long, int, bool)"
# What models call the height and width of their images, and their channels.
SIZES = ("img_size", "image_size", "input_size", "input_resolution")
CHANNELS = ("in_chans", "in_channels", "num_channels")
# Where they keep it, besides on themselves.
HOLDERS = ("config", "cfg", "patch_embed")
# An attribute, so that copies of the model have it too.
_KEPT = "_armour_example"


def read_example(text: str | None) -> tuple[Written, ...]:
    """The inputs that `--example` names; none where it was not given.

    Raises:
        UsageError: it is not written as it has to be; the message says how.
    """
    written: list[Written] = []
    for part in text.split(";") if text is not None else ():
        match = re.fullmatch(r"\s*(?:(\w+)\s*=)?\s*(\d+(?:\s*,\s*\d+)*)\s*(?::\s*(\w+))?\s*", part)
        if match is None:
            raise UsageError(f"--example {text!r}: {part!r} is no shape; write {GRAMMAR}")
        name, shape, kind = match.groups()
        sizes = tuple(int(size) for size in shape.split(","))
        if (kind or "float") not in TYPES:
            raise UsageError(f"--example {text!r}: {kind!r} is none of the types {', '.join(TYPES)}")
        if not all(0 < size < 2**20 for size in sizes):
            raise UsageError(f"--example {text!r}: a size is 0, or too large; write {GRAMMAR}")
        written.append((name or "", sizes, TYPES[kind or "float"]))
    return tuple(written)


def keep_example(model: nn.Module, written: Sequence[Written]) -> None:
    """Keep on a model what it is to be fed, before whatever is known of it otherwise.

    Raises:
        UsageError: its forward has fewer inputs, or none of such a name.
    """
    if not written:
        return
    parameters = inspect.signature(model.forward).parameters
    any_name = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    free = [one.name for one in parameters.values() if one.kind is not one.VAR_KEYWORD]
    inputs: Inputs = {}
    for name, shape, dtype in written:
        if name and name not in parameters and not any_name:
            raise UsageError(f"--example: the forward of {type(model).__name__} has no {name!r}, but {_list(free)}")
        chosen = name or next((one for one in free if one not in inputs), "")
        if not chosen or chosen in inputs:
            raise UsageError(f"--example: the forward of {type(model).__name__} takes {_list(free)}; name each once")
        inputs[chosen] = (shape, dtype)
    vars(model)[_KEPT] = inputs


def keep_image_size(
    model: nn.Module, known: Mapping[str, tuple[tuple[int, ...], torch.dtype] | torch.Tensor], size: int
) -> None:
    """Keep on a model that it is to be fed images of this height and width, where its library would feed it others.

    `known` is what the library tells (`Adapter.example`); a model that takes more than images stays as it is.
    """
    inputs: Inputs = {}
    for name, told in known.items():
        if isinstance(told, torch.Tensor) or len(told[0]) != 3 or not told[1].is_floating_point:
            return
        (channels, *others), dtype = told
        if others != [size, size]:
            inputs[name] = ((1, channels, size, size), dtype)
    if inputs:
        vars(model)[_KEPT] = inputs


def kept_example(model: nn.Module) -> Inputs | None:
    """What was kept by `keep_example`."""
    kept: Inputs | None = vars(model).get(_KEPT)
    return kept


def shown_example(model: nn.Module) -> Inputs:
    """What a model of no library takes: as it was converted with, or as its attributes say.

    Raises:
        ExampleInputError: neither is there.
    """
    surgery = getattr(model, "surgery", None)
    if isinstance(surgery, SurgeryPlan) and surgery.example:
        return {name: (shape, getattr(torch, dtype)) for name, shape, dtype in surgery.example}
    needed = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            needed.append(parameter.name)
    declared = getattr(model, "example_input_array", None)  # Lightning's name for it
    if declared is not None and (inputs := _declared(declared, needed)):
        return inputs
    size, channels = _size(model), _channels(model)
    if size and channels and len(needed) == 1:
        return {needed[0]: ((1, channels, *size), torch.float32)}
    why = f"its forward takes {_list(needed)}" if len(needed) != 1 else "it has no img_size and in_chans"
    raise ExampleInputError(
        f"{type(model).__module__}.{type(model).__qualname__} is not a model of timm, transformers or torchvision, and "
        f"{why}, so its input is not known; pass example_input={{name: tensor}}, or --example 1,3,224,224 on the "
        "command line"
    )


def _declared(declared: Any, names: Sequence[str]) -> Inputs:
    given = declared if isinstance(declared, Mapping) else {}
    if not given:
        in_order = declared if isinstance(declared, tuple | list) else (declared,)
        given = dict(zip(names, in_order, strict=False))
    if not all(isinstance(value, torch.Tensor) for value in given.values()):
        return {}
    return {name: (tuple(value.shape), value.dtype) for name, value in given.items()}


def _size(model: nn.Module) -> tuple[int, ...]:
    """Height and width of its images; empty where it does not say."""
    for value in _attributes(model, SIZES):
        sizes = (value, value) if isinstance(value, int) else value
        # timm writes (channels, height, width).
        if isinstance(sizes, tuple | list) and len(sizes) in (2, 3) and all(isinstance(size, int) for size in sizes):
            return tuple(sizes[-2:])
    return ()


def _channels(model: nn.Module) -> int:
    """Channels of its images; 0 where neither it nor its first convolution says."""
    for value in _attributes(model, CHANNELS):
        if isinstance(value, int):
            return value
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return first.in_channels if first is not None else 0


def _attributes(model: nn.Module, names: Sequence[str]) -> Iterator[Any]:
    for holder in (model, *(getattr(model, name, None) for name in HOLDERS)):
        for name in names:
            value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
            if value is not None:
                yield value


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"
