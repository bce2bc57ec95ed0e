"""Notice, while a model runs, that attention may have happened: known functions, and what looks like others."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from armour_surgery.patching import patched

__all__ = ["watched"]

# What attention cannot do without. Everything else about it is read off the traced graph.
_CORE_FUNCTIONS = {
    F.scaled_dot_product_attention,
    F.softmax,
    torch.softmax,
    torch.Tensor.softmax,
    F.log_softmax,
    torch.log_softmax,
    torch.Tensor.log_softmax,
    F.softmin,
    F.multi_head_attention_forward,
}
_EXPONENTIALS = {torch.exp, torch.exp_, torch.Tensor.exp, torch.Tensor.exp_}
_SUMS = {torch.sum, torch.Tensor.sum}
_DIVISIONS = {
    torch.div, torch.true_divide, torch.Tensor.div, torch.Tensor.div_, torch.Tensor.__truediv__,
    torch.Tensor.__itruediv__,
}  # fmt: skip
# Operators that torch brings along.
_TORCHS_OWN = {"aten", "prim", "prims", "quantized", "higher_order", "torchvision"}

Seen = Callable[[str | None], None]


class _Watch(TorchFunctionMode):
    """Tell `seen` each time a function that attention needs is called."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        # Tensors that are exp(..), and their sums: whoever divides by one of these writes a softmax out.
        self._powers = WeakTensorKeyDictionary()
        self._sums = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CORE_FUNCTIONS:
            self.seen(None)
        name = _name_of_operator(func)
        if name is not None:
            self.unknown(name, (args, kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._note_exponentials(func, args, result)
        return result

    def _note_exponentials(self, func: Any, args: tuple[Any, ...], result: Tensor) -> None:
        first = args[0] if args else None
        if func in _EXPONENTIALS and result.ndim > 2:
            self._powers[result] = True
        elif func in _SUMS and isinstance(first, Tensor) and first in self._powers:
            self._sums[result] = True
        elif func in _DIVISIONS and len(args) > 1 and isinstance(args[1], Tensor) and args[1] in self._sums:
            self.seen(None)

    def unknown(self, name: str, given: Any) -> None:
        """Tell of a call that nobody can look into, if what it is given may be queries, keys and values."""
        if _may_be_attention([leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]):
            self.seen(
                f"it calls {name}, which cannot be looked into and may be attention; have it call "
                "F.scaled_dot_product_attention instead, and convert it then"
            )


def _name_of_operator(func: Any) -> str | None:
    """The name of an operator that is none of torch's own; None for anything else."""
    if not isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return None
    name = str(func._schema.name if isinstance(func, torch._ops.OpOverload) else func._qualified_op_name)
    return None if name.partition("::")[0] in _TORCHS_OWN else name


def _may_be_attention(given: list[Tensor]) -> bool:
    """Whether among some tensors are queries, keys and values, or all three in one."""
    tensors = [tensor for tensor in given if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point()]
    if len(tensors) == 1:
        # [B, N, 3, H, d], in whatever order.
        return tensors[0].ndim == 5 and 3 in tensors[0].shape[1:-1]
    if len(tensors) < 3:
        return False
    q, k, v = tensors[:3]
    same_rank = q.ndim == k.ndim == v.ndim >= 3
    return same_rank and q.shape[-1] == k.shape[-1] and k.shape[:-1] == v.shape[:-1]


@contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """While open, `seen` is called whenever attention may happen: with None where its graph will tell, or a reason."""
    watch = _Watch(seen)
    with ExitStack() as stack:
        for function in _functions_of_others(torch.autograd.Function):
            stack.enter_context(patched(function, "forward", _noted(function, watch)))
        stack.enter_context(watch)
        yield


def _functions_of_others(base: type) -> Iterator[Any]:
    """The classes of autograd functions that others than torch wrote: kernels of Triton's hide in such."""
    functions: list[Any] = base.__subclasses__()
    for function in functions:
        if not function.__module__.startswith("torch.") and "forward" in vars(function):
            yield function
        yield from _functions_of_others(function)


def _noted(function: Any, watch: _Watch) -> Callable[..., Any]:
    forward = function.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        watch.unknown(f"{function.__name__}.apply", (args, kwargs))
        return forward(*args, **kwargs)

    return noted
