"""Closed forms are exact where nothing is lost, and never worse than simpler choices."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_steps import initialized
from oracle import merge
from shared_hosts import built, example, prepared
from tiny_hosts import case
from torch import nn

from armour_surgery.copies import full_copy
from armour_surgery.initialize.closed_form import (
    Head,
    Metric,
    joint_svd,
    loss,
    make_metric,
    refit_output,
    symmetric,
)
from armour_surgery.surgery.operation import Operation

EXACT = [
    ("vit", "qv"),
    ("vit", "kv"),
    ("beit", "kv"),
    ("vit-qk-norm", "qv"),
    ("eva", "qv"),
    ("dinov2", "qv"),
    ("swin", "qv"),
    ("hf-dinov2", "qv"),
    ("levit", "concat-half"),
    ("levit-conv", "concat-half"),
    ("levit", "concat-key"),
    ("hf-levit", "concat-key"),
]


def _output(model, batch):
    with torch.no_grad():
        found = model(**batch)
    return found if isinstance(found, torch.Tensor) else found[0]


@functools.cache
def merged(name: str, mode: str) -> tuple[nn.Module, list[Operation]]:
    """A host in which the roles that `mode` merges are equal, and what converts it. Shared."""
    original, sites = built(name, torch.float64)
    model = full_copy(original)
    merge(model, mode, example(name, torch.float64), sites)
    return model, prepared(name, mode, torch.float64)


@pytest.mark.parametrize("init", ["wq-refit", "joint-svd", "calibrated"])
@pytest.mark.parametrize(("name", "mode"), EXACT)
def test_where_the_merged_roles_are_equal_every_initializer_is_exact(name: str, mode: str, init: str) -> None:
    model, operations = merged(name, mode)
    batch = {key: value.double() for key, value in case(name).batches()[0].items()}
    generator = torch.Generator().manual_seed(1)
    shape = next(iter(batch.values())).shape
    images = [torch.randn(8, *shape[1:], generator=generator, dtype=torch.float64) for _ in range(3)]
    armour, results = initialized(model, operations, init, batch, images)
    wanted, got = _output(model, batch), _output(armour, batch)
    assert (wanted - got).norm() <= 1e-5 * wanted.norm()
    assert len(results) == len(operations)
    assert all(site.residual < 1e-3 for site in results)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(6, 13), st.integers(0, 2**16))
def test_joint_svd_is_never_worse_than_keeping_wq(heads: int, d: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    width = max(width, 2 * d + 1)
    tokens = torch.randn(9, 7, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)
    flat, centered = tokens.flatten(0, 1), (tokens - tokens.mean(1, keepdim=True)).flatten(0, 1)
    metric = make_metric(flat.mT @ flat / 63, centered.mT @ centered / 63)
    shape = (heads, width, d)
    head = Head(*(torch.randn(shape, dtype=torch.float64) for _ in range(3)), torch.randn(heads, d, 4).double())
    best = loss(joint_svd(head, metric, metric, 1.0), head, metric, metric)
    kept = Head(head.query, head.key, head.query, refit_output(head.query, head, metric))
    assert best <= loss(kept, head, metric, metric) * (1 + 1e-9)
    mix = torch.eye(d, dtype=torch.float64) + 0.2 * torch.randn(heads, d, d, dtype=torch.float64)
    other = Head(head.query @ mix, head.key @ torch.linalg.inv(mix).mT, head.value, head.out)
    assert loss(joint_svd(other, metric, metric, 1.0), other, metric, metric) == pytest.approx(best, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(0, 2**16))
def test_a_singular_vector_s_sign_is_not_rounding_s_choice(heads: int, d: int, seed: int) -> None:
    """What several processes sum differs in the last bits; weights are to be the same all the same."""
    torch.manual_seed(seed)
    width = 2 * d + 3
    tokens = torch.randn(9, 7, width, dtype=torch.float64)
    flat, centered = tokens.flatten(0, 1), (tokens - tokens.mean(1, keepdim=True)).flatten(0, 1)
    metric = make_metric(flat.mT @ flat / 63, centered.mT @ centered / 63)
    shape = (heads, width, d)
    head = Head(*(torch.randn(shape, dtype=torch.float64) for _ in range(3)), torch.randn(heads, d, 4).double())
    # The same head with channels of the other sign, and a metric whose basis has another sign.
    flip = torch.randint(2, (d,), dtype=torch.float64) * 2 - 1
    other = Head(head.query * flip, head.key * flip, head.value * flip, head.out * flip[:, None])
    turn = torch.randint(2, (width,), dtype=torch.float64) * 2 - 1
    turned = Metric(metric.whiten * turn[:, None], metric.color * turn, metric.spread)
    for found in (joint_svd(other, metric, metric, 1.0), joint_svd(head, turned, turned, 1.0)):
        assert torch.allclose(found.query, joint_svd(head, metric, metric, 1.0).query, rtol=1e-6, atol=1e-8)
    for found in (symmetric(other, metric), symmetric(head, turned)):
        assert torch.allclose(found, symmetric(head, metric), rtol=1e-6, atol=1e-7)


def test_sums_in_single_precision_may_leave_directions_below_zero() -> None:
    # Small images with an empty border: their tokens take few directions, and rounding is larger than the damping.
    basis = torch.linalg.qr(torch.randn(13, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    moment = basis @ torch.diag(torch.tensor([40.0, 9, 4, *[-3e-5] * 10], dtype=torch.float64)) @ basis.mT
    metric = make_metric(moment, moment)
    assert all(torch.isfinite(part).all() for part in vars(metric).values())
    kept = metric.whiten.mT @ metric.whiten
    assert torch.allclose(kept, moment, atol=1e-3)
