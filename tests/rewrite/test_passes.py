"""What the passes put into a graph computes what it stands for."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check, randomize, relative_error
from own_attentions import Pieces, Plain, ReadsWidth, Shuffles, UsesPacked, Wide, surgery_on
from tiny_hosts import CASES
from torch import nn

from armour_surgery.rewrite.add_grouped_projection_pass import AddGroupedProjectionPass
from armour_surgery.rewrite.edits import AddGrouped, KeepRows, apply_edits
from armour_surgery.rewrite.grouped import GroupedProjection, group_of_output
from armour_surgery.rewrite.mask_diagonal_pass import diagonal_mask, mask_diagonal_of
from armour_surgery.rewrite.narrow_projections_pass import NarrowProjectionsPass
from armour_surgery.rewrite.restore_channels_pass import RestoreChannelsPass
from armour_surgery.rewrite.share_roles_pass import ShareRolesPass, is_expressible
from armour_surgery.surgery.conversion import convert


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


class AllAtOnce(nn.Module):
    """Packed `[3, H, d]`, taken apart by one permutation of all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 36)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class WideValues(nn.Module):
    """Packed `[q | k | v]`, with values twice as wide as keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 3 * 16)
        self.out = nn.Linear(24, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).split([12, 12, 24], -1)
        q, k = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k))
        v = v.unflatten(-1, (3, 8)).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class KeysAcross(nn.Module):
    """Packed `[q | k | v]`, with keys laid out `[B, H, d, N]` as their product reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 36)
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, v))
        scores = q @ k.transpose(1, 2).unflatten(1, (3, 4)) * 0.5
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


# Attention that views cannot express.


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


# Grouped projections.


@pytest.mark.parametrize("axis", [-1, -3])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d, nn.BatchNorm2d])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_grouped_projection_is_the_masked_dense_one(
    axis: int, shuffle: bool, biased: bool, norm: type[nn.Module] | None, groups: int
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
    bias = torch.randn(channels, generator=generator, dtype=torch.float64) if biased else None
    host_norm: Any = None if norm is None else randomize(norm(channels, eps=1e-3, momentum=0.3).double())
    of_norm = {} if norm is None else {name: t.detach() for name, t in host_norm.state_dict().items() if t.ndim}
    grouped = GroupedProjection.from_rows(weight, bias, host_norm, of_norm, groups, shuffle, axis).double()
    assert grouped.weight.numel() == weight.numel() // groups
    dense = F.linear(x, weight * keep, bias) if axis == -1 else F.conv2d(x, weight * keep, bias)
    for training in (False, True):
        grouped.train(training)
        expected = dense
        if norm is not None:
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


@pytest.mark.parametrize(("rows", "shared"), [((2, 3, 4), True), ((5, 0, 7), False), ((0, 2), False), ((4, 3), False)])
def test_neighboring_rows_may_hold_the_old_memory(rows: tuple[int, ...], shared: bool) -> None:
    model = randomize(Plain())
    old = model.qkv.weight.detach()
    apply_edits(model, [KeepRows(("qkv.weight", "qkv.bias"), (("qkv", "out_features"),), rows)], views=True)
    assert torch.equal(model.qkv.weight, old[list(rows)])
    assert model.qkv.weight.is_contiguous()
    assert (model.qkv.weight.untyped_storage().data_ptr() == old.untyped_storage().data_ptr()) == shared


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


# How the outputs of packed projections are taken apart.


def test_parts_that_are_read_alike_are_taken_apart_in_one_move() -> None:
    """As hosts write it: runtimes copy each piece of a split (OpenVINO), and move each piece by itself."""
    code = convert(AllAtOnce(), "qv", example_input=torch.randn(2, 5, 20)).code
    assert ".unbind(0)" in code
    assert "split(" not in code
    assert code.count("permute(") == 1


@pytest.mark.parametrize(("kind", "mode"), [(WideValues, "qk"), (KeysAcross, "kv"), (Plain, "qv")])
def test_parts_that_differ_or_are_taken_apart_by_the_host_are_split(kind: type[nn.Module], mode: str) -> None:
    code = convert(kind(), mode, example_input=torch.randn(2, 5, 20)).code
    assert "split(" in code
    assert "unbind(" not in code
