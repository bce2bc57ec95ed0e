"""The oracle sees a conversion that is not exact, and changes nothing."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from borrowed_attentions import EditedBias, ZeroedBias
from own_attentions import D, Hidden, PerHead, Wide
from product_attentions import LinearTurned, TimesEach
from several_attentions import HeadByHead
from torch import nn
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from armour_surgery.copies import meta_copy
from armour_surgery.coverage.oracle import Oracle, merge, real_copy
from armour_surgery.discover import find_sites
from armour_surgery.hosts import example_input
from armour_surgery.surgery.operation import Operation, prepare
from armour_surgery.traced import FoundSite


def found_in(model: nn.Module) -> FoundSite:
    (found,) = find_sites(model, {"x": torch.empty(2, 7, D, device="meta")})
    assert isinstance(found, FoundSite)
    return found


def operation_on(model: nn.Module, mode: str) -> Operation:
    (operation,) = prepare(model, [found_in(model)], mode).operations
    return operation


def difference(module: nn.Module, operation: Operation) -> float:
    return Oracle(module, operation.found).difference(operation)


@pytest.mark.parametrize("mode", ["qv", "qk", "kv"])
def test_what_is_equal_already_is_kept(mode: str) -> None:
    model = meta_copy(Hidden(PerHead()))
    assert difference(model.inner, operation_on(model, mode)) < 1e-12


@pytest.mark.parametrize("mode", ["concat-half", "concat-full", "grouped", "grouped-shuffled"])
def test_wide_values_too(mode: str) -> None:
    model = Hidden(Wide())
    assert difference(model.inner, operation_on(model, mode)) < 1e-12


def test_a_conversion_that_takes_other_weights_is_seen() -> None:
    model = Hidden(PerHead())
    operation = operation_on(model, "qv")
    # Other rows than those of the conversion are made equal, which is as if it had taken the wrong ones.
    assert difference(model.inner, replace(operation, mode="qk")) > 1e-3


def test_a_module_that_returns_another_shape_is_seen() -> None:
    model = Hidden(PerHead())
    operation = operation_on(model, "qv")

    class Shorter(operation.cls):  # type: ignore[name-defined,misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[:, 1:]

    assert difference(model.inner, replace(operation, cls=Shorter)) == math.inf


def packed_tower() -> nn.Module:
    """Two images in one sequence, which the places where it is cut keep apart."""
    config = Qwen2VLVisionConfig(depth=1, embed_dim=16, num_heads=2, patch_size=4, hidden_size=24)
    return Qwen2VisionTransformerPretrainedModel(config)


def test_a_packed_sequence_is_cut_into_images() -> None:
    model = packed_tower()
    (found,) = find_sites(model, example_input(model))
    assert isinstance(found, FoundSite)
    (operation,) = prepare(model, [found], "qv").operations
    assert difference(model.get_submodule(found.fqn), operation) < 1e-12
    # No mask says what is beside the diagonal, so that nothing promises to take it out.
    assert "packed" in found.site.refused["qk-diag"]


def test_nothing_happens_to_the_module_itself() -> None:
    model = Hidden(PerHead())
    before = copy.deepcopy(model.state_dict())
    difference(model.inner, operation_on(model, "qv"))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_real_weights_are_all_different_from_zero_and_one() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.0)).to("meta")
    real = real_copy(model, torch.Generator().manual_seed(0))
    for tensor in (*real[0].parameters(), *real[1].parameters(), real[1].running_mean, real[1].running_var):
        assert tensor.dtype == torch.float64
        assert not tensor.is_meta
        assert not ((tensor == 0) | (tensor == 1)).any()
    assert real[2].p == 0.1


def test_merging_copies_the_rows_that_stay() -> None:
    module = PerHead()
    found = found_in(Hidden(module))
    merge(module, found.traced, "qv")
    weight = module.foo.weight
    for h in range(3):
        q, v = found.traced.q.channels[h], found.traced.v.channels[h]
        assert torch.equal(weight[list(q)], weight[list(v)])
        assert not torch.equal(weight[list(q)], weight[list(found.traced.k.channels[h])])


class LinearAndNorm(nn.Module):
    """Two layers in one projection, whose tensors have equal short names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y)


class NormedProjections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = LinearAndNorm(), LinearAndNorm(), LinearAndNorm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (role(x).unflatten(-1, (4, 5)).transpose(1, 2) for role in (self.q, self.k, self.v))
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class CutInProjection(nn.Module):
    """Queries are not keys, so that one weight and one bias are cut in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(D, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x + 1, x, x)[0]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *[
            (kind, mode)
            for kind in (ZeroedBias, EditedBias, TimesEach, LinearTurned, HeadByHead)
            for mode in ("qv", "kv")
        ],
        (CutInProjection, "kv"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_weights_in_slices_turned_around_and_edited(kind: type[nn.Module], mode: str) -> None:
    model = Hidden(kind())
    operation = operation_on(model, mode)
    assert difference(model.get_submodule(operation.fqn), operation) < 1e-12


@pytest.mark.parametrize("mode", ["qv", "qk", "kv"])
def test_two_layers_of_one_projection_are_told_apart(mode: str) -> None:
    model = Hidden(NormedProjections())
    assert difference(model.inner, operation_on(model, mode)) < 1e-12


def test_of_many_tokens_a_few_speak_for_all() -> None:
    class Noting(PerHead):
        seen: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not x.is_meta and type(x) is torch.Tensor:
                self.seen.append(x.shape[1])
            return super().forward(x)

    model = Hidden(Noting())
    (found,) = find_sites(model, {"x": torch.empty(1, 900, D, device="meta")})
    (operation,) = prepare(model, [found], "qv").operations
    Noting.seen.clear()
    assert difference(model.inner, operation) < 1e-12
    assert set(Noting.seen) == {59}
