"""What was done to a module of a model from outside, so that its class no longer tells what it computes, or from what.

Every kind is one small check. Ask them of the model itself: a copy without weights has lost its hooks.
"""

import functools
import os.path
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = [
    "has_hooks",
    "innermost",
    "is_plain",
    "names_below",
    "run_weightless",
    "why_altered",
    "why_computed",
    "why_hooked",
    "why_stuck",
]

_OUTPUT_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS = (*_OUTPUT_HOOKS, "_forward_pre_hooks")
_SHARDED = ("FSDPModule", "FullyShardedDataParallel")
# Ways back that a reason spells out; more of the same kind are counted.
_SPELLED_OUT = 3

_T = TypeVar("_T")


def why_altered(model: nn.Module, names: Iterable[str]) -> str | None:
    """Why one of the modules `names` does not do what its class says, on plain weights, with the way out; or None."""
    for name in names:
        module = model.get_submodule(name)
        reason = _replaced_forward(module, name) or _sharded_or_quantized(module, name)
        if reason is not None:
            return reason
    return None


def why_stuck(model: nn.Module, name: str) -> str | None:
    """Why nothing at or below the module `name` can be rewritten, with the way out; or None."""
    parts = name.split(".")
    for depth in range(len(parts) if name else 0):
        reason = _runs_another_model(model, ".".join(parts[:depth]))
        if reason is not None:
            return reason
    return why_altered(model, names_below(model, name))


def why_computed(model: nn.Module, names: Iterable[str]) -> str | None:
    """Why weights of the modules `names` can be neither read nor stored, with the way out; or None."""
    computed: list[str] = []
    ways: list[str] = []
    for name in names:
        for tensor, what, way in _computed(model.get_submodule(name)):
            computed.append(f"{_joined(name, tensor)} is {what}")
            ways.append(way.format(_expression(name), tensor))
    if not computed:
        return None
    more = f"; and {len(ways) - _SPELLED_OUT} more likewise" if len(ways) > _SPELLED_OUT else ""
    return f"{computed[0]}; make it a plain parameter: `{'; '.join(ways[:_SPELLED_OUT])}`{more}"


def why_hooked(model: nn.Module, names: Iterable[str], *, inputs: bool) -> str | None:
    """Why the modules `names` may not give fewer channels, with the way out; or None.

    With `inputs` they will take fewer too, or be gone, so that hooks which see no more than inputs count as well; a
    norm does so in any case.
    """
    for name in names:
        module = model.get_submodule(name)
        kinds = _HOOKS if inputs or isinstance(module, _BatchNorm) else _OUTPUT_HOOKS
        if any(getattr(module, kind) for kind in kinds):
            return (
                f"{name} has a hook, and the conversion changes its width or takes it away; remove the hook (its "
                "handle's remove()), convert, and register it on the converted model again"
            )
    return None


def innermost(names: Iterable[str]) -> str:
    """The innermost module that holds all of these modules and tensors, by name; empty for the model itself."""
    return ".".join(os.path.commonprefix([name.split(".") for name in names]))


def names_below(model: nn.Module, name: str) -> list[str]:
    """The module `name` and all below it, by their names in the model."""
    return [_joined(name, inner) for inner, _ in model.get_submodule(name).named_modules()]


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody put forward or backward hooks on a module."""
    return any(getattr(module, kind) for kind in _HOOKS)


def is_plain(module: nn.Module, name: str) -> bool:
    """Whether a module keeps that weight as a parameter that can be read, written and replaced."""
    parameter = module._parameters.get(name)
    return parameter is not None and type(parameter) is nn.Parameter


def run_weightless(copy: Callable[[], nn.Module], run: Callable[[nn.Module], _T]) -> _T:
    """`run` on a copy without weights; if that fails, on another one where every module does what its class says.

    A function that was put on a module as its forward holds on to that very module, and on a copy it would run the
    original. Weights of a kind of their own (sharded, quantized) may not go together with plain inputs.
    """
    copied = copy()
    try:
        return run(copied)
    except Exception:
        if why_altered(copied, names_below(copied, "")) is None:
            raise
    copied = copy()
    for module in copied.modules():
        vars(module).pop("forward", None)
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_plain(module, name) and not is_lazy(parameter):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
    return run(copied)


def _replaced_forward(module: nn.Module, name: str) -> str | None:
    if "forward" not in vars(module):
        return None
    if hasattr(module, "_hf_hook"):
        return (
            f"{name} runs behind a hook of accelerate (a device_map, offloading); take it off with "
            "`accelerate.hooks.remove_hook_from_submodules(model)` first, and dispatch what comes out"
        )
    return (
        f"{_joined(name, 'forward')} was replaced on the instance, so that no other forward of it would run; "
        f"`del {_expression(name)}.forward` first, and put it on what comes out again"
    )


def _runs_another_model(model: nn.Module, path: str) -> str | None:
    """Of a module around another one: whether its copy would run the original's modules, and never a rewritten one."""
    around = model.get_submodule(path)
    forward = vars(around).get("forward")
    if forward is None or _is_copied(forward):
        return None
    return (
        f"the {type(around).__name__} around it has a forward that was put on it as a function, which a copy of the "
        f"model would share with the original; `del {_expression(path)}.forward` first, and put it on what comes out "
        "again"
    )


def _is_copied(function: Any) -> bool:
    """Whether a deep copy of a function runs the copy of its module: methods and their partials do."""
    if isinstance(function, functools.partial):
        given = (function.func, *function.args, *function.keywords.values())
        return any(isinstance(value, nn.Module) or _is_copied(value) for value in given)
    return isinstance(function, types.MethodType)


def _sharded_or_quantized(module: nn.Module, name: str) -> str | None:
    sharded = f"{name or 'the model'} is sharded (FSDP); give the model before that, and shard what comes out"
    if any(cls.__name__ in _SHARDED for cls in type(module).__mro__):
        return sharded
    kinds: dict[str, str] = {}
    for own, tensor in module._parameters.items():
        if tensor is not None and not is_plain(module, own) and not is_lazy(tensor):
            kinds[own] = type(tensor).__name__
    if "DTensor" in kinds.values():
        return sharded
    if "quantized" in type(module).__module__:
        kinds.setdefault("weight", f"weight of {type(module).__module__}.{type(module).__name__}")
    for own, kind in kinds.items():
        return (
            f"{_joined(name, own)} is a {kind} and no plain parameter; give the model with plain weights in "
            "floating point, and quantize or wrap what comes out"
        )
    return None


def _computed(module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Tensors of a module that are computed from others at every call: name, what they are, and the way back."""
    if is_parametrized(module):
        for tensor in module.parametrizations:  # type: ignore[union-attr]
            yield tensor, "parametrized", "torch.nn.utils.parametrize.remove_parametrizations({}, {!r})"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            yield hook._tensor_name, "pruned by a mask", "torch.nn.utils.prune.remove({}, {!r})"
        elif isinstance(hook, WeightNorm):
            yield hook.name, "under weight_norm", "torch.nn.utils.remove_weight_norm({}, {!r})"
        elif isinstance(hook, SpectralNorm):
            yield hook.name, "under spectral_norm", "torch.nn.utils.remove_spectral_norm({}, {!r})"


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def _expression(name: str) -> str:
    return f"model.get_submodule({name!r})" if name else "model"
