"""A smaller call of a module: fewer windows, tokens, rows and columns of an image. Numbers cost, and few tell as much.

Nothing says which axis of a tensor is what, so that guesses are tried; the first with which the module runs is taken.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from armour_surgery.traced import Call

__all__ = ["mapped", "outputs_of", "smaller"]

# Images, or windows, from which on there are a few.
_MANY_ROWS, _FEW_ROWS = 8, 3
_MANY_TOKENS, _FEW_TOKENS = 100, 59  # no numbers of heads or channels
# Sides of an image are halved down to this: most windows have 7, 8 or 12.
_SIDE = 16
# More tokens than this in front of an image are none of its prefix.
_PREFIX = 256


@dataclass(frozen=True)
class _Cut:
    """What is left of a call: the first tensor's shape, and of other axes by their size."""

    shape: tuple[int, ...]
    sizes: dict[int, int]
    tokens: int | None = None  # which the output has too
    grid: bool = False  # whether whole numbers of the call are sizes

    def of(self, call: Call, first: Tensor) -> Call:
        """The call's first numbers along every axis."""
        rows = first.shape[0]

        def cut(tensor: Tensor) -> Tensor:
            kept = [self.sizes.get(size, size) for size in tensor.shape]
            if tensor is first:
                kept = list(self.shape)
            elif tensor.ndim and rows % max(1, tensor.shape[0]) == 0:
                # Masks of windows are those of one image.
                kept[0] = min(tensor.shape[0], self.shape[0])
            for axis, size in enumerate(kept):
                tensor = tensor.narrow(axis, 0, size)
            return tensor

        fewer = mapped(call, cut)
        if self.grid:
            args, kwargs = pytree.tree_map_only(int, self._number, (fewer.args, fewer.kwargs))
            fewer = Call(args, kwargs)
        return fewer

    def _number(self, number: int) -> int:
        return number if isinstance(number, bool) else self.sizes.get(number, number)


def smaller(module: nn.Module, call: Call) -> Call:
    """The call with fewer windows, tokens, rows and columns if the module takes such a one; the call itself if not.

    `call` has numbers in its tensors.
    """
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if first is None or first.ndim < 3:
        return call
    module.eval()  # not chained: the train() of some modules returns nothing
    for cut in _cuts(first, leaves):
        fewer = cut.of(call, first)
        try:
            results = outputs_of(module, fewer, 0)
        except Exception:  # it knows how many there are
            continue
        if any(_follows(result, cut) for result in results):
            return fewer
    return call


def _cuts(first: Tensor, leaves: list[object]) -> Iterator[_Cut]:
    """What may be left of a call: least first."""
    rows = first.shape[0]
    kept_rows = (_FEW_ROWS, rows // 2, rows) if rows > _MANY_ROWS else (rows,)
    whole = _Cut(tuple(first.shape), {})
    inner = list(_fewer_tokens(first, leaves) if first.ndim == 3 else _smaller_images(first))
    for cut in [*inner, whole]:
        for kept in kept_rows:
            shape = (kept, *cut.shape[1:])
            if shape != whole.shape:
                yield replace(cut, shape=shape)


def _fewer_tokens(first: Tensor, leaves: list[object]) -> Iterator[_Cut]:
    rows, tokens, channels = first.shape
    grid = _grid(tokens, leaves)
    if grid:
        sizes = _halved(grid)
        left = sizes[math.prod(grid)] + tokens - math.prod(grid)
        yield _Cut((rows, left, channels), {**sizes, tokens: left}, grid=True)
    if tokens > _MANY_TOKENS:
        # Positions are told of the tokens alone that are parts of the image: there are a few less of those.
        others = {size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape[:-1]}
        parts = {size for size in others if 0 < tokens - size <= min(_PREFIX, tokens // 2)}
        left = _FEW_TOKENS + max((tokens - size for size in parts), default=0)
        if left < tokens:
            sizes = {size: size - (tokens - left) for size in {*parts, tokens}}
            yield _Cut((rows, left, channels), sizes, tokens=left)


def _grid(tokens: int, leaves: list[object]) -> tuple[int, ...]:
    """Whole numbers beside each other in a call that are the sides of its tokens, or none."""
    numbers = [leaf for leaf in leaves if type(leaf) is int]
    for length in (2, 3):
        for start in range(len(numbers) - length + 1):
            grid = tuple(numbers[start : start + length])
            if min(grid) > 1 and 0 <= tokens - math.prod(grid) <= min(_PREFIX, tokens // 2):
                return grid
    return ()


def _smaller_images(first: Tensor) -> Iterator[_Cut]:
    """The channels are the last axis, or the second."""
    shape = tuple(first.shape)
    for start, stop in ((1, first.ndim - 1), (2, first.ndim)):
        sides = shape[start:stop]
        sizes = _halved(sides)
        yield _Cut((*shape[:start], *(sizes[side] for side in sides), *shape[stop:]), sizes)


def _halved(sides: tuple[int, ...]) -> dict[int, int]:
    """What becomes of the sides of an image, and of how many tokens it has."""
    sizes = {}
    for side in sides:
        left = side
        while left > _SIDE:
            left //= 2
        sizes[side] = left
    return {math.prod(sides): math.prod(sizes[side] for side in sides), **sizes}


def _follows(result: Tensor, cut: _Cut) -> bool:
    return result.shape[:1] == cut.shape[:1] and (cut.tokens is None or cut.tokens in result.shape)


def mapped(call: Call, make: Callable[[Tensor], Tensor]) -> Call:
    """The call with other tensors; what was one tensor in it stays one."""
    made: dict[int, Tensor] = {}

    def other(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = make(tensor)
        return made[id(tensor)]

    args, kwargs = pytree.tree_map_only(Tensor, other, (call.args, dict(call.kwargs)))
    return Call(args, kwargs)


def outputs_of(module: nn.Module, call: Call, seed: int) -> list[Tensor]:
    """The tensors of what a module returns; `seed` is that of its dropout."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = mapped(call, torch.clone)  # a module may write into what it is given
        result = module(*own.args, **own.kwargs)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
