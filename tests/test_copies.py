"""Copies on the meta device keep a model's structure, and share nothing with it."""

import copy

import pytest
import torch
from small_models import Tied, attention_caches, tiny_levit
from torch import nn
from torch.nn.utils import parametrizations

from armour_surgery.copies import meta_copy


def test_meta_copy_keeps_structure_and_no_numbers_unless_those_of_buffers() -> None:
    model = Tied()
    twin = meta_copy(model)
    assert type(twin) is Tied
    assert all(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers()))
    assert twin.head.weight is twin.embed.weight
    assert not twin.embed.bias.requires_grad
    assert twin.head.bias.requires_grad
    assert twin.label == "mine"
    assert twin.unregistered[0] is not model.unregistered[0]
    assert twin.unregistered[0].weight.is_meta
    assert [name for name, _ in twin.named_buffers()] == ["scale"]
    assert "scale" not in twin.state_dict()
    assert [(n, p.shape, p.stride()) for n, p in twin.named_parameters()] == [
        (n, p.shape, p.stride()) for n, p in model.named_parameters()
    ]
    twin = meta_copy(model, buffers=False)
    assert twin.embed.weight.is_meta
    assert twin.scale.item() == 2.0
    twin.scale.fill_(5)
    assert model.scale.item() == 2.0


@pytest.mark.parametrize("warm", [False, True])
def test_the_copys_caches_are_its_own(warm: bool) -> None:
    model = tiny_levit()
    model.eval()
    image = torch.zeros(1, 3, 32, 32)
    if warm:
        # What fills the cache has a gradient history, which a plain deepcopy refuses.
        model(image)
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(model)
    twin = meta_copy(model)
    caches, twins = attention_caches(model), attention_caches(twin)
    before = [dict(cache) for cache in caches]
    assert len(caches) == 3
    assert not any(a is b for a, b in zip(caches, twins, strict=True))
    assert twin(image.to("meta")).shape == (1, 5)
    assert [list(map(id, cache.values())) for cache in caches] == [list(map(id, b.values())) for b in before]
    assert not any(tensor.is_meta for cache in caches for tensor in cache.values())


def test_hooks_stay_on_the_original_and_do_not_fire_for_the_copy() -> None:
    model, seen = nn.Linear(2, 2), []
    model.register_forward_hook(lambda *_: seen.append("post"))
    model.register_forward_pre_hook(lambda *_: seen.append("pre"))
    meta_copy(model)(torch.zeros(1, 2, device="meta"))
    assert seen == []
    model(torch.zeros(1, 2))
    assert seen == ["pre", "post"]


def test_meta_copy_takes_parametrized_and_marked_parameters() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 3))
    model.bias.mark = "kept"
    twin = meta_copy(model)
    assert twin.bias.mark == "kept"
    assert twin(torch.zeros(1, 3, device="meta")).is_meta
