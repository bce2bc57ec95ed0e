"""What a model is run on to see how it computes: arguments by name, with numbers or without, nested or not.

A name `part:argument` stands for an argument of the submodule `part`, which then runs alone: a vision tower inside of a
model that takes words too.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

__all__ = [
    "Example",
    "arguments_of",
    "batch_of",
    "on_meta",
    "part_of",
    "rebuilt",
    "recorded",
    "shapes_of",
    "with_numbers",
]

Example = dict[str, Any]
# Whole numbers say where images are and how large: of these few are needed, and they are kept with a plan.
_MOST_VALUES = 2**16


def part_of(example: Mapping[str, Any]) -> str:
    """The name of the submodule that runs; empty where it is the model itself."""
    return next(iter(example), "").rpartition(":")[0]


def arguments_of(example: Mapping[str, Any]) -> Example:
    """The arguments by the names that the module which runs has for them."""
    return {name.rpartition(":")[2]: value for name, value in example.items()}


def on_meta(example: Mapping[str, Any]) -> Example:
    """The same without numbers."""
    moved: Example = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), dict(example))
    return moved


def with_numbers(example: Mapping[str, Any], device: torch.device | str, *, noise: bool = True) -> Example:
    """The same with numbers: those that are there, and else noise, or zeros for whole numbers and flags."""
    generator = torch.Generator().manual_seed(0)

    def made(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        if noise and tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(device, tensor.dtype)
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    filled: Example = pytree.tree_map_only(Tensor, made, dict(example))
    return filled


def images_in(example: Mapping[str, Any]) -> str | None:
    """The first argument that is a batch of images `[B, C, H, W]`; None where there is none."""
    for name, value in example.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 4:
            return name
    return None


def batch_of(example: Mapping[str, Any]) -> int:
    """How many images there are: the first axis of the first tensor, or of one that has a row of numbers for each."""
    tensors = [leaf for leaf in pytree.tree_leaves(dict(example)) if isinstance(leaf, Tensor) and leaf.ndim]
    sizes = [tensors[0].shape[0]]
    for tensor in tensors:
        if tensor.ndim == 2 and _tells_sizes(tensor):
            sizes.append(tensor.shape[0])
    return min(sizes)


def shapes_of(example: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes in place of tensors, for messages."""
    shapes: dict[str, Any] = pytree.tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), dict(example))
    return shapes


def recorded(example: Mapping[str, Any]) -> tuple[tuple[tuple[str, tuple[int, ...], str], ...], tuple[Any, ...]]:
    """An example as a plan keeps it: (name, shape, type) of every tensor, and (name, numbers) where they count.

    Numbers are those of whole numbers and flags, which say where images are and how large, and what is no tensor.
    """
    shapes: list[tuple[str, tuple[int, ...], str]] = []
    values: list[tuple[str, Any]] = []
    for path, leaf in _leaves(example):
        if not isinstance(leaf, Tensor):
            values.append((path, leaf))
            continue
        shapes.append((path, tuple(leaf.shape), str(leaf.dtype).removeprefix("torch.")))
        if _tells_sizes(leaf) and leaf.numel() <= _MOST_VALUES:
            values.append((path, tuple(leaf.flatten().tolist())))
    return tuple(shapes), tuple(values)


def rebuilt(
    shapes: tuple[tuple[str, tuple[int, ...], str], ...], values: tuple[Any, ...], floating: torch.dtype
) -> Example:
    """The example that a plan keeps; floating-point numbers are of the type given.

    Raises:
        ValueError, TypeError, RuntimeError: the numbers are none of that type, or not as many as the shape has places.
    """
    known = dict(values)
    leaves = {path: value for path, value in values if not isinstance(value, list | tuple)}
    for path, shape, name in shapes:
        dtype: torch.dtype = getattr(torch, name)
        if path in known:
            leaves[path] = torch.tensor(known[path], dtype=dtype).reshape(shape)
        else:
            leaves[path] = torch.empty(shape, dtype=floating if dtype.is_floating_point else dtype, device="meta")
    nested: Example = {}
    for path, leaf in leaves.items():
        first, *keys = re.split(r"\]?\[", path.removesuffix("]"))
        place, key = nested, first
        for following in keys:
            place, key = place.setdefault(key, {}), following
        place[key] = leaf
    return {name: _with_lists(value) for name, value in nested.items()}


def _with_lists(value: Any) -> Any:
    """Dictionaries from 0, 1, ... on are lists."""
    if not isinstance(value, dict):
        return value
    items = {key: _with_lists(item) for key, item in value.items()}
    return list(items.values()) if all(key.isdecimal() for key in items) else items


def _tells_sizes(tensor: Tensor) -> bool:
    return not tensor.is_meta and not tensor.is_floating_point() and not tensor.is_complex()


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested arguments, each under a name that tells the way to it: `images[0][mask]`."""
    if isinstance(value, Mapping):
        items: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return [(path, value)]
    found = []
    for key, item in items:
        found += _leaves(item, f"{path}[{key}]" if path else key)
    return found
