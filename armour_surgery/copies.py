"""Copies of a model that have its structure and none of its numbers, and what numbers a model has."""

import copy
import functools
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "MetaTwins",
    "alias",
    "copy_of_zeros",
    "copy_weights",
    "copy_with",
    "floating_type",
    "floating_weight",
    "full_copy",
    "has_weights",
    "meta_copy",
    "plain_size",
]

_CALL_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name and "state_dict" not in name)
# Where transformers' own hooks are written, with which its models collect hidden states in a forward pass.
_COLLECTING = "transformers.utils.output_capturing"
# What deepcopy hands over as it is: nothing behind these is copied, so nothing behind them needs replacing.
_ATOMIC = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, str, bytes, int, float)


def meta_copy(module: nn.Module, *, buffers: bool = True) -> nn.Module:
    """A deep copy of `module` in which every parameter is an empty tensor on the meta device.

    It has the same classes, plain attributes, training flags, shapes, strides, dtypes and `requires_grad`;
    a parameter that has two names has two names in the copy. Weights are never copied, so the cost does not
    depend on their size. With `buffers`, buffers and tensors kept as plain attributes go to meta too;
    without, they are detached copies with their values.

    The original is not run and not changed, and shares no container with the copy: filling a cache of the
    copy (as LeViT does with its attention biases) leaves the original's alone. Forward and backward hooks
    are not carried over, since a user's hook must not see a dry run, but for those that the model put on itself
    as part of how it computes: methods of what it holds, which act on the copy there, and transformers' own.
    """
    return _copy(module, lambda tensor: _stand_in(tensor, buffers), hooks=False)


def full_copy(module: nn.Module) -> nn.Module:
    """A deep copy with weights and hooks, also of a module that keeps computed tensors in a cache.

    `copy.deepcopy` refuses tensors that autograd made, such as the attention biases that LeViT caches in eval mode;
    here they become leaves with the same values.
    """
    return _copy(module, lambda tensor: None if tensor.is_leaf else tensor.detach().clone(), hooks=True)


def alias(module: nn.Module) -> nn.Module:
    """A deep copy of everything but the tensors: it computes with the module's own weights, and has no user's hooks.

    Flags, methods and containers may be changed on it without the module noticing.
    """
    return _copy(module, lambda tensor: tensor, hooks=False)


def _copy(module: nn.Module, stand_in: Callable[[Tensor], Tensor | None], hooks: bool) -> nn.Module:
    """A deep copy in which every tensor for which there is a stand-in is that."""
    # deepcopy asks its memo first and takes what stands there: so tensors are replaced wherever they are kept, which
    # includes plain attributes and containers that no method of nn.Module knows of.
    memo: dict[int, Any] = {}
    seen: set[int] = set()
    waiting: list[Any] = [module]
    # The hooks that a module has, and the dictionary that its copy gets for them.
    hooked: list[tuple[Mapping[int, Any], dict[int, Any]]] = []
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, _ATOMIC):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            # A lazy parameter has no shape yet; deepcopy knows how to copy it.
            replacement = None if is_lazy(item) else stand_in(item)
            if replacement is not None:
                memo[id(item)] = replacement
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset | deque):
            waiting.extend(item)
        else:
            attributes = dict(getattr(item, "__dict__", {}))
            if isinstance(item, nn.Module) and not hooks:
                # In place of each dictionary of hooks, deepcopy takes an empty one; the hooks are not walked through.
                for name in _CALL_HOOKS:
                    given = attributes.pop(name)
                    memo[id(given)] = OrderedDict()
                    hooked.append((given, memo[id(given)]))
            waiting.extend(attributes.values())
    copied = copy.deepcopy(module, memo)
    kept: set[int] = set()
    for given, _ in hooked:
        kept.update(number for number, hook in given.items() if _is_the_models_own(hook, seen))
    for given, empty in hooked:
        # Besides hooks by number there are marks by the same number (`with_kwargs`). The memo knows the hooks' owners.
        empty.update({number: copy.deepcopy(hook, memo) for number, hook in given.items() if number in kept})
    return copied


def _is_the_models_own(hook: Any, reached: set[int]) -> bool:
    """Whether a model put a hook on itself; `reached` are the ids of all that it holds."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if isinstance(hook, types.FunctionType):
        return hook.__module__ == _COLLECTING
    owner = hook.__self__ if isinstance(hook, types.MethodType) else hook
    return id(owner) in reached


def _stand_in(tensor: Tensor, buffers: bool) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
        # Marks that libraries leave on parameters, such as transformers' `_is_hf_initialized`.
        empty.__dict__.update(tensor.__dict__)
        return empty
    # deepcopy refuses tensors that a computation made (an eval-time cache holds such); these are leaves.
    plain = torch.empty_like(tensor, device="meta") if buffers else tensor.detach().clone()
    return plain.requires_grad_(tensor.requires_grad)


def copy_of_zeros(module: nn.Module, part: str = "") -> nn.Module:
    """A copy in which the submodule `part`, which will run alone, is on the CPU; by default it is all of it.

    Parameters there are zero and buffers keep their values, where they have any. The others stay without numbers: the
    text model behind a tower may not fit into memory.

    For models that look at numbers: what they look at are tables more than weights.
    """
    copied = meta_copy(module, buffers=False)
    filled = copied.get_submodule(part)
    values = {name: buffer for name, buffer in filled.named_buffers() if not buffer.is_meta}
    filled.to_empty(device="cpu")
    for name, tensor in (*filled.named_parameters(), *filled.named_buffers()):
        tensor.detach().copy_(values.get(name, torch.zeros(())))
    return copied


def copy_with(module: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy in which every tensor is what `stand_in` makes of it; without hooks."""
    return _copy(module, stand_in, hooks=False)


class MetaTwins:
    """Tensors without numbers in place of those of a call, or of many: what was one tensor stays one."""

    def __init__(self) -> None:
        # By identity, and only as long as the tensor lives: its id may be given to another one then.
        self._twins = WeakTensorKeyDictionary()

    def of(self, arguments: Any) -> Any:
        """The same arguments on meta, with sizes that are numbers."""
        return pytree.tree_map_only((Tensor, torch.SymInt), self._twin, arguments)

    def _twin(self, tensor: Any) -> Any:
        if isinstance(tensor, torch.SymInt):
            return plain_size(tensor)
        fake = isinstance(tensor, FakeTensor)
        if tensor.is_meta and not fake:
            return tensor
        if tensor not in self._twins:
            self._twins[tensor] = _plain_twin(tensor) if fake else torch.empty_like(tensor, device="meta")
        twin: Tensor = self._twins[tensor]
        return twin


def plain_size(size: Any) -> int:
    """The number that a size has in the call at hand; of one that is a symbol, nothing is decided by asking."""
    known: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(known)


def _plain_twin(fake: Tensor) -> Tensor:
    """What torch.export calls a model with, on meta: made of it, the twin would be fake too."""
    sizes, strides = [list(map(plain_size, numbers)) for numbers in (fake.shape, fake.stride())]
    return torch.empty_strided(sizes, strides, dtype=fake.dtype, device="meta", requires_grad=fake.requires_grad)


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Parameters and buffers of one model into another of equal structure, in the other's types."""
    with torch.no_grad():
        tensors = {**dict(source.named_parameters()), **dict(source.named_buffers())}
        for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
            tensor.copy_(tensors[name])


def has_weights(module: nn.Module) -> bool:
    """Whether every parameter has its numbers: False for a weightless copy and for a skeleton."""
    return not any(parameter.is_meta for parameter in module.parameters())


def floating_type(module: nn.Module) -> torch.dtype:
    """The type that a module's images come in: that of its weights."""
    weight = floating_weight(module)
    return torch.float32 if weight is None else weight.dtype


def floating_weight(module: nn.Module) -> nn.Parameter | None:
    """The first floating-point parameter: its type and device are those of the images that a model takes."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter
    return None
