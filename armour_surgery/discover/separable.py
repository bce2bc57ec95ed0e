"""Numbers of elements of which one line along each axis tells all others.

Layout operations hardly ever mix axes: the number at `[b, t, c]` is then the sum of a function of b, one of t and one
of c. There may be tens of millions, and every pass over them takes longer than all the rest of discovery.
"""

import torch

__all__ = ["Separable", "are_separable", "line_along"]


class Separable:
    """Tells whether the axes of numbers depend on each other, and leaves out what says the same again.

    `start` are elements numbered by where they lie in memory: views of them need not be gone over.
    """

    def __init__(self, start: torch.Tensor) -> None:
        self._start = start
        # By identity, with the tensor, so that no other one takes its place.
        self._known: dict[int, tuple[torch.Tensor, bool]] = {}

    def __call__(self, numbers: torch.Tensor) -> bool:
        """What `are_separable` says of these numbers."""
        if id(numbers) not in self._known:
            self._known[id(numbers)] = numbers, self._is_view(numbers) or are_separable(numbers)
        return self._known[id(numbers)][1]

    def _is_view(self, numbers: torch.Tensor) -> bool:
        # A view takes equal steps in memory along an axis, and there every element's number is its place.
        return bool(numbers.untyped_storage()._cdata == self._start.untyped_storage()._cdata)

    def one_of_each(self, numbers: torch.Tensor, inner: int, count: int) -> torch.Tensor:
        """The numbers at the first index alone of every axis along which no element's channel changes.

        An element's channel is `number // inner % count`, and a negative number stands for none. Expanded to the old
        shape, what is left has the same channels.
        """
        if not numbers.numel() or not self(numbers):
            return numbers
        first = int(_first(numbers))
        steps = [line_along(numbers, axis) - first for axis in range(numbers.ndim)]
        if first + sum(int(along.min()) for along in steps) < 0:
            return numbers
        steps = [along % (inner * count) for along in steps]
        furthest = [int(along.max()) for along in steps]
        # Along these axes elements stay within their channel, if all other axes lead from channel to channel.
        inside = [axis for axis in range(numbers.ndim) if furthest[axis] < inner]
        others = [steps[axis] for axis in range(numbers.ndim) if axis not in inside]
        reach = first % inner + sum(furthest[axis] for axis in inside)
        if reach >= inner or any(bool((along % inner).any()) for along in others):
            inside = [axis for axis in inside if furthest[axis] == 0]
        for axis in inside:
            numbers = numbers.narrow(axis, 0, 1)
        return numbers


def _first(numbers: torch.Tensor) -> torch.Tensor:
    return numbers[(0,) * numbers.ndim]


def line_along(numbers: torch.Tensor, axis: int) -> torch.Tensor:
    """The numbers along one axis, at the first index of all others."""
    return numbers[tuple(slice(None) if other == axis else 0 for other in range(numbers.ndim))]


def are_separable(numbers: torch.Tensor) -> bool:
    """Whether every number is that of the first element, plus a step for the index along each axis."""
    sums = _first(numbers)
    for axis in range(numbers.ndim):
        line = line_along(numbers, axis)
        shape = [1] * numbers.ndim
        shape[axis] = -1
        sums = sums + (line - line[0]).reshape(shape)
    return torch.equal(sums, numbers)
