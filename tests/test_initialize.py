"""Weights that keep a model working: exact where nothing is lost, and never worse than simpler choices."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_steps import initialized
from oracle import merge, outputs
from tiny_hosts import case
from torch import nn

from armour_surgery import convert
from armour_surgery.copies import meta_copy
from armour_surgery.discover import find_output, find_sites
from armour_surgery.errors import CalibrationError, ConversionError, UsageError
from armour_surgery.initialize.batches import Batches
from armour_surgery.initialize.closed_form import Head, joint_svd, loss, make_metric, refit_output
from armour_surgery.initialize.freedom import Freedom, probe
from armour_surgery.initialize.moments import Regression
from armour_surgery.initialize.stream import learned_tokens
from armour_surgery.initialize.walk import Store, Walk, units_of
from armour_surgery.measure.token_error import token_error
from armour_surgery.surgery.conversion import surgery_of
from armour_surgery.surgery.operation import Operation, prepare

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
]


def _output(model, batch):
    with torch.no_grad():
        found = model(**batch)
    return found if isinstance(found, torch.Tensor) else found[0]


@functools.cache
def merged(name: str, mode: str) -> tuple[nn.Module, list[Operation]]:
    """A host in which the roles that `mode` merges are equal, and what converts it. Shared."""
    host = case(name)
    model = host.build(torch.float64)
    batch = {key: value.double() for key, value in host.batches()[0].items()}
    found = find_sites(model, batch)
    merge(model, mode, batch, found)
    return model, prepare(model, found, mode)[0]


@pytest.mark.parametrize("init", ["wq-refit", "joint-svd", "calibrated"])
@pytest.mark.parametrize(("name", "mode"), EXACT)
def test_where_the_merged_roles_are_equal_every_initializer_is_exact(name: str, mode: str, init: str) -> None:
    model, operations = merged(name, mode)
    batch = {key: value.double() for key, value in case(name).batches()[0].items()}
    generator = torch.Generator().manual_seed(1)
    shape = next(iter(batch.values())).shape
    images = [torch.randn(4, *shape[1:], generator=generator, dtype=torch.float64) for _ in range(6)]
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


def test_sums_in_single_precision_may_leave_directions_below_zero() -> None:
    # Small images with an empty border: their tokens take few directions, and rounding is larger than the damping.
    basis = torch.linalg.qr(torch.randn(13, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    moment = basis @ torch.diag(torch.tensor([40.0, 9, 4, *[-3e-5] * 10], dtype=torch.float64)) @ basis.mT
    metric = make_metric(moment, moment)
    assert all(torch.isfinite(part).all() for part in vars(metric).values())
    kept = metric.whiten.mT @ metric.whiten
    assert torch.allclose(kept, moment, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "freedom"),
    [
        ("vit", Freedom(True, "linear")),
        ("vit-qk-norm", Freedom(False, "linear")),
        ("eva02", Freedom(False, "linear")),
        ("swin", Freedom(True, "linear")),
        ("levit", Freedom(True, "order")),
        ("hf-dinov3", Freedom(False, "linear")),
    ],
)
def test_which_bases_are_free(name: str, freedom: Freedom) -> None:
    host = case(name)
    model, batch = host.build(), host.batches()[0]
    found = find_sites(model, batch)[0]
    module, traced = model.get_submodule(found.site.fqn), found.traced
    assert traced is not None
    with torch.no_grad():
        out = find_output(meta_copy(module), found.call, traced.v)
    assert probe(module, found.call, traced.q, traced.k, traced.v, out) == freedom


def test_the_original_is_untouched_and_types_stay() -> None:
    host = case("vit")
    model = host.build().to(torch.bfloat16).train()
    batch = {key: value.bfloat16() for key, value in host.batches()[0].items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = [torch.randn(4, 3, 32, 32) for _ in range(4)]
    armour = convert(model, "qv", init="calibrated", calibration=images, example_input=batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in vars(module) for module in [*model.modules(), *armour.modules()])
    assert {tensor.dtype for tensor in armour.parameters()} == {torch.bfloat16}
    assert armour.training
    assert model.training


class SharedKeys(nn.Module):
    """Six heads of queries for two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(30, 24), nn.Linear(30, 8), nn.Linear(30, 8), nn.Linear(24, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (6, 4)).transpose(1, 2)
        k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("init", ["wq-refit", "joint-svd"])
def test_heads_that_share_keys_have_wq_alone(init: str) -> None:
    model, example = nn.Sequential(SharedKeys()), torch.randn(2, 7, 30)
    assert convert(model, "kv", example_input=example)(example).shape == example.shape
    with pytest.raises(ConversionError, match="0 has 6 heads of Q for 2 of K, and only init 'wq' is there"):
        convert(model, "kv", init=init, example_input=example)


def test_images_for_an_init_that_uses_none() -> None:
    with pytest.raises(UsageError, match="uses no images"):
        convert(case("vit").build(), "qv", init="wq", calibration="synthetic")


def test_what_does_not_fit_into_memory_is_kept_in_files() -> None:
    store = Store(budget=100)
    base = torch.arange(60.0).reshape(3, 20)
    store["a"] = ((base, None, base[:, 2:5].mT), {"flag": True})
    (whole, nothing, part), options = store["a"]
    assert torch.equal(whole, base)
    assert torch.equal(part, base[:, 2:5].mT)
    assert (nothing, options) == (None, {"flag": True})
    store.close()


@pytest.mark.parametrize("name", ["vit", "levit", "swin", "hf-dinov2"])
def test_without_memory_for_them_activations_are_computed_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = case(name)
    model = host.build(torch.float64)
    example = {name: value.double() for name, value in host.batches()[0].items()}
    key = next(iter(example))
    images = [torch.randn(3, *example[key].shape[1:], dtype=torch.float64) for _ in range(6)]

    def converted() -> nn.Module:
        return convert(model, init="calibrated", calibration=images, example_input=example)

    remembered = converted()
    monkeypatch.setattr(Store, "has_room", lambda self, size: False)
    recomputed = converted()
    assert any("last layer" in site.steps for site in surgery_of(remembered).sites)
    # Weights may differ by what changes no function, such as the signs of a basis.
    for first, second in zip(*(outputs(one.eval(), example) for one in (remembered, recomputed)), strict=True):
        assert torch.allclose(first, second, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "learned"),
    [("vit", [0]), ("hf-dinov2", [0]), ("deit-distilled", [0, 1]), ("levit", None), ("swin", None)],
)
def test_learned_tokens_are_those_that_no_image_changes(name: str, learned: list[int] | None) -> None:
    host = case(name)
    model = host.build(torch.float64)
    inputs = {key: value.double() for key, value in host.batches()[0].items()}
    key = next(iter(inputs))
    units = units_of(model, [one.site.fqn for one in find_sites(model, inputs)])
    walk = Walk(model, units, lambda model, batch: model(**{key: batch}))
    found = learned_tokens(walk, inputs[key], walk.begin(inputs[key]))
    assert (None if found is None else found.nonzero().flatten().tolist()) == learned
    if found is not None:
        batches = Batches([3, 3], {})
        batches.learned = torch.arange(40) < len(learned or ())
        weights = batches.weights(40)
        assert weights is not None
        # All learned tokens together count like three tenths of the others.
        assert float(weights[batches.learned].sum()) == pytest.approx(0.3 * int((~batches.learned).sum()))
        assert batches.weights(39) is None


def test_a_fit_of_fewer_tokens_keeps_every_learned_one_and_its_share() -> None:
    batches = Batches([3, 3], {})
    batches.learned = torch.arange(41) < 1
    places, weights = batches.thinned(torch.Size([3, 41]), 2, 5)
    image, token = places // 41, places % 41
    assert weights is not None
    assert image[token == 0].tolist() == [0, 1, 2]
    assert len(places) == 3 + 120 // 5 == len(places.unique())
    assert float(weights[token == 0].sum()) == pytest.approx(0.3 * float(weights[token != 0].sum()))
    batches.learned = None
    places, weights = batches.thinned(torch.Size([3, 41]), 2, 5)
    assert weights is None
    assert places.tolist() == list(range(2, 123, 5))


def test_a_token_of_weight_n_errs_like_n_tokens() -> None:
    torch.manual_seed(0)
    wanted, got = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    times = torch.tensor([3, 1, 2, 1, 4])
    repeated = token_error(got.repeat_interleave(times, 1), wanted.repeat_interleave(times, 1))
    torch.testing.assert_close(token_error(got, wanted, times[:, None]), repeated)
    assert not torch.isclose(token_error(got, wanted), repeated)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(6, 12), st.booleans(), st.integers(0, 2**16))
def test_a_row_of_weight_n_counts_like_n_rows(inputs: int, outputs: int, rows: int, biases: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = torch.randn(rows, inputs, dtype=torch.float64), torch.randn(rows, outputs, dtype=torch.float64)
    times = torch.randint(1, 4, (rows,))
    present = torch.randn(inputs + biases, outputs, dtype=torch.float64)
    weighted, repeated = Regression(present, biases), Regression(present, biases)
    for held_out in (False, True):
        weighted.add(x, y, held_out, weights=times[:, None])
        repeated.add(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0), held_out)
    for found, wanted in zip(weighted.solve(), repeated.solve(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_one_batch_is_too_few() -> None:
    host = case("vit")
    with pytest.raises(CalibrationError, match="two batches"):
        convert(
            host.build(),
            "qv",
            init="calibrated",
            calibration=[torch.randn(4, 3, 32, 32)],
            example_input=host.batches()[0],
        )
