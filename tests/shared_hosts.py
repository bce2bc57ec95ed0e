"""Tiny hosts that are built, searched and converted once in a process, for every test that looks at them.

Nobody changes or runs what these functions return, since other tests get the same object: `copies.full_copy` gives a
model to do with as one likes. The suite checks that in the end (`changed`).
"""

import functools
import hashlib
from typing import Any

import torch
from oracle import merge
from tiny_hosts import case
from torch import Tensor, nn

from armour_surgery.copies import full_copy
from armour_surgery.discover import find_sites
from armour_surgery.surgery.conversion import convert
from armour_surgery.surgery.operation import Operation, Prepared, prepare
from armour_surgery.surgery.order import Order
from armour_surgery.surgery.perform import perform
from armour_surgery.traced import SeenSite

__all__ = ["built", "changed", "converted_host", "example", "merged", "prepared"]

# What each shared model was like when it was made.
_handed_out: list[tuple[str, nn.Module, str]] = []


def example(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What conversions of a host in that type are shown."""
    return {argument: value.to(dtype) for argument, value in case(name).example().items()}


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[SeenSite]]:
    """A host and what was found in it."""
    return _built(name, dtype)


def prepared(name: str, mode: str, dtype: torch.dtype = torch.float32) -> list[Operation]:
    """What converts it."""
    return _prepared(name, mode, dtype).operations


def converted_host(name: str, mode: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A host after surgery, by default in the mode that `auto` takes."""
    return _converted(name, mode or case(name).auto, dtype)


def merged(name: str, mode: str | None = None) -> tuple[nn.Module, nn.Module]:
    """A host in which `mode` merges equal projections, and the same after surgery: they owe each other equal outputs.

    They do not in mode `qk-diag`, which also takes the diagonal away.
    """
    return _merged(name, mode or case(name).auto)


# The arguments are all given here: a cache takes f(x) and f(x, default) for two calls.


@functools.cache
def _built(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[SeenSite]]:
    model = case(name).build(dtype)
    return _shared(f"{name} in {dtype}", model), find_sites(model, example(name, dtype))


@functools.cache
def _prepared(name: str, mode: str, dtype: torch.dtype) -> Prepared:
    return prepare(*_built(name, dtype), mode)


@functools.cache
def _converted(name: str, mode: str, dtype: torch.dtype) -> nn.Module:
    model, _ = _built(name, dtype)
    return _shared(f"{name} in {dtype} after {mode}", _operated(model, name, mode, dtype))


@functools.cache
def _merged(name: str, mode: str) -> tuple[nn.Module, nn.Module]:
    original, sites = _built(name, torch.float32)
    model = full_copy(original)
    names = merge(model, mode, case(name).example(), sites)
    armour = _operated(model, name, mode, torch.float32)
    assert names
    assert [site.fqn for site in armour.surgery.sites] == names
    assert {site.residual for site in armour.surgery.sites} == {0.0}
    return _shared(f"{name} merged for {mode}", model), _shared(f"{name} merged and after {mode}", armour)


def _operated(model: nn.Module, name: str, mode: str, dtype: torch.dtype) -> nn.Module:
    """What `convert` returns for a host or one that differs from it in its weights alone.

    In the mode that `auto` takes it is `convert`. In the others it is what `convert` does once it knows what it can do,
    which is known of the host: most of the time goes into finding that out.
    """
    if mode == case(name).auto:
        return convert(model, mode, example_input=example(name, dtype))
    order = Order(mode, example=example(name, dtype))
    return perform(model, _prepared(name, mode, dtype), order, inplace=False)


def _shared(label: str, model: nn.Module) -> nn.Module:
    _handed_out.append((label, model, _state(model)))
    return model


def changed() -> list[str]:
    """Which of the models are not what they were."""
    return [label for label, model, before in _handed_out if _state(model) != before]


def _state(model: nn.Module) -> str:
    """A digest of all tensors, and of what each module is set to."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(repr((name, tensor.dtype, tensor.requires_grad, tensor.grad is None)).encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        digest.update(repr((name, type(module).__qualname__, _settings(module))).encode())
    return digest.hexdigest()


def _settings(module: nn.Module) -> dict[str, Any]:
    """Flags and numbers, and how much each container holds: hooks, and what LeViT caches when it runs."""
    settings: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, bool | int | float | str):
            settings[name] = value
        elif isinstance(value, dict | list):
            settings[name] = len(value)
    return settings
