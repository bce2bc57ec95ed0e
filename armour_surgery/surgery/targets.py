"""What a surgery is about: a model that was not converted, what to feed it, and the sites that patterns choose."""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from inspect import signature

import torch
from torch import nn

from armour_surgery import hosts
from armour_surgery.discover import FoundSite
from armour_surgery.errors import AlreadyConvertedError, AlreadyDeployedError, ExampleInputError, PatternError
from armour_surgery.rewrite import ArmourAttention

__all__ = ["Example", "Rank", "check_names", "example_of", "refuse_converted", "refuse_deployed", "select_sites"]

Rank = int | Mapping[str, int]
Example = dict[str, torch.Tensor] | torch.Tensor | tuple[int, ...]


def refuse_converted(model: nn.Module) -> None:
    """Refuse a model that went through surgery before.

    Raises:
        AlreadyConvertedError: see above.
        AlreadyDeployedError: it is deployed, too late for surgery.
    """
    refuse_deployed(model)
    done = next((name for name, module in model.named_modules() if isinstance(module, ArmourAttention)), None)
    if done is not None or hasattr(model, "surgery"):
        raise AlreadyConvertedError(
            f"{type(model).__name__} is converted already ({done or 'it carries a surgery plan'}). Convert the "
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


def example_of(model: nn.Module, given: Example | None) -> dict[str, torch.Tensor]:
    """Keyword arguments on the meta device."""
    if given is None:
        return hosts.example_input(model)
    if isinstance(given, tuple):
        given = _of_shape(given)
    if isinstance(given, torch.Tensor):
        given = {list(signature(type(model).forward).parameters)[1]: given}
    tensors = isinstance(given, dict) and all(isinstance(value, torch.Tensor) for value in given.values())
    if not tensors or all(value.ndim == 0 for value in given.values()):
        raise ExampleInputError(
            f"example_input is {given!r}; pass a tensor, a shape (batch, channels, height, width), or a dictionary "
            "from argument names to tensors"
        )
    example = {}
    for name, value in given.items():
        # Axes of size one hide which axis is which; a batch of two costs nothing on the meta device.
        shape = (max(2, value.shape[0]), *value.shape[1:]) if value.ndim else ()
        example[name] = torch.empty(shape, dtype=value.dtype, device="meta")
    return example


def _of_shape(shape: tuple[int, ...]) -> torch.Tensor:
    whole = all(isinstance(size, int) and size > 0 for size in shape)
    if len(shape) != 4 or not whole or math.prod(shape) > 2**40:
        raise ExampleInputError(f"example_input {shape!r} is not a shape (batch, channels, height, width)")
    return torch.empty(shape, device="meta")


def _patterns(given: str | Iterable[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def select_sites(
    found: list[FoundSite], include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> list[FoundSite]:
    """The sites that the patterns leave. A pattern also matches everything below a module that it matches."""

    def matches(fqn: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(fqn, pattern) or fnmatch.fnmatchcase(fqn, f"{pattern}.*")

    names = [one.site.fqn for one in found]
    wanted = None if include is None else _patterns(include)
    unwanted = _patterns(exclude)
    for pattern in [*(wanted or ()), *unwanted]:
        if not any(matches(name, pattern) for name in names):
            raise PatternError(
                f"pattern {pattern!r} matches none of the {len(names)} attention sites, which are named like "
                f"{names[0]!r} and {names[-1]!r}"
            )
    chosen = [
        one
        for one in found
        if (wanted is None or any(matches(one.site.fqn, pattern) for pattern in wanted))
        and not any(matches(one.site.fqn, pattern) for pattern in unwanted)
    ]
    if not chosen:
        raise PatternError(
            f"include {wanted if wanted is not None else 'everything'} and exclude {unwanted} leave none of the "
            f"{len(names)} attention sites"
        )
    return chosen


def check_names(rank: Rank | None, found: list[FoundSite]) -> None:
    """Refuse ranks for sites that there are not.

    Raises:
        PatternError: see above.
    """
    names = [one.site.fqn for one in found]
    unknown = [name for name in rank if name not in names] if isinstance(rank, Mapping) else []
    if unknown:
        raise PatternError(
            f"rank names {unknown[0]!r}, which is none of the {len(names)} attention sites to convert, such as "
            f"{names[0]!r}"
        )
