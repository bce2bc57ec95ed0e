"""Pairs are compared right in every layout: what discovery found against what each library documents."""

import pytest
import torch
from tiny_hosts import CASES
from torch import Tensor, nn

from armour_surgery import inspect, redundancy
from armour_surgery.likeness.compare import compare_layers
from armour_surgery.likeness.pairs import PAIRS


@pytest.fixture(scope="session")
def levit() -> nn.Module:
    return CASES["levit"].build()


def packed(weight: Tensor, heads: int) -> dict[str, Tensor]:
    """timm's ViT: `[3, H, d]` rows."""
    rows = weight.detach().double().unflatten(0, (3, heads, -1))
    return {letter: rows[place].mT for place, letter in enumerate("qkv")}


def test_timm_vit_is_packed_by_role(vit: nn.Module) -> None:
    _, layer = compare_layers(vit, layer="1", include="blocks.*", example_input=CASES["vit"].example())
    assert layer.fqn == "blocks.1.attn"
    wanted = packed(vit.blocks[1].attn.qkv.weight, 4)
    assert all(torch.equal(layer.weights[letter], wanted[letter]) for letter in "qkv")
    assert layer.weights["q"].shape == (4, 48, 12)


def test_transformers_vit_has_three_layers() -> None:
    model = CASES["hf-vit"].build()
    sites, layer = compare_layers(model, example_input=CASES["hf-vit"].example(), threshold=0.05)
    projections = {site.fqn: site for site in inspect(model, example_input=CASES["hf-vit"].example())}[layer.fqn]
    for letter in "qkv":
        name = getattr(projections, letter).fqn
        wanted = model.get_submodule(name).weight.detach().double().unflatten(0, (4, 12)).mT
        assert torch.equal(layer.weights[letter], wanted)
    first, second = (layer.weights[letter].abs() for letter in "qv")
    below = ((first - second).abs() < 0.05).double().mean()
    assert sites[0].pairs["qv"].share == pytest.approx(100 * float(below))


def test_levit_is_packed_by_head_with_its_batch_norm(levit: nn.Module) -> None:
    """Keys of 8 and values of 16 channels: V's first 8 meet Q and K."""
    sites, layer = compare_layers(levit, example_input=CASES["levit"].example())
    block = levit.get_submodule(layer.fqn).qkv
    scale = block.bn.weight / (block.bn.running_var + block.bn.eps).sqrt()
    rows = (block.linear.weight * scale[:, None]).detach().double().unflatten(0, (3, 32))
    for letter, start, stop in (("q", 0, 8), ("k", 8, 16), ("v", 16, 32)):
        torch.testing.assert_close(layer.weights[letter], rows[:, start:stop].mT, rtol=1e-5, atol=1e-7)
    first = sites[0]
    assert (first.key_dim, first.value_dim, first.mode) == (8, 16, "concat-half")
    assert {pair: one.channels for pair, one in first.pairs.items()} == dict.fromkeys(PAIRS, 8)
    assert {pair: one.mode for pair, one in first.pairs.items()} == {
        "qk": "qk",
        "kv": "concat-key",
        "qv": "concat-half",
    }
    # The shrinking block: keys can be the first of the values, and `auto` leaves it alone.
    shrinking = next(site for site in sites if site.kind == "downsampling")
    assert shrinking.mode is shrinking.residual is None
    assert set(shrinking.pairs) == set(PAIRS)
    assert all("downsampling" in str(shrinking.pairs[pair].refused) for pair in ("qk", "qv"))
    assert shrinking.pairs["kv"].mode == "concat-key"
    assert shrinking.pairs["kv"].residual > 0


def test_roles_that_cannot_meet_say_why() -> None:
    class Grouped(nn.Module):
        """Six heads of queries for two of keys and values, from tokens of another width."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(30, 24), nn.Linear(20, 8), nn.Linear(20, 8)

        def forward(self, x: Tensor) -> Tensor:
            short = x[..., :20]
            q = self.q(x).unflatten(-1, (6, 4)).transpose(1, 2)
            k, v = (part(short).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.k, self.v))
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    [site] = redundancy(Grouped(), example_input=torch.empty(2, 7, 30))
    assert set(site.pairs) == {"kv"}
    assert all("different numbers of heads (6 and 2)" in site.skipped[pair] for pair in ("qk", "qv"))
    alone = site.pairs["kv"]
    assert (alone.channels, alone.mode, alone.residual) == (4, "kv", None)
    assert "no closed form" in str(alone.refused)
