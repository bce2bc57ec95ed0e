"""The weights of a folder, put into the model that they belong to."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from armour_surgery.errors import KeyMismatchError, SchemaError
from armour_surgery.hosts.gone import placeholders
from armour_surgery.saving.document import Document
from armour_surgery.saving.staging import PLAN, WEIGHTS

__all__ = ["assign", "fill"]


def fill(model: nn.Module, tensors: dict[str, torch.Tensor], document: Document, folder: Path, blame: str) -> None:
    """Put tensors into a model: all of them and nothing else, in their own types; tied again is what was tied.

    They go where the model's own are, and stay where they are if those are on the meta device. `blame` says what is
    wrong where they do not fit.

    Raises:
        KeyMismatchError: tensors are missing, left over, of the wrong shape or of another kind of numbers.
        SchemaError: the document names a buffer that there is not.
    """
    weights = folder / WEIGHTS
    gone = placeholders(model)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in gone or tensor.shape != gone[name].shape}
    _put_in(model, tensors, document.tied, weights, blame)
    _cast_buffers(model, document.buffer_dtypes, folder)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise KeyMismatchError(f"{weights} leaves {left[0]} and {len(left) - 1} more tensors of the model empty")


def _put_in(model: nn.Module, tensors: dict[str, torch.Tensor], tied: dict[str, str], path: Path, blame: str) -> None:
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
        raise KeyMismatchError(f"{path} {'; '.join(problems)}: {blame}")
    whole = {}
    for name, place in wanted.items():
        tensor = tensors[tied.get(name, name)]
        whole[name] = tensor if place.is_meta else tensor.to(place.device)
    assign(model, whole, tied)


def assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> None:
    """Make tensors the model's own, one for each name of its state dict, and tie names to others."""
    # Assigned and not copied: the model's own parameters are on the meta device, and have nowhere to copy to.
    model.load_state_dict(tensors, assign=True)
    # Loading makes a parameter of its own for each name, so that ties are gone until here.
    for name, other in tied.items():
        owner, _, attribute = name.rpartition(".")
        source, _, original = other.rpartition(".")
        setattr(model.get_submodule(owner), attribute, getattr(model.get_submodule(source), original))


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
