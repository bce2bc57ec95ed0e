"""Copies on the meta device keep a model's structure, and share nothing with it."""

import copy
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small_models import Tied, attention_caches, tiny_levit
from tiny_hosts import CASES
from torch import nn
from torch.nn.utils import parametrizations

from armour_surgery.copies import alias, copy_of_zeros, full_copy, meta_copy


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


class Collecting(nn.Module):
    """Collects what its layers return with hooks that it puts on them, and computes with what it collected."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)
        self.collected: dict[str, torch.Tensor] = {}
        self.calls = Counter()
        self.first.register_forward_hook(partial(self.collect, "first"))
        self.second.register_forward_pre_hook(self.halve, with_kwargs=True)
        self.second.register_forward_hook(self.calls)

    def collect(self, name: str, layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.collected[name] = output

    def halve(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return tuple(argument / 2 for argument in args), kwargs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.collected = {}
        return self.second(self.first(x)) + self.collected["first"].sum(-1, keepdim=True)


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("copied", [meta_copy, alias])
def test_hooks_that_a_model_put_on_itself_act_on_the_copy(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, users = Collecting(), Counter()
    model.first.register_forward_hook(users)
    model.first.register_forward_hook(partial(users.__call__, "more"), always_call=True)
    model(torch.zeros(2, 3))
    before = model.collected["first"]
    assert (users.count, model.calls.count) == (2, 1)
    twin = copied(copied(model))
    assert twin(torch.zeros(7, 3, device=twin.first.weight.device)).shape == (7, 5)
    assert twin.collected["first"].shape == (7, 4)
    assert (users.count, model.calls.count, twin.calls.count) == (2, 1, 2)
    assert model.collected["first"] is before


def test_a_copy_of_transformers_collects_hidden_states_too() -> None:
    model, users = CASES["hf-vit"].build(), Counter()
    inputs = CASES["hf-vit"].batches()[0]
    model.vit.layers[1].register_forward_hook(users)
    wanted = model(**inputs, output_hidden_states=True).hidden_states
    twin = meta_copy(model)
    weightless = {name: value.to("meta") for name, value in inputs.items()}
    got = twin(**weightless, output_hidden_states=True).hidden_states
    assert [state.shape for state in got] == [state.shape for state in wanted]
    assert users.count == 1


def test_zeros_are_made_for_the_part_that_runs_alone() -> None:
    model = nn.ModuleDict({"tower": nn.BatchNorm1d(3), "text": nn.Linear(5, 7)})
    model["tower"].running_var.fill_(2.0)
    copied = copy_of_zeros(model, "tower")
    assert torch.equal(copied["tower"].weight, torch.zeros(3))
    assert torch.equal(copied["tower"].running_var, torch.full((3,), 2.0))
    assert copied["text"].weight.is_meta


class Stated(nn.Module):
    """Says itself what belongs into a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.cache = [1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "cache": []}


class Copied(nn.Module):
    """Copies itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Copied":
        made = memo[id(self)] = Copied()
        made.told = True
        return made


class Slotted:
    __slots__ = ("kept",)

    def __init__(self, kept: Any) -> None:
        self.kept = kept


class Holding(nn.Module):
    """Holds its parts in all ways that a model may hold something."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 2)
        self.others = nn.ModuleList([Stated(), Copied()])
        self.shared = [torch.zeros(2)]
        self.layer.shared = self.shared
        self.names = {"a", "b"}
        self.sizes = (2, 3.0, "x", torch.float32, torch.device("cpu"))
        self.pair = (self.layer, self.layer.weight)
        self.call = partial(self.layer.forward, 1)
        self.bound = self.layer.forward
        self.last = deque([self.layer], maxlen=3)
        self.object = Slotted([self.layer.weight, {"again": self.shared}])
        self.itself = {"me": [self]}


@pytest.mark.parametrize("copied", [full_copy, meta_copy, alias])
def test_whatever_holds_a_part_holds_the_copys(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = Holding()
    model.compile(backend="eager")
    twin: Any = copied(model)
    assert vars(twin).keys() == vars(model).keys() - {"_compiled_call_impl"}
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert twin.layer is not model.layer
    assert twin.layer.shared is twin.shared
    assert twin.shared is not model.shared
    assert twin.names == model.names
    assert twin.names is not model.names
    assert twin.sizes == model.sizes
    assert (twin.pair[0], twin.last[0]) == (twin.layer, twin.layer)
    assert twin.pair[1] is twin.layer.weight
    assert twin.last.maxlen == 3
    assert twin.call.func.__self__ is twin.bound.__self__ is twin.layer
    assert twin.object.kept[0] is twin.layer.weight
    assert twin.object.kept[1]["again"] is twin.shared
    assert twin.itself["me"][0] is twin
    assert twin.others[0].cache == []
    assert twin.others[1].told
    assert (twin.layer.weight is model.layer.weight) == (copied is alias)
    assert twin.layer.weight.is_meta == (copied is meta_copy)
    twin.names.add("c")
    twin.layer.register_forward_hook(lambda *_: None)
    assert model.names == {"a", "b"}
    assert not model.layer._forward_hooks
