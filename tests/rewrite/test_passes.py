"""The passes that rewrite a graph: what they promise, and that a broken promise is told."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check, randomize, relative_error
from tiny_hosts import CASES
from torch import nn

from armour_surgery.discover import find_sites
from armour_surgery.errors import PostconditionError
from armour_surgery.modes import get_mode
from armour_surgery.rewrite import rewrite
from armour_surgery.rewrite.add_grouped_projection_pass import AddGroupedProjectionPass
from armour_surgery.rewrite.contract import Part, Surgery, parts_of, run_passes
from armour_surgery.rewrite.edits import AddGrouped, KeepRows, apply_edits
from armour_surgery.rewrite.grouped import GroupedProjection, group_of_output
from armour_surgery.rewrite.mask_diagonal_pass import MaskDiagonalPass, diagonal_mask, mask_diagonal_of
from armour_surgery.rewrite.narrow_projections_pass import NarrowProjectionsPass
from armour_surgery.rewrite.relayout import block_layout, relayout, separate
from armour_surgery.rewrite.remove_dead_nodes_pass import RemoveDeadNodesPass
from armour_surgery.rewrite.restore_channels_pass import RestoreChannelsPass
from armour_surgery.rewrite.share_roles_pass import ShareRolesPass, is_expressible
from armour_surgery.surgery.conversion import convert
from armour_surgery.traced import Atom, Layout

# Layouts.

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


# Parts.


@pytest.mark.parametrize(
    ("names", "own", "sizes", "expected"),
    [
        (("q",), "v", {"q": 4, "v": 4}, [("q", 0, 4)]),
        (("q", "v"), "v", {"q": 4, "v": 8}, [("q", 0, 4), ("v", 4, 8)]),
        (("q", "k", "v"), "v", {"q": 4, "k": 4, "v": 8}, [("q", 0, 4), ("k", 0, 4)]),
        (("q", "k", "v"), "v", {"q": 4, "k": 4, "v": 11}, [("q", 0, 4), ("k", 0, 4), ("v", 8, 11)]),
        (("q", "grouped"), "v", {"q": 4, "v": 8}, [("q", 0, 4), ("grouped", 4, 8)]),
        (("k",), "k", {"k": 6}, [("k", 0, 6)]),
        (("q",), "v", {"q": 4, "v": 6}, [("q", 0, 4), ("v", 4, 6)]),
    ],
)
def test_parts_fill_a_role(
    names: tuple[str, ...], own: str, sizes: dict[str, int], expected: list[tuple[str, int, int]]
) -> None:
    assert parts_of(names, own, sizes) == tuple(Part(*part) for part in expected)


# Attention that views cannot express.


class ReadsWidth(nn.Module):
    """Splits by the packed tensor's own width, and keeps a statistic of all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 36)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        width = qkv.shape[-1] // 3
        qkv = qkv.unflatten(-1, (3, 4, width // 4)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        y = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Shuffles(nn.Module):
    """Takes the channels of q, k and v from interleaved places: q0 k0 v0 q1 k1 v1 and so on, backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(20, 36)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(x).unflatten(-1, (12, 3)).unbind(-1)
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class UsesPacked(nn.Module):
    """Adds something made of the whole packed tensor, so no role meets its users at an anchor alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 36)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y) + qkv.square().mean(-1, keepdim=True)


class ChannelShuffle(nn.Module):
    """A channel shuffle with four groups before the split: heads overlap the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 36)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (4, 9)).transpose(-1, -2).flatten(-2)
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in qkv.chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Pieces(nn.Module):
    """Values put together from two slices of the packed tensor, the later one first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 36)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        q, k, v = qkv[..., :12], qkv[..., 16:28], torch.cat([qkv[..., 28:], qkv[..., 12:16]], -1)
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [ReadsWidth, Shuffles, UsesPacked, ChannelShuffle, Pieces])
@pytest.mark.parametrize("mode", ["qv", "qk", "kv"])
def test_what_views_cannot_express_is_laid_out_again(kind: type[nn.Module], mode: str) -> None:
    model = randomize(kind()).double()
    batches = [{"x": torch.randn(b, n, 20, dtype=torch.float64)} for b, n in ((2, 6), (5, 9))]
    assert max(check(model, mode, batches).values()) <= 1e-12


@pytest.mark.parametrize("kind", [UsesPacked, Pieces])
def test_restoring_is_what_did_it(kind: type[nn.Module]) -> None:
    """These two need the way out; a host whose layout is plain does not take it."""
    surgery = surgery_on(kind(), "qv")
    for one in (AddGroupedProjectionPass(), NarrowProjectionsPass()):
        one.requires(surgery)
        one(surgery)
        one.ensures(surgery)
    assert not is_expressible(surgery)
    assert not ShareRolesPass()(surgery)
    assert RestoreChannelsPass()(surgery)
    plain = surgery_on(Plain(), "qv")
    assert NarrowProjectionsPass()(plain) in (True, False)
    assert is_expressible(plain)
    assert ShareRolesPass()(plain)
    assert not RestoreChannelsPass()(plain)


class Plain(nn.Module):
    """Packed `[3, H, d]`, fused."""

    def __init__(self, width: int = 36) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, width)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


# Grouped projections.


@pytest.mark.parametrize("axis", [-1, -3])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d, nn.BatchNorm2d])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_grouped_projection_is_the_masked_dense_one(
    axis: int, shuffle: bool, norm: type[nn.Module] | None, groups: int
) -> None:
    if norm is not None and (norm is nn.BatchNorm2d) != (axis == -3):
        pytest.skip("tokens have a BatchNorm1d, images a BatchNorm2d")
    generator = torch.Generator().manual_seed(0)
    inputs, channels = 20, 12
    weight = torch.randn(channels, inputs, generator=generator, dtype=torch.float64)
    keep = torch.zeros_like(weight)
    for row in range(channels):
        group = row % groups if shuffle else row * groups // channels
        keep[row, group * inputs // groups : (group + 1) * inputs // groups] = 1.0
    x = torch.randn(3, 7, inputs, generator=generator, dtype=torch.float64)
    if axis == -3:
        x = torch.randn(3, inputs, 5, 7, generator=generator, dtype=torch.float64)
        weight = weight[..., None, None]
        keep = keep[..., None, None]
    host_norm: Any = None
    if norm is None:
        tensors = {"bias": torch.randn(channels, generator=generator, dtype=torch.float64)}
    else:
        host_norm = randomize(norm(channels, eps=1e-3, momentum=0.3).double())
        tensors = {name: t.detach() for name, t in host_norm.state_dict().items() if t.ndim}
    grouped = GroupedProjection.from_rows(weight, tensors, host_norm, groups, shuffle, axis).double()
    assert grouped.weight.numel() == weight.numel() // groups
    dense = F.linear(x, weight * keep) if axis == -1 else F.conv2d(x, weight * keep)
    for training in (False, True):
        grouped.train(training)
        if norm is None:
            expected = dense + (tensors["bias"] if axis == -1 else tensors["bias"][:, None, None])
        else:
            own = copy.deepcopy(host_norm).train(training)
            expected = own(dense.flatten(0, 1)).reshape(dense.shape) if axis == -1 else own(dense)
        got = copy.deepcopy(grouped)(x)
        assert got.shape == expected.shape
        with torch.no_grad():
            assert relative_error([expected], [got]) <= 1e-12
    expected_groups = [int(row.flatten().nonzero()[0]) * groups // inputs for row in keep]
    assert group_of_output(channels, groups, shuffle).tolist() == expected_groups


def test_a_grouped_projection_tells_what_it_is() -> None:
    grouped = GroupedProjection(torch.zeros(12, 5), 4, True, -1)
    assert grouped.extra_repr() == "20, 12, groups=4, shuffle=True"


# Promises.


def traced_of(model: nn.Module, example: dict[str, torch.Tensor] | None = None) -> Any:
    found = find_sites(model, example or {"x": torch.empty(2, 6, 20)})[0]
    assert found.traced is not None, found.site.refused
    return found.traced


def surgery_on(model: nn.Module, mode: str) -> Surgery:
    traced = traced_of(model)
    chosen = get_mode(mode)
    sizes = {letter: getattr(traced, letter).head_dim for letter in "qkv"}
    return Surgery(
        traced=traced,
        mode=chosen,
        graph=traced.trace.graph,
        query=Part("q", 0, sizes["q"]),
        key=parts_of(chosen.key, "k", sizes),
        value=parts_of(chosen.value, "v", sizes),
    )


class Claims:
    """A pass that says something about itself, and does what it is told."""

    def __init__(self, claim: bool, act: bool) -> None:
        self.claim, self.act = claim, act

    def requires(self, surgery: Surgery) -> None: ...

    def __call__(self, surgery: Surgery) -> bool:
        if self.act:
            surgery.graph.call_function(torch.add, (1, 2))
        return self.claim

    def ensures(self, surgery: Surgery) -> None: ...


@pytest.mark.parametrize(("claim", "act"), list(itertools.product([False, True], repeat=2)))
def test_a_pass_that_misreports_is_caught(claim: bool, act: bool) -> None:
    surgery = surgery_on(Plain(), "qv")
    if claim == act:
        run_passes(surgery, [Claims(claim, act)])
    else:
        with pytest.raises(PostconditionError, match="Claims misreported whether it changed the graph"):
            run_passes(surgery, [Claims(claim, act)])


def test_grouped_needs_a_plain_projection() -> None:
    surgery = surgery_on(Wide(), "grouped")
    AddGroupedProjectionPass().requires(surgery)
    role = surgery.traced.v
    surgery.traced = replace(surgery.traced, v=replace(role, producer=replace(role.producer, plain=False)))
    with pytest.raises(PostconditionError, match="qkv has no grouped form"):
        AddGroupedProjectionPass().requires(surgery)


class Wide(nn.Module):
    """Values twice as wide as keys, a head after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 3 * 16)
        self.out = nn.Linear(24, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 16)).transpose(1, 2).split([4, 4, 8], -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_grouped_part_has_to_be_made() -> None:
    surgery = surgery_on(Wide(), "grouped")
    with pytest.raises(PostconditionError, match="the grouped projection was not added"):
        AddGroupedProjectionPass().ensures(surgery)
    with pytest.raises(PostconditionError, match="grouped was asked for and not made"):
        ShareRolesPass().requires(surgery)
    assert AddGroupedProjectionPass()(surgery)
    AddGroupedProjectionPass().ensures(surgery)
    ShareRolesPass().requires(surgery)


def test_channels_have_to_be_there() -> None:
    surgery = surgery_on(Plain(), "qv")
    role = surgery.traced.v
    surgery.traced = replace(surgery.traced, v=replace(role, producer=replace(role.producer, channels=20)))
    with pytest.raises(PostconditionError, match="channels of v exceed those of qkv"):
        NarrowProjectionsPass().requires(surgery)


def test_no_row_is_kept_twice() -> None:
    surgery = surgery_on(Plain(), "qv")
    surgery.edits.append(KeepRows(("qkv.weight",), (), (0, 1, 1)))
    with pytest.raises(PostconditionError, match=r"qkv\.weight would keep a row twice"):
        NarrowProjectionsPass().ensures(surgery)


def test_no_anchor_is_read_after_sharing() -> None:
    surgery = surgery_on(Plain(), "qv")
    NarrowProjectionsPass()(surgery)
    with pytest.raises(PostconditionError, match=r"still feeds"):
        ShareRolesPass().ensures(surgery)
    ShareRolesPass()(surgery)
    ShareRolesPass().ensures(surgery)


def test_restoring_needs_channels_on_one_axis() -> None:
    surgery = surgery_on(UsesPacked(), "qv")
    NarrowProjectionsPass()(surgery)
    role = surgery.traced.v
    other = replace(role.producer, axis=-2, node=next(iter(surgery.graph.nodes)))
    surgery.traced = replace(surgery.traced, v=replace(role, producer=other))
    with pytest.raises(PostconditionError, match="its projections have their channels on different axes"):
        RestoreChannelsPass().requires(surgery)


def test_a_diagonal_needs_the_same_tokens() -> None:
    surgery = surgery_on(Plain(), "qk-diag")
    MaskDiagonalPass().requires(surgery)
    surgery.traced = replace(surgery.traced, k=replace(surgery.traced.k, tokens=3))
    with pytest.raises(PostconditionError, match="there is no diagonal between different tokens"):
        MaskDiagonalPass().requires(surgery)


def test_the_diagonal_is_masked_once() -> None:
    surgery = surgery_on(Plain(), "qk-diag")
    with pytest.raises(PostconditionError, match="0 diagonal masks in the graph"):
        MaskDiagonalPass().ensures(surgery)
    MaskDiagonalPass()(surgery)
    MaskDiagonalPass().ensures(surgery)
    MaskDiagonalPass()(surgery)
    with pytest.raises(PostconditionError, match="2 diagonal masks in the graph"):
        MaskDiagonalPass().ensures(surgery)


def test_the_whole_list_of_passes_runs_on_every_mode() -> None:
    for model, modes in ((Plain, ("qv", "qk", "qk-diag", "kv")), (Wide, ("concat-half", "concat-full", "grouped"))):
        for mode in modes:
            result = rewrite(traced_of(model()), get_mode(mode))
            result.graph.lint()
            assert result.edits
            assert result.shares


def test_dead_nodes_go_and_what_may_have_an_effect_stays() -> None:
    surgery = surgery_on(Plain(), "qv")
    before = len(surgery.graph.nodes)
    with surgery.graph.inserting_before(next(n for n in surgery.graph.nodes if n.op == "output")):
        effect = surgery.graph.call_function(torch.manual_seed, (0,))
    clean = RemoveDeadNodesPass(surgery.graph)
    with surgery.graph.inserting_before(effect):
        surgery.graph.call_function(torch.add, (1, 2))
    assert clean(surgery)
    clean.ensures(surgery)
    assert effect in surgery.graph.nodes
    assert len(surgery.graph.nodes) <= before + 1
    assert not any(node.target is torch.add for node in surgery.graph.nodes)


# Edits.


def test_edits_keep_type_flags_and_make_rows_contiguous() -> None:
    model = randomize(Plain()).to(torch.bfloat16)
    model.qkv.weight.requires_grad_(False)
    old = model.qkv.weight.detach().clone()
    apply_edits(model, [KeepRows(("qkv.weight", "qkv.bias"), (("qkv", "out_features"),), (5, 0, 7))])
    assert torch.equal(model.qkv.weight, old[[5, 0, 7]])
    assert model.qkv.weight.dtype == torch.bfloat16
    assert not model.qkv.weight.requires_grad
    assert model.qkv.bias.requires_grad
    assert model.qkv.weight.is_contiguous()
    assert model.qkv.out_features == 3


def test_grouped_rows_are_taken_before_they_are_dropped() -> None:
    model = randomize(Wide()).double()
    x = torch.randn(2, 6, 20, dtype=torch.float64)
    rows = tuple(range(8, 16))
    expected = F.linear(x, model.qkv.weight[list(rows)], model.qkv.bias[list(rows)])
    edits = [
        KeepRows(("qkv.weight", "qkv.bias"), (("qkv", "out_features"),), (0, 1)),
        AddGrouped("extra", "qkv.weight", ("qkv.bias",), rows, 1, False, -1),
    ]
    apply_edits(model.eval(), edits)
    assert not model.extra.training
    with torch.no_grad():
        assert relative_error([expected], [model.extra(x)]) <= 1e-12


# The mask.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_diagonal_mask_keeps_its_type_and_adds_up(dtype: torch.dtype) -> None:
    q = torch.zeros(2, 3, 4, 5, dtype=dtype)
    low = torch.finfo(dtype).min / 2
    mask = diagonal_mask(q)
    assert mask.dtype == dtype
    assert torch.equal(mask, torch.eye(4, dtype=dtype) * low)
    assert torch.equal(mask_diagonal_of(torch.zeros(1, 4, 4, dtype=dtype), -2), mask)
    causal = diagonal_mask(q, None, True)
    assert causal.triu(1).isneginf().sum() == 6
    assert (causal.diagonal() == low).all()
    allowed = torch.tensor([[True, True, False, False]] * 4)
    combined = diagonal_mask(q, allowed)
    assert combined.dtype == dtype
    assert combined[0].tolist() == [low, 0.0, float("-inf"), float("-inf")]
    assert combined[2, 2].isneginf()
    bias = torch.full((4, 4), 0.5, dtype=dtype)
    assert diagonal_mask(q, bias)[0, 1] == 0.5


# What a conversion is made of.


def test_sites_that_are_alike_share_one_class() -> None:
    one = CASES["vit"]
    converted = convert(one.build(), "qv", example_input=one.example())
    assert type(converted.blocks[0].attn) is type(converted.blocks[1].attn)
    other = convert(one.build(), "kv", example_input=one.example())
    assert type(other.blocks[0].attn) is not type(converted.blocks[0].attn)
    assert "ArmourAttention" in repr(converted.blocks[0].attn)
    assert converted.blocks[0].attn.armour_mode == "qv"


def test_residuals_are_the_distance_of_the_weights() -> None:
    """Against the definition, on packed rows."""
    model = randomize(Plain())
    q, k, v = model.qkv.weight.detach().double().chunk(3)
    for mode, lost, had in (("qv", v - q, v), ("qk", k - q, k), ("kv", v - k, v)):
        plan = convert(model, mode, example_input=(torch.empty(2, 6, 20))).surgery
        assert plan.sites[0].residual == pytest.approx(float(lost.norm() / had.norm()), rel=1e-6)
