"""Layouts are reached by views alone, or it is said that they cannot be."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armour_surgery.rewrite.relayout import block_layout, relayout, separate
from armour_surgery.traced import Atom, Layout

SIZES: dict[Atom, int] = {0: 2, 1: 5, 2: 7, "h": 3, "j": 4}


def arrange(layout: Layout, sizes: dict[Atom, int]) -> torch.Tensor:
    """A tensor laid out that way: each element is a number made of its atoms' indices."""
    order = [atom for axis in layout for atom in axis]
    value, weight = torch.zeros([sizes[atom] for atom in order], dtype=torch.long), 1
    for atom in sorted(sizes, key=str):
        if atom in order:
            place = order.index(atom)
            shape = [-1 if index == place else 1 for index in range(len(order))]
            value = value + weight * torch.arange(sizes[atom]).reshape(shape)
            weight *= sizes[atom]
    shape = [torch.Size([sizes[atom] for atom in axis]).numel() for axis in layout]
    return value.reshape(shape)


@st.composite
def layouts(draw: st.DrawFn, atoms: tuple[Atom, ...]) -> Layout:
    """The atoms in any order, any neighbours on one axis, and axes of size one anywhere."""
    order = draw(st.permutations(atoms))
    axes: list[tuple[Atom, ...]] = []
    for atom in order:
        if axes and draw(st.booleans()):
            axes[-1] = (*axes[-1], atom)
        else:
            axes.append((atom,))
    for _ in range(draw(st.integers(0, 1))):
        axes.insert(draw(st.integers(0, len(axes))), ())
    return tuple(axes)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    atoms: tuple[Atom, ...] = draw(st.sampled_from([(0, 1, "h", "j"), (0, 1, 2, "h", "j"), (0, "h", "j")]))
    return draw(layouts(atoms)), draw(layouts(atoms))


@settings(max_examples=600, deadline=None)
@given(pairs())
def test_relayout_arranges_what_it_says_or_says_that_it_cannot(pair: tuple[Layout, Layout]) -> None:
    source, target = pair
    sizes = {atom: SIZES[atom] for axis in source for atom in axis}
    steps = relayout(source, target, {"h": sizes["h"], "j": sizes["j"]})
    if steps is None:
        return
    # The same steps at other numbers of images and tokens: none of those sizes may be written down.
    for factor in (1, 3):
        own = {atom: size * factor if isinstance(atom, int) else size for atom, size in sizes.items()}
        tensor = arrange(source, own)
        for method, arguments in steps:
            assert method in {"unflatten", "flatten", "squeeze", "unsqueeze", "transpose", "permute"}
            tensor = getattr(tensor, method)(*arguments)
        assert torch.equal(tensor, arrange(target, own))


@settings(max_examples=300, deadline=None)
@given(layouts((0, 1, "h", "j")))
def test_relayout_can_always_reach_axes_of_their_own(layout: Layout) -> None:
    """From a projection's own output `[B, N, H * d]`, every order of whole axes is a view away."""
    block = block_layout(3, -1)
    assert block == ((0,), (1,), ("h", "j"))
    if all(len(axis) <= 1 for axis in layout):
        assert relayout(block, layout, {"h": 3, "j": 4}) is not None
    assert relayout(layout, layout, {"h": 3, "j": 4}) == []


def test_relayout_refuses_two_unknown_sizes_in_one_axis() -> None:
    sizes = {"h": 3, "j": 4}
    assert relayout(((0, "h", 1), ("j",)), ((0,), (1,), ("h",), ("j",)), sizes) is None
    assert relayout(((0, 1), ("h",), ("j",)), ((0,), (1,), ("h",), ("j",)), sizes) is None
    assert relayout(((0,), (1,), ("h", "j")), ((0,), (2,), ("h", "j")), sizes) is None


def test_layouts_of_packed_outputs() -> None:
    assert block_layout(4, -3) == ((0,), ("h", "j"), (2,), (3,))
    assert separate(((0, "h"), (), (1, 2), ("j",))) == ((0,), ("h",), (1, 2), ("j",))
