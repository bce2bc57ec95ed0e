"""What a surgery is about: a model that was not converted, what to feed it, and the sites that patterns choose."""

import fnmatch
import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from armour_surgery import hosts
from armour_surgery.calls import first_name
from armour_surgery.errors import AlreadyConvertedError, AlreadyDeployedError, ExampleInputError, PatternError
from armour_surgery.rewrite import ArmourAttention
from armour_surgery.surgery.order import Rank
from armour_surgery.traced import SeenSite

__all__ = ["Example", "check_names", "example_of", "refuse_converted", "refuse_deployed", "select_sites"]

Example = dict[str, torch.Tensor] | torch.Tensor | tuple[int, ...]


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


def example_of(model: nn.Module, given: Example | None) -> dict[str, torch.Tensor]:
    """Inputs by name, on the meta device.

    Raises:
        UsageError: a wrapper is around the model.
        ExampleInputError: what was given is no example, or nothing was and the model's input is not known.
    """
    hosts.refuse_wrapped(model)
    if given is None:
        return hosts.example_input(model)
    if isinstance(given, tuple):
        given = _of_shape(given)
    if isinstance(given, torch.Tensor):
        name = first_name(model)
        if name is None:
            raise ExampleInputError(
                f"the forward of {type(model).__name__} has no name for its first input; pass example_input as a "
                "dictionary from argument names to tensors"
            )
        given = {name: given}
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


def select_sites(
    sites: list[SeenSite], include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> list[SeenSite]:
    """The sites that the patterns leave. A pattern also matches everything below a module that it matches.

    Raises:
        PatternError: a pattern matches no site, or all of them together leave none.
    """
    names = [site.fqn for site in sites]
    wanted = None if include is None else _patterns(include)
    unwanted = [] if exclude is None else _patterns(exclude)
    for pattern in [*(wanted or ()), *unwanted]:
        if not any(_matches(name, pattern) for name in names):
            raise PatternError(
                f"pattern {pattern!r} matches none of the {len(names)} attention sites, which are named like "
                f"{names[0]!r} and {names[-1]!r}"
            )
    chosen = []
    for site in sites:
        asked_for = wanted is None or any(_matches(site.fqn, pattern) for pattern in wanted)
        if asked_for and not any(_matches(site.fqn, pattern) for pattern in unwanted):
            chosen.append(site)
    if not chosen:
        raise PatternError(
            f"include {wanted if wanted is not None else 'everything'} and exclude {unwanted} leave none of the "
            f"{len(names)} attention sites"
        )
    return chosen


def _patterns(given: str | Iterable[str]) -> list[str]:
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
