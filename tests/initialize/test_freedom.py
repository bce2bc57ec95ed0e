"""The bases that a head is free to take are found by probing."""

import pytest
import torch
from shared_hosts import built
from torch import nn

from armour_surgery import convert
from armour_surgery.copies import meta_copy
from armour_surgery.discover import find_output
from armour_surgery.errors import ConversionError
from armour_surgery.initialize.freedom import Freedom, probe


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
    model, sites = built(name)
    found = sites[0]
    module, traced = model.get_submodule(found.site.fqn), found.traced
    assert traced is not None
    with torch.no_grad():
        out = find_output(meta_copy(module), found.call, traced.v)
    assert probe(module, found.call, traced.q, traced.k, traced.v, out) == freedom


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
    with pytest.raises(ConversionError, match="6 heads of Q for 2 of K, and only init 'wq' without a rank is there"):
        convert(model, "kv", init=init, example_input=example)
