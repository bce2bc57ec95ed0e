"""Which sites to convert within a budget: the arithmetic of the frontier, the search, and the whole on small models."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_hosts import built
from tiny_hosts import case
from torch import nn

from armour_surgery import convert, load, save
from armour_surgery.errors import NothingToConvertError, UsageError
from armour_surgery.records import Sensitivity
from armour_surgery.surgery.calibration_images import CalibrationData
from armour_surgery.surgery.conversion import sensitivities
from armour_surgery.surgery.order import Images
from armour_surgery.surgery.perform import surgery_of
from armour_surgery.surgery.selection import frontier, search

PARAMS = 10_000


def _images(model: nn.Module, name: str, count: int = 6) -> list[torch.Tensor]:
    shape = next(iter(case(name).batches()[0].values())).shape
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, *shape[1:], generator=generator) for _ in range(count)]


def _option(fqn: str, rank: int | None, saved: int, loss: float) -> Sensitivity:
    return Sensitivity(fqn, "qv", rank, saved, 0.1, loss)


options = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 900), st.floats(0, 0.1)),
    min_size=1,
    max_size=12,
    unique_by=lambda one: one[:2],
).map(lambda rows: [_option(f"blocks.{site}", saved, saved, loss) for site, saved, loss in rows])


@settings(max_examples=60, deadline=None)
@given(options)
def test_the_frontier_goes_from_nothing_to_everything_ever_dearer(found: list[Sensitivity]) -> None:
    points = frontier(found, PARAMS)
    assert points[0].params == PARAMS
    assert not points[0].sites
    most: dict[str, int] = {}
    for one in found:
        most[one.fqn] = max(most.get(one.fqn, 0), one.params_saved)
    assert points[-1].params == PARAMS - sum(most.values())
    prices = []
    for before, after in zip(points, points[1:], strict=False):
        assert after.params < before.params
        assert after.predicted >= before.predicted
        prices.append((after.predicted - before.predicted) / (before.params - after.params))
    assert all(second >= first - 1e-12 for first, second in zip(prices, prices[1:], strict=False))
    by_way = {(one.fqn, one.mode, one.rank): one for one in found}
    for point in points:
        assert point.params == PARAMS - sum(by_way[site].params_saved for site in point.sites)
        assert point.predicted >= sum(by_way[site].loss for site in point.sites) - 1e-9
        assert len({fqn for fqn, _, _ in point.sites}) == len(point.sites)


def test_an_option_that_others_beat_is_never_taken() -> None:
    found = [_option("a", 24, 100, 0.01), _option("a", 16, 150, 0.5), _option("a", 8, 300, 0.04)]
    assert [point.sites[-1][2] for point in frontier(found, PARAMS)[1:]] == [24, 8]


def test_the_search_corrects_what_the_sum_predicts() -> None:
    points = frontier([_option(f"blocks.{site}", None, 100, 0.01) for site in range(10)], PARAMS)
    asked = []

    def attempt(sites: tuple[object, ...]) -> tuple[nn.Module, float]:
        asked.append(len(sites))
        return nn.Linear(len(sites), 1), 0.02 * len(sites)  # twice what was predicted

    model, measured, chosen = search(points, 0.101, attempt)
    assert model.in_features == len(chosen.sites) == 5
    assert asked == [10, 5]
    assert [point.measured for point in measured if point.measured is not None] == [0.1, 0.2]


def test_a_budget_that_leaves_nothing_says_what_the_cheapest_costs() -> None:
    points = frontier([_option("blocks.7.attn", None, 100, 0.01)], PARAMS)
    with pytest.raises(NothingToConvertError, match=r"max_loss 0.001 leaves nothing .* blocks.7.attn .* 0.2000"):
        search(points, 0.001, lambda sites: (nn.Identity(), 0.2))


def test_large_batches_are_measured_on_too() -> None:
    """Sites are measured on the first 64 images, and these may be one batch."""
    example = case("vit").batches()[0]
    images = torch.randn(192, *next(iter(example.values())).shape[1:]).split(64)
    found = sensitivities(case("vit").build(), "qv", calibration=images, example_input=example)
    assert len(found) == 2


@pytest.fixture(scope="module")
def alone_and_whole() -> tuple[list[Sensitivity], nn.Module]:
    """What each site of a ViT costs alone, and all of it converted."""
    model, images, example = built("vit")[0], _images(nn.Identity(), "vit"), case("vit").batches()[0]
    alone = sensitivities(model, calibration=images, example_input=example)
    return alone, convert(model, init="calibrated", calibration=images, example_input=example)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_fits_the_budget_is_converted_and_the_rest_left_alone(
    inplace: bool, alone_and_whole: tuple[list[Sensitivity], nn.Module], tmp_path
) -> None:
    model, images = case("vit").build(), _images(nn.Identity(), "vit")
    example = case("vit").batches()[0]
    alone, whole = alone_and_whole
    ways = [(f"blocks.{number}.attn", mode) for number in (0, 1) for mode in ("qv", "kv")]
    assert [(one.fqn, one.mode) for one in alone] == ways
    assert all(0 < one.residual < 1 and one.loss > 0 and one.params_saved > 0 for one in alone)
    cheap = min(alone, key=lambda one: one.loss)
    everything = 1 - surgery_of(whole).fidelity.cosine
    budget = (cheap.loss + everything) / 2
    class_before = type(model)
    armour = convert(
        model, init="calibrated", calibration=images, max_loss=budget, inplace=inplace, example_input=example
    )
    surgery = surgery_of(armour)
    assert (armour is model) == inplace
    assert type(armour) is class_before
    assert [site.fqn for site in surgery.sites] == [cheap.fqn]
    assert len(surgery.refused) == 1
    assert "costs more than a loss of" in surgery.refused[0].reason
    assert 1 - surgery.fidelity.cosine <= budget == surgery.max_loss
    assert surgery.params_after == surgery.params_before - cheap.params_saved
    assert [len(point.sites) for point in surgery.frontier] == [0, 1, 2]
    batch = images[0]
    save(armour, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.surgery == surgery
    with torch.no_grad():
        assert torch.equal(again(batch), armour.eval()(batch))


def test_ranks_by_themselves_stay_within_the_budget_and_are_counted_right() -> None:
    host = case("vit")
    model, images, example = host.build(), _images(nn.Identity(), "vit"), host.batches()[0]
    options = sensitivities(model, calibration=images, rank="auto", example_input=example)
    narrow = [one for one in options if one.rank is not None]
    assert narrow
    assert all(one.rank % 8 == 0 for one in narrow)
    ranks = {one.fqn: one.rank for one in narrow}
    fixed = convert(model, rank=ranks, example_input=example)
    smallest = {one.fqn: one for one in narrow if one.rank == ranks[one.fqn]}
    saved = sum(one.params_saved for one in smallest.values())
    assert surgery_of(fixed).params_before - surgery_of(fixed).params_after == saved
    armour = convert(model, init="calibrated", calibration=images, rank="auto", max_loss=1.9, example_input=example)
    assert {site.rank for site in surgery_of(armour).sites} == set(ranks.values())
    plain = convert(model, init="calibrated", calibration=images, rank="auto", example_input=example)
    assert len(surgery_of(plain).sites) == 2
    assert 1 - surgery_of(plain).fidelity.cosine <= surgery_of(plain).max_loss


@pytest.mark.parametrize("kind", ["generator", "tensor", "mapping"])
def test_images_of_any_kind_are_read_once_and_serve_the_whole_search(kind: str) -> None:
    host = case("vit")
    model, images, example = host.build(), _images(nn.Identity(), "vit", 8), host.batches()[0]
    given = {
        "generator": (batch for batch in images),
        "tensor": torch.cat(images),
        "mapping": ({"labels": torch.zeros(4), "pixel_values": batch} for batch in images),
    }[kind]
    armour = convert(model, init="calibrated", calibration=given, max_loss=1.9, example_input=example)
    assert len(surgery_of(armour).sites) == 2
    assert surgery_of(armour).fidelity is not None


def test_wide_values_are_tried_in_both_concat_modes() -> None:
    host = case("levit")
    model, example = host.build().eval(), host.batches()[0]
    options = sensitivities(model, calibration=_images(nn.Identity(), "levit"), example_input=example)
    assert {one.mode for one in options} == {"concat-half", "concat-full"}
    by_site = {one.fqn: [other.params_saved for other in options if other.fqn == one.fqn] for one in options}
    assert all(2 * half == full for half, full in by_site.values())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_loss": 0.1}, "max_loss needs images"),
        ({"reconstruct": 5}, "reconstruct needs images"),
        ({"rank": "auto"}, "rank auto needs images"),
        ({"max_loss": 3, "init": "calibrated"}, "max_loss 3 is not between"),
        ({"reconstruct": -1, "init": "calibrated"}, "reconstruct -1 is not a number of steps"),
    ],
)
def test_options_that_cannot_be_are_refused(option: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        convert(case("vit").build(), "qv", **option)


@pytest.mark.parametrize("count", [5, 12])
def test_steps_by_gradient_see_no_image_that_judges(count: int) -> None:
    model = case("vit").build()
    batches = [torch.full((2, 3, 32, 32), float(number)) for number in range(count)]
    data = CalibrationData(model, case("vit").batches()[0], Images(batches, 2 * count), None)
    seen = [int(batch[0, 0, 0, 0]) for batch in itertools.islice(data.fresh(count), 3 * count)]
    every = min(8, count)
    assert set(seen) == {number for number in range(count) if number % every != every - 1}


def test_reconstruction_is_kept_only_where_held_out_images_agree() -> None:
    host = case("vit")
    model, images, example = host.build(), _images(nn.Identity(), "vit", 12), host.batches()[0]
    plain = convert(model, init="calibrated", calibration=images, example_input=example)
    further = convert(model, init="calibrated", calibration=images, reconstruct=12, example_input=example)
    steps = {step for site in surgery_of(further).sites for step in site.steps}
    assert "reconstruction" in steps
    assert surgery_of(further).fidelity.sqnr_db > surgery_of(plain).fidelity.sqnr_db - 0.5
    assert all(one.grad is None for one in further.parameters())
    assert all(one.requires_grad for one in further.parameters())
