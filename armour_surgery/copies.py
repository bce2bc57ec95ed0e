"""Copies of a model that have its structure and none of its numbers, and what numbers a model has."""

import copy
import enum
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
    "align",
    "copy_of_zeros",
    "copy_weights",
    "copy_with",
    "floating_type",
    "floating_weight",
    "full_copy",
    "hand_over",
    "has_weights",
    "meta_copy",
    "own_memory",
    "plain_size",
    "sharing_copy",
]

_CALL_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name and "state_dict" not in name)
# Where transformers' own hooks are written, with which its models collect hidden states in a forward pass.
_COLLECTING = "transformers.utils.output_capturing"
# What deepcopy hands over as it is: nothing behind these is copied, so nothing behind them needs replacing.
_ATOMIC = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, str, bytes, int, float)
# Types of what is the same in a copy, looked up where asking `isinstance` of everything would take longer.
_UNCHANGED = frozenset((*_ATOMIC, bool, type(None), torch.dtype, torch.device, torch.Size))
# What nn.Module leaves out of copies of itself.
_COMPILED = "_compiled_call_impl"


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


def sharing_copy(module: nn.Module) -> nn.Module:
    """A deep copy with tensors of its own that hold the module's numbers where the module does; without hooks.

    It costs no memory. To give one of them other numbers, replace what it holds (`tensor.data = ...`).
    """

    def sharing(tensor: Tensor) -> Tensor:
        shared = tensor.detach()
        return nn.Parameter(shared, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shared

    return _copy(module, sharing, hooks=False)


def alias(module: nn.Module) -> nn.Module:
    """A deep copy of everything but the tensors: it computes with the module's own weights, and has no user's hooks.

    Flags, methods and containers may be changed on it without the module noticing.
    """
    return _copy(module, lambda tensor: tensor, hooks=False)


def _copy(module: nn.Module, stand_in: Callable[[Tensor], Tensor | None], hooks: bool) -> nn.Module:
    """A deep copy in which every tensor for which there is a stand-in is that."""
    return _Copier(module, stand_in, hooks).copied()


class _Copier:
    """What `copy.deepcopy` does, with other tensors, and without hooks if not told otherwise.

    A model is modules, dictionaries and lists for the most part. Those are copied here, several times as fast; what
    else it holds is left to `deepcopy`, which asks its memo first and takes what stands there.
    """

    def __init__(self, root: nn.Module, stand_in: Callable[[Tensor], Tensor | None], hooks: bool) -> None:
        self._root = root
        self._stand_in = stand_in
        self._hooks = hooks
        self._memo: dict[int, Any] = {}
        self._walked: set[int] = set()
        # The hooks that a module has, and the dictionary that its copy gets for them.
        self._hooked: list[tuple[Mapping[int, Any], dict[int, Any]]] = []

    def copied(self) -> nn.Module:
        """The copy."""
        copied: nn.Module = self._copy(self._root)
        given_hooks = [(given, empty) for given, empty in self._hooked if given]
        if given_hooks:
            self._walk()
        kept: set[int] = set()
        for given, _ in given_hooks:
            kept.update(number for number, hook in given.items() if _is_the_models_own(hook, self._walked))
        for given, empty in given_hooks:
            # Besides hooks by number there are marks by the same number (`with_kwargs`). The memo knows their owners.
            empty.update({number: copy.deepcopy(hook, self._memo) for number, hook in given.items() if number in kept})
        return copied

    def _copy(self, item: Any) -> Any:
        cls: Any = type(item)
        if cls in _UNCHANGED:
            return item
        if id(item) in self._memo:
            return self._memo[id(item)]
        if cls is dict or cls is OrderedDict:
            made = self._memo[id(item)] = cls()
            for key, value in item.items():
                made[self._copy(key)] = value if type(value) in _UNCHANGED else self._copy(value)
            return made
        if cls is list:
            items: list[Any] = []
            self._memo[id(item)] = items
            items.extend(map(self._copy, item))
            return items
        if (cls is tuple or cls is set) and all(type(part) in _UNCHANGED for part in item):
            self._memo[id(item)] = item if cls is tuple else set(item)
            return self._memo[id(item)]
        if isinstance(item, enum.Enum):
            return item  # as `deepcopy` has it, and nothing to walk through the model for
        if isinstance(item, Tensor):
            self._replace(item)
        elif isinstance(item, nn.Module) and _is_plain(cls):
            return self._module(item)
        else:
            self._walk()
        return copy.deepcopy(item, self._memo)

    def _module(self, module: nn.Module) -> nn.Module:
        made = self._memo[id(module)] = type(module).__new__(type(module))
        if not self._hooks:
            self._leave_hooks(module)
        attributes = vars(made)
        for name, value in vars(module).items():
            if name != _COMPILED:
                # Most are unchanged; asked here, since a call takes longer.
                attributes[name] = value if type(value) in _UNCHANGED else self._copy(value)
        return made

    def _leave_hooks(self, module: nn.Module) -> None:
        """In place of each dictionary of hooks an empty one is taken; the hooks are not walked through."""
        for name in _CALL_HOOKS:
            given = vars(module)[name]
            if id(given) not in self._memo:
                self._memo[id(given)] = OrderedDict()
                self._hooked.append((given, self._memo[id(given)]))

    def _replace(self, tensor: Tensor) -> None:
        # A lazy parameter has no shape yet; deepcopy knows how to copy it.
        if id(tensor) not in self._memo and not is_lazy(tensor):
            replacement = self._stand_in(tensor)
            if replacement is not None:
                self._memo[id(tensor)] = replacement

    def _walk(self) -> None:
        """Replace the tensors wherever the model keeps them: what `deepcopy` copies may lead to any of them."""
        waiting: list[Any] = [] if self._walked else [self._root]
        while waiting:
            item = waiting.pop()
            if id(item) in self._walked or isinstance(item, _ATOMIC):
                continue
            self._walked.add(id(item))
            if isinstance(item, Tensor):
                self._replace(item)
            elif isinstance(item, Mapping):
                waiting.extend(item.values())
            elif isinstance(item, list | tuple | set | frozenset | deque):
                waiting.extend(item)
            else:
                attributes = dict(getattr(item, "__dict__", {}))
                if isinstance(item, nn.Module) and not self._hooks:
                    self._leave_hooks(item)
                    for name in _CALL_HOOKS:
                        del attributes[name]
                waiting.extend(attributes.values())


@functools.cache
def _is_plain(cls: type) -> bool:
    """Whether a module is copied as its attributes are: its class does not say otherwise, nor keeps anything else."""
    own = {"__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__new__"}
    # Convolutions have a `__setstate__` for what was pickled by a torch of years ago.
    others = [base for base in cls.__mro__ if base not in (nn.Module, nn.modules.conv._ConvNd, object)]
    return not any({*own, "__slots__"} & vars(base).keys() for base in others)


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
        empty = nn.Parameter(_empty(tensor), tensor.requires_grad)
        # Marks that libraries leave on parameters, such as transformers' `_is_hf_initialized`.
        empty.__dict__.update(tensor.__dict__)
        return empty
    # deepcopy refuses tensors that a computation made (an eval-time cache holds such); these are leaves.
    plain = _empty(tensor) if buffers else tensor.detach().clone()
    return plain.requires_grad_(tensor.requires_grad)


def _empty(tensor: Tensor) -> Tensor:
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.is_contiguous():
        # On meta, `empty_like` takes ten times as long.
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor, device="meta")


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
            self._twins[tensor] = _plain_twin(tensor) if fake else _empty(tensor)
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


def align(model: nn.Module) -> None:
    """Copy weights that are mapped from a file to where torch would have put them, in place.

    In a file tensors begin where their neighbors end, and for memory that is not aligned torch takes other kernels,
    whose sums round differently.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Parameters and buffers of one model into another of equal structure, in the other's types."""
    with torch.no_grad():
        tensors = {**dict(source.named_parameters()), **dict(source.named_buffers())}
        for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
            tensor.copy_(tensors[name])


def hand_over(source: nn.Module, target: nn.Module) -> None:
    """Let a model of equal structure hold what the source holds: the same memory, and no copies."""
    tensors = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
        tensor.data = tensors[name].data


def own_memory(module: nn.Module) -> None:
    """Copy tensors that are a part of larger memory, in place: as views they would keep all of it."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            tensor.data = tensor.data.clone()


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
