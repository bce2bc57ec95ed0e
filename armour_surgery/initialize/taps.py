"""Watch what goes into and comes out of single weights while a model runs, whatever module or function uses them."""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Stop", "Tap", "Taps", "tokens"]

# torch hands a call of this one over as a whole, and what it calls in turn is then not watched any more. This is the
# same function, told that there is nobody to hand it to.
_attention_in_steps = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda arguments: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
_PRODUCTS = {F.linear, torch.conv1d, torch.conv2d, F.conv1d, F.conv2d}


class Stop(Exception):
    """Raised by a tap that has seen enough; the run that it interrupts is over."""


Tap = Callable[[Tensor, Callable[[], Tensor]], Tensor]


class Taps(TorchFunctionMode):
    """While open, a product with a watched weight is handed to its tap: `tap(input, product) -> output`."""

    def __init__(self, taps: dict[Tensor, Tap]) -> None:
        super().__init__()
        self._taps = list(taps.items())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _attention_in_steps(*args, **kwargs)
        if func in _PRODUCTS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            tap = self._tap_of(weight) if isinstance(weight, Tensor) else None
            if tap is not None:
                source = args[0] if args else kwargs["input"]
                return tap(source, lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def _tap_of(self, weight: Tensor) -> Tap | None:
        # By where its numbers begin: a host may apply a slice of a parameter, which is another object at every call.
        # And by where they are now, since a weight may come and go (`placement.py`).
        place = weight.data_ptr()
        return next((tap for watched, tap in self._taps if watched.data_ptr() == place), None)


def tokens(tensor: Tensor, weight: Tensor) -> Tensor:
    """The input or output of a product as `[B, N, C]`: images, tokens, channels."""
    if weight.ndim > 2:
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])
