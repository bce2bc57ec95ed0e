"""What a surgery is about: a model that was not converted, what to feed it, and the sites that patterns choose."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from armour_surgery import hosts
from armour_surgery.calls import first_name
from armour_surgery.copies import floating_type
from armour_surgery.errors import AlreadyConvertedError, AlreadyDeployedError, ExampleInputError, PatternError
from armour_surgery.examples import part_of
from armour_surgery.records import RefusedSite
from armour_surgery.rewrite import ArmourAttention
from armour_surgery.surgery.order import Rank
from armour_surgery.traced import FoundSite, SeenSite

__all__ = [
    "Example",
    "check_names",
    "example_of",
    "leave_words_alone",
    "left_by_patterns",
    "patterns",
    "plain_example_of",
    "refuse_converted",
    "refuse_deployed",
    "select_sites",
]

Example = Mapping[str, Any] | torch.Tensor | tuple[int, ...]


def refuse_converted(model: nn.Module) -> None:
    """Refuse a model that went through surgery before.

    Raises:
        AlreadyConvertedError: see above.
        AlreadyDeployedError: it is deployed, too late for surgery.
    """
    refuse_deployed(model)
    signs = [name for name, module in model.named_modules() if isinstance(module, ArmourAttention)]
    if hasattr(model, "surgery"):
        signs.append("it carries a surgery plan")
    if signs:
        raise AlreadyConvertedError(
            f"{type(model).__name__} is converted already ({signs[0] or 'it carries a surgery plan'}). Convert the "
            "original model, with everything that you want in one call"
        )


def refuse_deployed(model: nn.Module) -> None:
    """Refuse a model that was readied for inference.

    Raises:
        AlreadyDeployedError: see above.
    """
    if hasattr(model, "deployment"):
        raise AlreadyDeployedError(
            f"this {type(model).__name__} is deployed, which comes last: its weights are folded, for inference only. "
            "Convert, train, save and deploy the model that deploy() was given"
        )


def example_of(model: nn.Module, given: Example | None) -> dict[str, Any]:
    """Inputs by name: on the meta device, or with the numbers that were given.

    Raises:
        UsageError: a wrapper is around the model.
        ExampleInputError: what was given is no example, or nothing was and the model's input is not known.
    """
    hosts.refuse_wrapped(model)
    if given is None:
        return hosts.example_input(model)
    if isinstance(given, tuple):
        given = _of_shape(given, model)
    if isinstance(given, torch.Tensor):
        name = first_name(model)
        if name is None:
            raise ExampleInputError(
                f"the forward of {type(model).__name__} has no name for its first input; pass example_input as a "
                "dictionary from argument names to tensors"
            )
        given = {name: given}
    tensors = [leaf for leaf in pytree.tree_leaves(_plain(given)) if isinstance(leaf, torch.Tensor)]
    if not isinstance(given, Mapping) or all(tensor.ndim == 0 for tensor in tensors):
        raise ExampleInputError(
            f"example_input is {given!r}; pass a tensor, a shape (batch, channels, height, width), or a dictionary "
            "from argument names to tensors"
        )
    _check_part(model, given)
    # Axes of size one hide which axis is which. Where not all tensors have a single row, rows are not images alone.
    single = all(tensor.ndim == 0 or tensor.shape[0] == 1 for tensor in tensors)
    example: dict[str, Any] = pytree.tree_map_only(torch.Tensor, lambda tensor: _example(tensor, single), _plain(given))
    return example


def plain_example_of(model: nn.Module, given: Example | None) -> dict[str, torch.Tensor]:
    """`example_of`, for what runs whole models on tensors by name.

    Raises:
        UsageError, ExampleInputError: as there; or the example is nested, or for a part of the model alone.
    """
    example = example_of(model, given)
    if part := part_of(example):
        raise ExampleInputError(
            f"only {part} of this {type(model).__name__} can be run on images; pass that module alone: "
            f"model.get_submodule({part!r})"
        )
    for name, value in example.items():
        if not isinstance(value, torch.Tensor):
            raise ExampleInputError(f"example_input[{name!r}] is {value!r}, and only tensors can be passed here")
    return example


def _example(tensor: torch.Tensor, single: bool) -> torch.Tensor:
    if tensor.ndim == 0:
        return tensor.detach()
    if tensor.is_meta:
        return torch.empty((max(2, tensor.shape[0]), *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
    return torch.cat([tensor.detach()] * (2 if single else 1))


def _plain(given: Any, name: str = "example_input") -> Any:
    """The same in plain containers, which can be written down and read again.

    Raises:
        ExampleInputError: something in it is neither a tensor nor a plain value.
    """
    if isinstance(given, Mapping):
        for key in given:
            if not isinstance(key, str) or set("[]") & set(key):
                raise ExampleInputError(f"{name} has the key {key!r}; keys of dictionaries must be names")
        return {key: _plain(value, f"{name}[{key!r}]") for key, value in given.items()}
    if isinstance(given, list | tuple):
        return [_plain(value, f"{name}[{index}]") for index, value in enumerate(given)]
    if given is None or isinstance(given, torch.Tensor | bool | int | float | str):
        return given
    raise ExampleInputError(
        f"{name} is a {type(given).__name__}; an example is made of tensors, numbers, and lists and dictionaries of "
        'them (of a processor, ask for return_tensors="pt")'
    )


def _check_part(model: nn.Module, given: Mapping[str, Any]) -> None:
    parts = {name.rpartition(":")[0] for name in given}
    if len(parts) > 1:
        listed = ", ".join(map(repr, sorted(parts)))
        raise ExampleInputError(f"example_input has arguments of several modules ({listed}); give those of one")
    for part in parts:
        if part and part not in dict(model.named_modules()):
            raise ExampleInputError(f"example_input is for {part!r}, and {type(model).__name__} has no such submodule")


def _of_shape(shape: tuple[int, ...], model: nn.Module) -> torch.Tensor:
    """Images of a shape, in the type of the model's weights."""
    whole = all(isinstance(size, int) and size > 0 for size in shape)
    if len(shape) != 4 or not whole or math.prod(shape) > 2**40:
        raise ExampleInputError(f"example_input {shape!r} is not a shape (batch, channels, height, width)")
    return torch.empty(shape, dtype=floating_type(model), device="meta")


def select_sites(
    sites: list[SeenSite],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    mlps: Sequence[str] = (),
) -> list[SeenSite]:
    """The sites that the patterns leave. A pattern also matches everything below a module that it matches.

    `mlps` are names that patterns may be about as well; where they leave one of those, they need leave no site.

    Raises:
        PatternError: a pattern matches nothing, or all of them together leave nothing.
    """
    names = [site.fqn for site in sites]
    include, exclude = None if include is None else patterns(include), patterns(exclude)
    for pattern in [*(include or ()), *exclude]:
        if not any(_matches(name, pattern) for name in [*names, *mlps]):
            others = f", nor any of the {len(mlps)} MLPs, such as {mlps[0]!r}" if mlps else ""
            raise PatternError(
                f"pattern {pattern!r} matches none of the {len(names)} attention sites, which are named like "
                f"{names[0]!r} and {names[-1]!r}{others}"
            )
    chosen = [site for site in sites if left_by_patterns(site.fqn, include, exclude)]
    if not chosen and not any(left_by_patterns(name, include, exclude) for name in mlps):
        raise PatternError(
            f"include {'everything' if include is None else include} and exclude {exclude} leave none of the "
            f"{len(names)} attention sites"
        )
    return chosen


def left_by_patterns(fqn: str, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None) -> bool:
    """Whether a name is asked for and not excluded."""
    asked_for = include is None or any(_matches(fqn, pattern) for pattern in patterns(include))
    return asked_for and not any(_matches(fqn, pattern) for pattern in patterns(exclude))


def leave_words_alone(model: nn.Module, sites: list[SeenSite]) -> list[SeenSite]:
    """The sites, refused where they are of a text model that writes about what the others see."""
    parts = hosts.writing_parts(model)
    left: list[SeenSite] = []
    for site in sites:
        part = next((part for part in parts if site.fqn.startswith(f"{part}.")), None)
        if part is not None and isinstance(site, FoundSite):
            reason = f"it is of the text model {part}, which mode 'auto' leaves alone; ask for it with include={part!r}"
            left.append(RefusedSite(site.fqn, reason))
        else:
            left.append(site)
    return left


def patterns(given: str | Iterable[str] | None) -> list[str]:
    """Patterns as a list, however they were given; they may be an iterable that can be read once."""
    if given is None:
        return []
    return [given] if isinstance(given, str) else list(given)


def _matches(fqn: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(fqn, pattern) or fnmatch.fnmatchcase(fqn, f"{pattern}.*")


def check_names(rank: Rank | None, sites: list[SeenSite]) -> None:
    """Refuse ranks for sites that there are not.

    Raises:
        PatternError: see above.
    """
    names = [site.fqn for site in sites]
    for name in rank if isinstance(rank, Mapping) else ():
        if name not in names:
            raise PatternError(
                f"rank names {name!r}, which is none of the {len(names)} attention sites to convert, such as "
                f"{names[0]!r}"
            )
