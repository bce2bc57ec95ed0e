"""Parameters and MACs are counted exactly, and counting leaves the model as it was."""

import copy
import json

import pytest
import timm
import torch
from small_models import Tied, attention_caches, tiny_levit
from timm.layers import set_fused_attn
from timm.utils import reparameterize_model
from torch import Tensor, nn

from armour_surgery.errors import ExampleInputError
from armour_surgery.measure.cost import count_folded_params, count_macs, count_params

IMAGE = (3, 224, 224)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [("deit_tiny_patch16_224", 1_253_683_200, 5_717_416), ("levit_128s", 304_660_832, 7_777_058)],
)
def test_counts_are_exact_with_any_attention_kernel(name: str, macs: int, params: int, fused: bool) -> None:
    set_fused_attn(fused)
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    finally:
        set_fused_attn(True)
    report = count_macs(model, {"x": torch.empty(2, *IMAGE)})
    assert report.macs == report.by_module[""] == macs
    assert report.batch_size == 2
    children = [name for name, _ in model.named_children()]
    assert sum(report.by_module.get(child, 0) for child in children) == macs
    assert count_params(model) == params
    # A tied parameter counts once, a buffer does not.
    assert count_params(Tied()) == 4 * 4 + 4 + 4


def test_macs_of_one_attention_follow_from_its_shapes() -> None:
    with torch.device("meta"):
        report = count_macs(timm.create_model("deit_tiny_patch16_224"), {"x": torch.empty(1, *IMAGE)})
    tokens, dim = 197, 192
    assert report.by_module["blocks.3.attn.qkv"] == tokens * dim * 3 * dim
    assert report.by_module["blocks.3.attn"] == tokens * dim * 4 * dim + 2 * tokens * tokens * dim
    assert json.loads(json.dumps(report.to_dict()))["macs"] == report.macs


def test_counting_leaves_the_model_as_it_was() -> None:
    model = tiny_levit().train()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    count_macs(model, {"x": torch.zeros(1, 3, 32, 32)})
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(attention_caches(model))


def test_a_model_that_needs_values_is_counted_on_the_cpu() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("times", torch.tensor(3))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(self.times)):
                x = self.linear(x)
            return x

    model = Branching()
    weight = model.linear.weight.detach().clone()
    assert count_macs(model, {"x": torch.ones(5, 4)}).by_module == {"": 48, "linear": 48}
    assert torch.equal(model.linear.weight, weight)


class Token(nn.Module):
    """A learned token goes into a module by itself, as in CaiT; or what was made of it at the first call."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 3, 4))
        self.linear = nn.Linear(4, 6)
        self.cache: dict[str, Tensor] = {"token": self.token * 2} if cached else {}

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.cache.get("token", self.token).expand(len(x), -1, -1))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_learned_tensor_may_go_into_a_module(cached: bool, trainable: bool) -> None:
    model = Token(cached).requires_grad_(trainable)
    assert count_macs(model, {"x": torch.zeros(2, 5)}).by_module == {"": 72, "linear": 72}
    assert model.token.requires_grad is trainable


def test_an_example_that_does_not_fit_is_told() -> None:
    with pytest.raises(ExampleInputError, match=r"Linear could not run on inputs of shape .*\(1, 3\)"):
        count_macs(nn.Linear(4, 4), {"input": torch.zeros(1, 3)})
    with pytest.raises(ExampleInputError, match="no example"):
        count_macs(nn.Linear(4, 4), {})


def test_folding_leaves_a_bias_and_nothing_else() -> None:
    after = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6))
    before = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 6))
    alone = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    assert count_folded_params(after) == 4 * 6 + 6
    assert count_folded_params(before) == 4 * 6 + 6
    assert count_folded_params(alone) == count_params(alone) == 8


def test_folding_count_is_what_timm_folds_levit_to() -> None:
    model = tiny_levit()
    assert count_folded_params(model) == count_params(reparameterize_model(model)) < count_params(model)
