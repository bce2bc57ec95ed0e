"""Bring a tensor from one layout to another with views only: unflatten, permute, flatten.

No size of a batch or a token axis is ever written down, so the emitted code runs at any of them.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from armour_surgery.traced import Atom, Layout

__all__ = ["Step", "arrange", "block_layout", "relayout", "separate"]

Step = tuple[str, tuple[Any, ...]]  # a tensor method and its arguments


def block_layout(rank: int, axis: int) -> Layout:
    """The layout of a projection's own output: `[.., H * d, ..]` with the channels at `axis`."""
    axes: list[tuple[Atom, ...]] = [(number,) for number in range(rank)]
    axes[axis] = ("h", "j")
    return tuple(axes)


def separate(layout: Layout) -> Layout:
    """The same order of atoms with heads and dimensions on axes of their own; empty axes are gone."""
    axes: list[tuple[Atom, ...]] = []
    for atoms in layout:
        # Axes of a batch or of tokens that the host merged stay merged: their sizes are not known.
        for is_ours, group in itertools.groupby(atoms, key=lambda atom: isinstance(atom, str)):
            run = tuple(group)
            axes += [(atom,) for atom in run] if is_ours else [run]
    return tuple(axes)


def _unmerge(layout: Layout, sizes: dict[Atom, int]) -> tuple[list[Step], Layout] | None:
    """Steps that put heads and dimensions on axes of their own."""
    steps: list[Step] = []
    axes: list[tuple[Atom, ...]] = []
    for atoms in layout:
        if not atoms:
            steps.append(("squeeze", (len(axes),)))
            continue
        pieces = list(separate((atoms,)))
        if len(pieces) > 1:
            # Atoms with a size are ours: heads and dimensions.
            lengths = tuple(sizes.get(piece[0], -1) for piece in pieces)
            # torch works out one size that is not given, and no more.
            if lengths.count(-1) > 1:
                return None
            steps.append(("unflatten", (len(axes), lengths)))
        axes += pieces
    return steps, tuple(axes)


def _merge_runs(axes: Layout, wanted: Layout) -> tuple[list[Step], Layout] | None:
    """Flatten axes that only occur together in `wanted`, such as the rows and columns of an image."""
    steps: list[Step] = []
    current = list(axes)
    for atoms in wanted:
        if len(atoms) > 1 and atoms not in current:
            start = current.index(atoms[:1]) if atoms[:1] in current else len(current)
            stop = start + len(atoms)
            # They must be neighbors and in order, or flattening them would be a copy.
            if current[start:stop] != [(atom,) for atom in atoms]:
                return None
            steps.append(("flatten", (start, stop - 1)))
            current[start:stop] = [atoms]
    return steps, tuple(current)


def _permutation(order: Sequence[int]) -> list[Step]:
    moved = [index for index, source in enumerate(order) if index != source]
    if not moved:
        return []
    if len(moved) == 2:
        # What a person would write.
        return [("transpose", (moved[0], moved[1]))]
    return [("permute", tuple(order))]


def relayout(source: Layout, target: Layout, sizes: dict[Atom, int]) -> list[Step] | None:
    """The tensor methods that turn `source` into `target`; None where views cannot express it.

    `sizes` are the numbers of heads ("h") and of dimensions ("j").
    """
    if source == target:
        return []
    opened = _unmerge(source, sizes)
    if opened is None:
        return None
    steps, axes = opened
    wanted = separate(target)
    merged = _merge_runs(axes, wanted)
    if merged is None or sorted(merged[1], key=str) != sorted(wanted, key=str):
        return None
    steps = steps + merged[0]
    axes = merged[1]
    steps += _permutation(list(map(axes.index, wanted)))
    for position, atoms in enumerate(target):
        pieces = len(separate((atoms,)))
        if pieces == 0:
            steps.append(("unsqueeze", (position,)))
        elif pieces > 1:
            steps.append(("flatten", (position, position + pieces - 1)))
    return steps


def arrange(source: Layout, target: Layout, sizes: dict[Atom, int]) -> list[Step] | None:
    """As `relayout`, and where that is not possible with views, with axes brought together by a copy."""
    steps = relayout(source, target, sizes)
    if steps is not None:
        return steps
    apart = tuple((atom,) for atom in itertools.chain.from_iterable(target))
    steps = relayout(source, apart, sizes)
    if steps is None:
        return None
    for position, atoms in enumerate(target):
        if not atoms:
            steps.append(("unsqueeze", (position,)))
        elif len(atoms) > 1:
            steps.append(("flatten", (position, position + len(atoms) - 1)))
    return steps
