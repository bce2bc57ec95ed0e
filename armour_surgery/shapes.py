"""What operators make of shapes, remembered: runs without weights ask for the same few again and again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["RememberedShapes"]

# Shape, strides and type of one result.
_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
# A process that goes through all models of a library forgets now and then.
_MOST = 50_000

_known: dict[Any, tuple[_Layout, ...]] = {}
_makes_new: dict[Any, bool] = {}
_in_place: dict[Any, bool] = {}


class RememberedShapes(TorchDispatchMode):
    """While entered, an operator on the meta device is worked out once for each layout of its inputs.

    torch works many of them out in Python (a layer norm takes milliseconds), and the blocks of a transformer are alike:
    a model's forward on the meta device takes about half the time. Results are what they would be, empty tensors with
    nothing in common with the inputs, or the first input where its numbers change and nothing else. Operators that
    return views or change anything more, and everything on another device, go their usual way.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = _key_of(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        if key not in _known:
            result = func(*args, **kwargs)
            layouts = () if _changes_numbers(func) else _layouts_of(result)
            if layouts is not None:
                if len(_known) >= _MOST:
                    _known.clear()
                _known[key] = layouts
            return result
        if not _known[key]:
            return args[0]  # nothing new comes of it: its numbers are others
        results = []
        for shape, strides, dtype in _known[key]:
            results.append(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))
        return results[0] if len(func._schema.returns) == 1 else tuple(results)


def _key_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All that the layout of a result depends on; None where it may depend on more, or is not worth remembering."""
    first = args[0] if args else None
    if isinstance(first, list) and first:
        first = first[0]  # of tensors to concatenate
    if not isinstance(first, Tensor) or not first.is_meta:
        return None
    if not _returns_something_new(func) and not _changes_numbers(func):
        return None
    try:
        # Results of whole numbers may have torch's default type.
        key = (func, torch.get_default_dtype(), _described(args, first), _described(tuple(kwargs.items()), first))
        hash(key)
    except (LookupError, TypeError):
        return None
    return key


def _described(value: Any, first: Tensor) -> Any:
    """An argument as part of a key.

    Raises:
        LookupError: it is a tensor of which more than its layout matters.
    """
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.is_complex():
            raise LookupError
        if value.is_meta:
            return "meta", tuple(value.shape), value.stride(), value.dtype
        # Python's numbers come as tensors of no dimension. They do not decide the type beside a floating tensor that
        # has some; beside others it matters whether it was a number, which cannot be seen here.
        if value.ndim == 0 and first.ndim > 0 and first.is_floating_point():
            return "number", value.dtype
        raise LookupError
    if isinstance(value, list | tuple):
        return tuple(_described(item, first) for item in value)
    return type(value), value  # 1, 1.0 and True are equal, and make different things


def _returns_something_new(func: Any) -> bool:
    """Whether an operator changes no argument, and returns neither one of them nor a view of it."""
    if func not in _makes_new:
        schema = func._schema
        returned = [result.alias_info for result in schema.returns]
        _makes_new[func] = not schema.is_mutable and bool(returned) and not any(returned)
    return _makes_new[func]


def _changes_numbers(func: Any) -> bool:
    """Whether an operator changes the numbers of its first argument, returns that, and does nothing else."""
    if func not in _in_place:
        arguments, returns = func._schema.arguments, func._schema.returns
        changed = [argument.alias_info is not None and argument.alias_info.is_write for argument in arguments]
        returned = len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write
        _in_place[func] = torch.Tag.pointwise in func.tags and returned and changed[0] and sum(changed) == 1
    return _in_place[func]


def _layouts_of(result: Any) -> tuple[_Layout, ...] | None:
    """The layouts of one result or of several; None where something else than plain tensors comes back."""
    layouts = []
    for tensor in result if isinstance(result, tuple) else (result,):
        if type(tensor) is not Tensor or not tensor.is_meta:
            return None
        layouts.append((tuple(tensor.shape), tensor.stride(), tensor.dtype))
    return tuple(layouts)
