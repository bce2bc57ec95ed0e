"""A fixed gauge takes weights away and changes nothing; where a basis is bound, or too badly conditioned, it stays."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from oracle import outputs, randomize, relative_error
from small_models import refused, surgery_of, vit
from tiny_hosts import CASES
from torch import nn

from armour_surgery import convert, plan
from armour_surgery.errors import NothingToConvertError, UsageError
from armour_surgery.notes import ArmourWarning
from armour_surgery.rewrite.fixed import FixedProjection

HOSTS = ("vit", "beit", "swin", "hf-vit", "hf-segformer")
# Of four heads of twelve channels in two blocks of `vit`.
SAVED = 2 * 4 * 12 * 12


def doubled(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = randomize(CASES[name].build()).double()
    return model, {key: value.double() for key, value in CASES[name].example().items()}


def difference(free: nn.Module, fixed: nn.Module, name: str) -> float:
    """The largest relative difference, in eval and in train mode."""
    worst = 0.0
    batches = CASES[name].batches(torch.float64)
    for training, batch in itertools.product((False, True), batches):
        one, other = copy.deepcopy(free).train(training), copy.deepcopy(fixed).train(training)
        with torch.no_grad():
            worst = max(worst, relative_error(outputs(one, batch), outputs(other, batch)))
    return worst


@pytest.mark.parametrize("name", HOSTS)
def test_a_fixed_gauge_changes_nothing_but_the_number_of_weights(name: str) -> None:
    model, example = doubled(name)
    free = convert(model, example_input=example)
    fixed = convert(model, example_input=example, gauge="fixed")
    assert difference(free, fixed, name) < 1e-9
    saved = 0
    for module in fixed.modules():
        if isinstance(module, FixedProjection):
            saved += module.heads * module.width**2
    before, after = surgery_of(free), surgery_of(fixed)
    assert not after.refused
    assert saved > 0
    assert before.params_after - after.params_after == saved
    assert after.params_after == sum(parameter.numel() for parameter in fixed.parameters())
    assert after.macs_after < before.macs_after
    assert sum(site.params_after for site in before.sites) - sum(site.params_after for site in after.sites) == saved
    gauges = [site.gauge for site in after.sites]
    assert all(gauge is not None and gauge.start is not None for gauge in gauges)
    assert all(gauge is not None and 1 <= (gauge.condition or 0) < 1e4 for gauge in gauges)


@pytest.mark.parametrize("mode", ["kv", "qk", "qk-diag"])
def test_every_mode_with_a_free_basis(mode: str) -> None:
    model, example = doubled("vit")
    free, fixed = (convert(model, mode, example_input=example, gauge=gauge) for gauge in ("keep", "fixed"))
    assert difference(free, fixed, "vit") < 1e-9
    assert surgery_of(free).params_after - surgery_of(fixed).params_after == SAVED


@pytest.mark.parametrize("mode", ["concat-half", "concat-full", "concat-key", "grouped", "grouped-shuffled"])
def test_wide_values(mode: str) -> None:
    """Of what Q, K and a projection of V's own make together, the output reads each in its own basis."""
    torch.manual_seed(0)
    model = randomize(WideModel()).double().eval()
    x = torch.randn(2, 7, 20, dtype=torch.float64)
    free, fixed = (convert(model, mode, example_input=x, gauge=gauge) for gauge in ("keep", "fixed"))
    with torch.no_grad():
        assert relative_error([free(x)], [fixed(x)]) < 1e-9
    assert surgery_of(free).params_after - surgery_of(fixed).params_after == 3 * 4 * 4


class WideModel(nn.Module):
    """Values of nine channels a head, queries and keys of four."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(20, 12), nn.Linear(20, 12), nn.Linear(20, 27)
        self.out = nn.Linear(27, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (made.unflatten(-1, (3, -1)).transpose(1, 2) for made in (self.q(x), self.k(x), self.v(x)))
        return x + self.out(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_ranks_and_every_init_go_with_it() -> None:
    model, example = doubled("vit")
    for options in ({"init": "joint-svd"}, {"init": "wq-refit"}, {"rank": 8}):
        free = convert(model, "qv", example_input=example, **options)
        fixed = convert(model, "qv", example_input=example, gauge="fixed", **options)
        assert difference(free, fixed, "vit") < 1e-9
        width = options.get("rank", 12)
        assert surgery_of(free).params_after - surgery_of(fixed).params_after == 2 * 4 * width**2


def test_images_choose_the_weights_and_a_budget_counts_the_gauge() -> None:
    model = randomize(CASES["vit"].build())
    images = [torch.randn(16, 3, 32, 32) for _ in range(3)]
    options = {"init": "calibrated", "calibration": images, "params": "-12%", "rank": "auto"}
    goal = sum(parameter.numel() for parameter in model.parameters()) * 0.88
    fixed = convert(model, gauge="fixed", **options)
    surgery = surgery_of(fixed)
    assert any(site.gauge is not None and site.gauge.start is not None for site in surgery.sites)
    assert surgery.params_after <= goal
    (chosen,) = [point for point in surgery.frontier if point.measured is not None]
    assert chosen.params == surgery.params_after == sum(parameter.numel() for parameter in fixed.parameters())
    # In place, the tensors of the best attempt go into the model that was given.
    again = convert(copy.deepcopy(model), gauge="fixed", inplace=True, **options)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), fixed.eval()(x))


def test_a_plan_without_weights_says_the_same_numbers() -> None:
    model = vit()
    said, done = plan(model, gauge="fixed"), surgery_of(convert(model, gauge="fixed"))
    assert (said.params_after, said.macs_after) == (done.params_after, done.macs_after)
    with torch.device("meta"):
        weightless = vit()
    assert surgery_of(convert(weightless, gauge="fixed")).params_after == done.params_after


def test_what_a_caller_drew_next_is_drawn_all_the_same() -> None:
    model = vit()
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    convert(model, gauge="fixed")
    assert torch.equal(torch.rand(1), wanted)


def test_weights_train_and_stay_frozen_as_they_were() -> None:
    model = vit()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    fixed = convert(model, gauge="fixed").train()
    assert not any(parameter.requires_grad for parameter in fixed.blocks[0].parameters())
    fixed(torch.randn(2, 3, 32, 32)).sum().backward()
    assert fixed.blocks[1].attn.fixed_projection.rest.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit-qk-norm", "basis of queries and keys"),
        ("eva02", "basis of queries and keys"),
        ("hf-dinov3", "rotary position"),
        ("levit", "qkv.bn acts on single channels of what qkv makes, and a fixed gauge needs another basis"),
    ],
)
def test_a_bound_basis_is_left_alone(name: str, words: str) -> None:
    model, example = CASES[name].build(), CASES[name].example()
    message = refused(NothingToConvertError, lambda: convert(model, gauge="fixed", example_input=example))
    assert words in message
    assert "leave out gauge" in message


class Bound(WideModel):
    """Values as wide as queries, and something about it that binds their basis, or leaves no room for another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, width = kind, 20 if kind != "narrow" else 4
        self.q, self.k, self.v = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(width, 12)
        self.out = nn.Linear(12, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (made.unflatten(-1, (3, -1)).transpose(1, 2) for made in (self.q(x), self.k(x), self.v(x)))
        heads = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return heads if self.kind == "open" else x + self.out(heads.relu() if self.kind == "relu" else heads)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("relu", "so the gauge of values cannot be fixed; leave out gauge"),
        ("open", "is not inside this module"),
        ("narrow", "q reads 4 channels, no more than the 4 that a head has"),
    ],
)
def test_what_binds_an_own_attention(kind: str, words: str) -> None:
    model = Bound(kind)
    x = torch.randn(2, 7, 4 if kind == "narrow" else 20)
    assert words in refused(NothingToConvertError, lambda: convert(model, "qv", gauge="fixed", example_input=x))
    assert surgery_of(convert(model, "qv", example_input=x)).sites


def test_sites_that_can_are_converted_beside_those_that_cannot() -> None:
    case = CASES["hf-siglip"]
    fixed = convert(case.build(), gauge="fixed", example_input=case.example())
    (left,) = surgery_of(fixed).refused
    assert left.reason.endswith("leave out gauge")
    assert len(surgery_of(fixed).sites) == 2


def test_a_head_without_an_inverse_keeps_its_gauge_and_says_so() -> None:
    model = vit(depth=2)
    with torch.no_grad():
        # Rows of Q's second head in the first block: two channels that are one.
        model.blocks[0].attn.qkv.weight[13] = model.blocks[0].attn.qkv.weight[14]
    with pytest.warns(ArmourWarning, match=r"blocks\.0\.attn keeps its gauge: the best of its blocks") as told:
        fixed = convert(model, "qv", gauge="fixed")
    assert len(told) == 1
    first, second = surgery_of(fixed).sites
    assert first.gauge is not None
    assert first.gauge.start is None
    assert second.gauge is not None
    assert second.gauge.start is not None
    assert [isinstance(module, FixedProjection) for module in fixed.modules()].count(True) == 1
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error([convert(model, "qv")(x)], [fixed(x)]) < 1e-4
    assert "gauge fixed at 1 of 2 sites" in repr(surgery_of(fixed))
    assert "blocks.0.attn: no block of channels is conditioned well enough" in repr(surgery_of(fixed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_types_are_warned_of_with_the_measured_error(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(ArmourWarning, match=rf"rounding in {name} count for more.*relative error of 0\.\d+ now") as told:
        fixed = convert(vit().to(dtype), "qv", gauge="fixed")
    assert len(told) == 1
    for site in surgery_of(fixed).sites:
        assert site.gauge is not None
        assert 0 < (site.gauge.error_before or math.nan) < (site.gauge.error or math.nan) < 1
    assert fixed.blocks[0].attn.fixed_projection.rest.weight.dtype == dtype
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(vit(), "qv", gauge="fixed")  # float32 is told of nothing


def test_another_word_is_none() -> None:
    assert "unknown gauge 'free'" in refused(UsageError, lambda: convert(vit(), gauge="free"))
    assert "unknown gauge 1" in refused(UsageError, lambda: plan(vit(), gauge=1))  # type: ignore[arg-type]


def test_a_call_of_another_kind_is_followed_when_it_comes() -> None:
    model = randomize(vit()).double()
    example = {"x": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    free, fixed = (convert(model, "qv", example_input=example, gauge=gauge) for gauge in ("keep", "fixed"))
    tokens, mask = torch.randn(2, 9, 48, dtype=torch.float64), torch.randn(2, 1, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        wanted, got = (one.blocks[0].attn(tokens, attn_mask=mask) for one in (free, fixed))
    assert relative_error([wanted], [got]) < 1e-9
