"""Building a module without its weights, and comparing what was built with a live model.

A skeleton has its Parameters on the meta device and its buffers real. Buffers must be real because many are in no
checkpoint (LeViT's `attention_bias_idxs`, BEiT's `relative_position_index`, rotary tables): only the host's own
constructor knows their values.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from armour_surgery.errors import SchemaError
from armour_surgery.patching import patched

__all__ = [
    "WithoutDrawing",
    "changed_attributes",
    "first_difference",
    "meta_parameters",
    "restore_attributes",
    "to_meta",
]

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
# Functions of nn.init that are not here draw by these methods, or do not draw.
_DRAWING = (
    *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_),
    *(nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.kaiming_normal_),
)
_ADJUSTING = (Tensor.mul_, Tensor.div_, Tensor.add_, Tensor.sub_, Tensor.clamp_)
# Numbers of one tensor.
_LARGE = 2**28


@contextmanager
def meta_parameters(*, huge: bool = True) -> Iterator[None]:
    """Inside, every Parameter that a module registers moves to the meta device at once; buffers stay real.

    Ties survive: one Parameter registered twice becomes one meta Parameter. Modules that other threads build meanwhile
    are whole. `huge` tensors are never made at all.
    """
    register = nn.Module.register_parameter
    # By identity, and only for as long as somebody holds the original: all of them together may not fit into memory.
    moved = WeakTensorKeyDictionary()

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is None or param.device.type == "meta" or is_lazy(param):
            return
        if param not in moved:
            twin = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            # Libraries hang marks on their parameters (`_no_weight_decay`), which a model keeps.
            twin.__dict__.update(param.__dict__)
            moved[param] = twin
        module._parameters[name] = moved[param]

    with patched(nn.Module, "register_parameter", register_on_meta), _LargeOnMeta() if huge else nullcontext():
        yield


class _LargeOnMeta(TorchFunctionMode):
    """Makes on the meta device at once what may not fit into memory even alone: a language model's table of words."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None:
            sizes = args[0] if args and isinstance(args[0], tuple | list) else args
            if math.prod(sizes) > _LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


class WithoutDrawing(TorchFunctionMode):
    """Inside, Parameters are not filled with random numbers, which takes most of the time that building takes.

    Neither are these brought into range, as libraries' initializations go on to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = func in _DRAWING
        if draws or func in _ADJUSTING:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter) and (draws or tensor in self._drawn):
                self._drawn[tensor] = True
                return tensor
        return func(*args, **kwargs)


def to_meta(model: nn.Module) -> nn.Module:
    """The same module with its Parameters moved to the meta device; ties stay, and so do buffers."""
    with meta_parameters():
        for module in model.modules():
            for name, param in list(module._parameters.items()):
                module.register_parameter(name, param)
    return model


def first_difference(built: nn.Module, model: nn.Module) -> str | None:
    """What differs first between a fresh build and the model: module types, then state_dict keys and shapes.

    None when nothing does. The text is the middle of an error message, from the user's side ("the model has ...").
    """
    fresh_types, types = _module_types(built), _module_types(model)
    for fqn in {**types, **fresh_types}:
        ours, theirs = fresh_types.get(fqn), types.get(fqn)
        if ours != theirs:
            where = f"module {fqn!r}" if fqn else "the model itself"
            return f"{where} is {theirs or 'absent'} in the model and {ours or 'absent'} in the build"
    fresh_shapes, shapes = _shapes(built), _shapes(model)
    for key in {**shapes, **fresh_shapes}:
        built_shape, shape = fresh_shapes.get(key, "absent"), shapes.get(key, "absent")
        if built_shape != shape:
            return f"{key} is {shape} in the model and {built_shape} in the build"
    return None


def changed_attributes(built: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Plain attributes whose values differ from a fresh build, as `{"fqn.attribute": JSON value}`.

    Plain are int, float, bool, str, None and tuples of these. Names that start with an underscore are the libraries'
    own bookkeeping, and `training` belongs to the caller; both are left out, as is what only one side has.
    """
    modules = dict(model.named_modules())
    changed: dict[str, Any] = {}
    for fqn, fresh in built.named_modules():
        values = vars(modules[fqn])
        for name, default in vars(fresh).items():
            if not _is_attribute_name(name) or name not in values:
                continue
            value = values[name]
            if not (_is_plain(default) and _is_plain(value)):
                continue
            if (type(value), value) != (type(default), default):
                changed[f"{fqn}.{name}" if fqn else name] = _to_json(value)
    return changed


def restore_attributes(model: nn.Module, attributes: dict[str, Any]) -> None:
    """Put `changed_attributes` back on a fresh build.

    Raises:
        SchemaError: a name is private, names no module or no plain attribute of it, or a value has another type.
    """
    modules = dict(model.named_modules())
    for path, value in attributes.items():
        fqn, _, name = path.rpartition(".")
        if fqn not in modules:
            raise SchemaError(f"attributes name {path!r}, but the host has no module {fqn!r}; the folder is damaged")
        # `modules` stands for "no such attribute": a dict is not plain, and None would be.
        current = vars(modules[fqn]).get(name, modules)
        if not _is_attribute_name(name) or not _is_plain(current):
            raise SchemaError(f"attributes name {path!r}, which is not a plain attribute that may be set on the host")
        restored = _from_json(value)
        if not _compatible(current, restored):
            raise SchemaError(
                f"attributes set {path!r} to {value!r}, but the host has {current!r} there, which is of another type"
            )
        # Into the instance dictionary, where the old value is: no property or __setattr__ of the host may run.
        modules[fqn].__dict__[name] = restored


def _module_types(model: nn.Module) -> dict[str, str]:
    return {fqn: f"{type(part).__module__}.{type(part).__qualname__}" for fqn, part in model.named_modules()}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    # A module may keep extra state that is no tensor.
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def _is_attribute_name(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_") and name != "training"


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        # A named tuple has a class of its own, which JSON would lose.
        return type(value) is tuple and all(map(_is_plain, value))
    if isinstance(value, float):
        # JSON has no infinity and no NaN.
        return type(value) is float and math.isfinite(value)
    return value is None or type(value) in (bool, int, str)


def _to_json(value: Any) -> Any:
    return list(map(_to_json, value)) if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    return tuple(map(_from_json, value)) if isinstance(value, list) else value


def _compatible(current: object, value: object) -> bool:
    if not _is_plain(value):
        return False
    # None says nothing about the type of what may stand in its place.
    if current is None or value is None:
        return True
    # A rate of 0 that became 0.1 is no other kind of value. A bool is: `type` tells it from an int.
    numbers = (int, float)
    if type(current) in numbers and type(value) in numbers:
        return True
    return type(current) is type(value)
