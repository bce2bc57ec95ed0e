"""Where a model computes softmax(QK)V, told by what its numbers come from, and not by how discovery reads its code.

Discovery would be its own judge otherwise: what it does not see would not count as attention. A gate or a pooling that
is a softmax of one projection is none: there is no product of two activations before it.
"""

from enum import Flag, auto
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from armour_surgery.calls import run, running, without_fast_paths
from armour_surgery.copies import alias, copy_of_zeros, has_weights, meta_copy
from armour_surgery.examples import on_meta, part_of, with_numbers
from armour_surgery.shapes import RememberedShapes

__all__ = ["attention_cores"]


class _Is(Flag):
    """What a tensor is made of."""

    NOTHING = 0
    DATA = auto()  # depends on what the model was fed
    PARAMETER = auto()  # a parameter or buffer, as it is but for its shape
    PRODUCT = auto()  # DATA: element by element, of two tensors, not summed yet
    LOGITS = auto()  # DATA: products of queries and keys
    MIXED_LOGITS = auto()  # LOGITS that went through one projection (talking heads)
    WEIGHTS = auto()  # the softmax of LOGITS


_LOGITS = _Is.LOGITS | _Is.MIXED_LOGITS
_BATCHED = ("bmm", "baddbmm")
_PROJECTIONS = ("mm", "addmm", "linear", "convolution", "_convolution", "mkldnn_convolution")
_SOFTMAX = ("_softmax", "_safe_softmax", "exp")
_FUSED = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "flex_attention")
_SHAPE = ("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze",
          "squeeze", "clone", "split", "split_with_sizes", "unbind", "alias", "detach", "_to_copy")  # fmt: skip


class _Follow(TorchDispatchMode):
    """Notes for every tensor what it is made of; `cores` are the modules that ran at each attention that it saw."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cores: list[frozenset[str]] = []
        self._stack = stack
        self._is = WeakTensorKeyDictionary()
        # The modules in which a softmax was taken may not be those in which it is used.
        self._softmax_in: frozenset[str] = frozenset()

    def mark(self, tensor: Tensor, kind: _Is) -> None:
        self._is[tensor] = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in pytree.arg_tree_leaves(*args, **(kwargs or {})) if isinstance(leaf, Tensor)]
        kinds = [self._is.get(tensor, _Is.NOTHING) for tensor in tensors]  # type: ignore[no-untyped-call]
        kind = self._kind(name, tensors, kinds)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._is[leaf] = kind
        return result

    def _kind(self, name: str, tensors: list[Tensor], kinds: list[_Is]) -> _Is:
        everything = _Is.NOTHING
        for kind in kinds:
            everything |= kind
        if name.startswith(_FUSED):
            self._seen()
            return _Is.DATA
        if _Is.DATA not in everything:
            return everything if name in _SHAPE else _Is.NOTHING
        if name in _BATCHED:
            # einsum multiplies by a plain weight in a batch of one.
            if tensors[-1].shape[0] > 1 or _Is.PARAMETER not in everything:
                return self._product(kinds[-2:], _Is.LOGITS)
            return self._projected(everything)
        if name in _PROJECTIONS:
            return self._projected(everything)
        if name in ("mul", "mul_") and len(kinds) == 2 and all(_Is.DATA in kind for kind in kinds):
            return self._product(kinds, _Is.PRODUCT) | (everything & _LOGITS)
        if name == "sum" and _Is.PRODUCT in everything:
            return _Is.DATA | _Is.LOGITS
        if name in _SOFTMAX and everything & _LOGITS:
            self._softmax_in = frozenset(self._stack)
            return _Is.DATA | _Is.WEIGHTS
        kept = everything & ~_Is.PARAMETER
        return kept if name in _SHAPE else kept & ~_Is.PRODUCT

    def _product(self, kinds: list[_Is], otherwise: _Is) -> _Is:
        if _Is.WEIGHTS in kinds[0] | kinds[1]:
            self._seen()
            return _Is.DATA
        return _Is.DATA | otherwise

    def _projected(self, everything: _Is) -> _Is:
        if _Is.WEIGHTS in everything:
            return _Is.DATA | _Is.WEIGHTS
        return _Is.DATA | (_Is.MIXED_LOGITS if _Is.LOGITS in everything else _Is.NOTHING)

    def _seen(self) -> None:
        self.cores.append(frozenset(self._stack) | self._softmax_in)
        self._softmax_in = frozenset()


def attention_cores(model: nn.Module, example: dict[str, Tensor], *, numbers: bool) -> list[frozenset[str]] | None:
    """For each softmax(QK)V that a model computes, the names of the modules around it; None where it does not run.

    A copy without weights is run, and with `numbers` one that has them, where it does not run without. The model is not
    changed.
    """
    try:
        return _run(meta_copy(model), on_meta(example))
    except Exception:
        if not numbers:
            return None
        # It looks at numbers; what fails here once more is told by discovery.
        copied = alias(model) if has_weights(model) else copy_of_zeros(model, part_of(example))
    try:
        return _run(copied, with_numbers(example, "cpu", noise=False))
    except Exception:
        return None


def _run(copied: nn.Module, inputs: dict[str, Tensor]) -> list[frozenset[str]]:
    copied.eval()
    with running(copied) as stack, torch.no_grad(), without_fast_paths(), RememberedShapes():
        follow = _Follow(stack)
        for tensor in (*copied.parameters(), *copied.buffers()):
            follow.mark(tensor, _Is.PARAMETER)
        for tensor in inputs.values():
            follow.mark(tensor, _Is.DATA)
        with follow:
            run(copied, inputs)
    return follow.cores
