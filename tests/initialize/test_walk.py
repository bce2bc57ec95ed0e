"""The walk through a model needs no more memory than it may take, and knows which tokens were learned."""

import pytest
import torch
from in_steps import initialized
from oracle import outputs
from shared_hosts import built, prepared
from tiny_hosts import case
from torch import nn

from armour_surgery.copies import full_copy
from armour_surgery.initialize.batches import Batches
from armour_surgery.initialize.site import SiteResult
from armour_surgery.initialize.stream import learned_tokens
from armour_surgery.initialize.walk import Store, Walk, units_of


def test_what_does_not_fit_into_memory_is_kept_in_files() -> None:
    store = Store(budget=100)
    base = torch.arange(60.0).reshape(3, 20)
    store["a"] = ((base, None, base[:, 2:5].mT), {"flag": True})
    (whole, nothing, part), options = store["a"]
    assert torch.equal(whole, base)
    assert torch.equal(part, base[:, 2:5].mT)
    assert (nothing, options) == (None, {"flag": True})
    again, _ = store.pop("a", None)
    assert torch.equal(again[0], base)
    assert store.pop("a", "gone") == "gone"
    store.close()


@pytest.mark.parametrize("name", ["vit", "levit", "swin", "hf-dinov2"])
def test_without_memory_for_them_activations_are_computed_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = case(name)
    model, _ = built(name, torch.float64)
    operations = prepared(name, host.auto, torch.float64)
    example = host.batches(torch.float64)[0]
    key = next(iter(example))
    images = [torch.randn(3, *example[key].shape[1:], dtype=torch.float64) for _ in range(6)]

    def calibrated() -> tuple[nn.Module, list[SiteResult]]:
        return initialized(model, operations, "calibrated", example, images)

    remembered, results = calibrated()
    monkeypatch.setattr(Store, "has_room", lambda self, size: False)
    recomputed, _ = calibrated()
    assert any("last layer" in result.steps for result in results)
    # Weights may differ by what changes no function, such as the signs of a basis.
    for first, second in zip(*(outputs(one.eval(), example) for one in (remembered, recomputed)), strict=True):
        assert torch.allclose(first, second, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "learned"),
    [("vit", [0]), ("hf-dinov2", [0]), ("deit-distilled", [0, 1]), ("levit", None), ("swin", None)],
)
def test_learned_tokens_are_those_that_no_image_changes(name: str, learned: list[int] | None) -> None:
    original, sites = built(name, torch.float64)
    model = full_copy(original)
    inputs = case(name).batches(torch.float64)[0]
    key = next(iter(inputs))
    units = units_of(model, [found.site.fqn for found in sites])
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


@pytest.mark.parametrize(("name", "table"), [("beit-shared-bias", "rel_pos_bias"), ("hf-dinov3", "rope_embeddings")])
def test_what_a_later_block_reads_is_computed_again(name: str, table: str) -> None:
    """Memory that was just freed may still hold what a skipped module would have answered."""
    original, sites = built(name)
    model = full_copy(original)
    ((key, batch),) = case(name).batches()[0].items()
    units = units_of(model, [found.fqn for found in sites])
    assert table in dict(model.named_children())
    walk = Walk(model, units, lambda model, batch: model(**{key: batch}))
    answers: list[torch.Tensor] = []
    model.get_submodule(table).register_forward_hook(
        lambda _, __, output: answers.extend([output] if isinstance(output, torch.Tensor) else output)
    )
    walk.start(batch)
    for _ in range(15):
        [answer.clone() for answer in answers for _ in range(64)]  # and freed at once
        walk.start(batch)
        assert table not in walk.skipped(1)
