"""The rival after SnapViT does what it says: scores, ranking, heads that go, and the search."""

import pytest
import torch
from mlp_rivals import hidden_moments
from oracle import outputs, relative_error
from snapvit_rival import Part, kept_of, prune_by_evolution, search, shrink, squared_gradients, view_loss, xnes
from tiny_hosts import case
from torch import Tensor, nn

from armour_surgery.measure.cost import count_params


def images() -> list[Tensor]:
    return [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def call(model: nn.Module, batch: Tensor) -> Tensor:
    output: Tensor = model(x=batch)
    return output


def test_the_evolution_strategy_finds_a_minimum() -> None:
    goal = torch.linspace(-1, 1, 6, dtype=torch.float64)
    stretched = torch.tensor([1.0, 1.0, 4.0, 4.0, 16.0, 16.0], dtype=torch.float64)

    def loss(point: Tensor, generation: int) -> float:
        # What all points of a generation share changes nothing.
        return float((stretched * (point - goal).square()).sum()) + 100.0 * (generation % 3)

    found = xnes(loss, torch.zeros(6, dtype=torch.float64), 0.5, 120, torch.Generator().manual_seed(0))
    assert float((found - goal).abs().max()) < 0.05


def test_views_are_told_from_others_and_not_from_themselves() -> None:
    embeddings = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    normalized = torch.nn.functional.normalize(embeddings, dim=-1)
    pairs = [(teacher, student) for teacher in range(2) for student in range(5) if teacher != student]
    wanted = sum(
        float(-(normalized[teacher].softmax(0) * normalized[student].log_softmax(0)).sum())
        for teacher, student in pairs
    )
    assert float(view_loss(embeddings)) == pytest.approx(wanted, rel=1e-5)


def test_the_least_for_their_price_go_until_enough_is_gone() -> None:
    parts = {
        "channels": Part(torch.tensor([1.0, 2.0, 3.0, 9.0], dtype=torch.float64), 10, 1),
        "heads": Part(torch.tensor([50.0, 900.0], dtype=torch.float64), 100, 1),
    }
    even = torch.ones(2)
    kept = kept_of(parts, even, 25)
    assert kept["channels"].tolist() == [3]
    assert kept["heads"].tolist() == [0, 1]
    # The head goes last and is worth more than was asked for: the best channels come back.
    kept = kept_of(parts, even, 110)
    assert kept["channels"].tolist() == [1, 2, 3]
    assert kept["heads"].tolist() == [1]
    # A factor brings the head to the front.
    kept = kept_of(parts, torch.tensor([1.0, 0.1]), 100)
    assert kept["channels"].tolist() == [0, 1, 2, 3]
    assert kept["heads"].tolist() == [1]
    with pytest.raises(ValueError, match="130 of 500 parameters"):
        kept_of(parts, even, 500)


def test_heads_and_channels_that_give_nothing_go_first_and_nothing_changes() -> None:
    model = case("vit").build()
    attention, mlp = model.blocks[0].attn, model.blocks[1].mlp
    with torch.no_grad():
        attention.proj.weight[:, : attention.head_dim] = 0.0
        mlp.fc2.weight[:, ::3] = 0.0
    scores = squared_gradients(model, images()[0], small=1)
    assert float(scores["blocks.0.attn"][0]) == 0.0
    assert float(scores["blocks.0.attn"][1:].min()) > 0.0
    assert float(scores["blocks.1.mlp"][::3].max()) == 0.0
    kept = {
        "blocks.0.attn": scores["blocks.0.attn"].nonzero().flatten(),
        "blocks.1.mlp": scores["blocks.1.mlp"].nonzero().flatten(),
    }
    small = shrink(model, kept, {})
    assert count_params(small) < count_params(model)
    batch = case("vit").batches()[0]
    with torch.no_grad():
        assert relative_error(outputs(model, batch), outputs(small, batch)) < 1e-5


def test_the_search_gives_models_of_each_size() -> None:
    model = case("vit").build()
    moments = hidden_moments(model, images(), call)
    searched = search(model, images(), moments, scored=2, small=1, seen=2, generations=1)
    state = torch.random.get_rng_state()
    whole = count_params(model)
    for share in (0.1, 0.3):
        goal = round(whole * (1 - share))
        small = prune_by_evolution(model, goal, searched, moments)
        channel = min(part.price for part in searched.parts.values())
        assert goal - channel < count_params(small) <= goal
        assert call(small, images()[0]).isfinite().all()
    assert torch.equal(state, torch.random.get_rng_state())
    assert count_params(model) == whole
