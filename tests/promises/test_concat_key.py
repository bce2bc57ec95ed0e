"""`concat-key`: what the paper's modes leave alone, attention that asks from fewer tokens than it answers from."""

import pytest
import torch
import torch.nn.functional as F
from in_steps import initialized
from oracle import check, merge, outputs, randomize, relative_error
from shared_hosts import built, converted_host
from shared_hosts import example as shown
from small_models import refused
from tiny_hosts import CASES
from torch import Tensor, nn

from armour_surgery import convert, deploy, inspect
from armour_surgery.copies import full_copy
from armour_surgery.discover import find_sites
from armour_surgery.errors import NothingToConvertError
from armour_surgery.surgery.operation import prepare
from armour_surgery.surgery.order import INITS

H, K, V = 3, 4, 10  # heads, and channels a head of keys and of wide values


class Asks(nn.Module):
    """Every second token asks, about tokens of another width; values are wide, and an activation follows them."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.wide = wide
        self.widen = nn.Linear(20, 28)
        self.q = nn.Linear(20, H * K)
        self.k = nn.Linear(28, H * K)
        self.v = nn.Linear(28, H * wide)
        self.out = nn.Linear(H * wide, 20)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.widen(x)
        q = self.q(x[:, ::2]).unflatten(-1, (H, K)).transpose(1, 2)
        k = self.k(memory).unflatten(-1, (H, K)).transpose(1, 2)
        v = self.v(memory).unflatten(-1, (H, self.wide)).transpose(1, 2)
        found = F.scaled_dot_product_attention(q, k, v)
        return self.out(F.hardswish(found.transpose(1, 2).flatten(2)))


class Pictures(nn.Module):
    """An image as tokens, twenty channels each, and what the attention finds."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 2, 2)
        self.attn = Asks(wide)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.stem(x).flatten(2).mT)


def images(batch: int, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


def host(wide: int = V) -> nn.Module:
    return randomize(Pictures(wide)).double().eval()


def test_keys_are_the_first_of_the_values() -> None:
    model = host()
    (site,) = inspect(model, example_input=images(2))
    assert site.modes == ("concat-key",)
    errors = check(model, "concat-key", [{"x": images(2)}, {"x": images(5)}, {"x": images(3, 6)}])
    assert max(errors.values()) <= 1e-12, errors
    code = convert(model, "concat-key", example_input=images(2)).attn.code
    assert "torch.cat" in code
    assert "self.q(" in code


@pytest.mark.parametrize(("mode", "wide"), [("concat-key", V), ("kv", K)])
@pytest.mark.parametrize("init", INITS)
def test_every_initializer_is_exact_where_keys_are_values(init: str, mode: str, wide: int) -> None:
    """Queries and keys have tokens of different widths, and V is measured by those of K."""
    model = host(wide)
    example = {"x": images(8)}
    assert merge(model, mode, {"x": images(2).to("meta")}) == ["attn"]
    operations = prepare(model, find_sites(model, {"x": images(2).to("meta")}), mode).operations
    armour, results = initialized(model, operations, init, example, [images(size) for size in (8, 9, 10)])
    with torch.no_grad():
        assert relative_error(outputs(model, example), outputs(armour, example)) <= 1e-5
    assert all(site.residual < 1e-3 for site in results)


def test_calibration_loses_less_than_the_keys_as_they_are() -> None:
    model = host()
    operations = prepare(model, find_sites(model, {"x": images(2).to("meta")}), "concat-key").operations
    seen = [images(size) for size in (40, 41, 42)]
    example = {"x": images(7)}
    with torch.no_grad():
        wanted = model(**example)
        plain, chosen = (initialized(model, operations, init, example, seen)[0] for init in ("wq", "calibrated"))
        assert (chosen(**example) - wanted).norm() < 0.8 * (plain(**example) - wanted).norm()


@pytest.mark.parametrize("name", ["levit", "levit-conv", "hf-levit"])
def test_it_converts_every_block_and_auto_does_not_take_it(name: str) -> None:
    every = [site.site for site in built(name)[1]]
    shrinking = [site.fqn for site in every if site.kind == "downsampling"]
    assert len(shrinking) == 1
    assert {site.fqn for site in converted_host(name, "concat-key").surgery.sites} == {site.fqn for site in every}
    usual = converted_host(name).surgery
    assert {site.mode for site in usual.sites} == {"concat-half"}
    assert [site.fqn for site in usual.refused] == shrinking


def test_only_rows_of_values_go() -> None:
    model, armour = built("levit")[0], converted_host("levit", "concat-key")
    for site in built("levit")[1]:
        old, new = (one.get_submodule(site.fqn) for one in (model, armour))
        lost = sum(map(torch.numel, old.parameters())) - sum(map(torch.numel, new.parameters()))
        width = old.get_parameter(site.traced.v.producer.weight).shape[1]
        # A row of the weight, and two numbers of BatchNorm, for every channel that keys bring.
        assert lost == site.site.num_heads * site.site.key_dim * (width + 2)


def test_keys_that_are_values_keep_their_bias_when_deployed() -> None:
    model = full_copy(converted_host("levit", "concat-key", torch.float64))
    deployed = deploy(model, example_input=shown("levit", torch.float64))
    for batch in CASES["levit"].batches(torch.float64):
        with torch.no_grad():
            assert relative_error(outputs(model, batch), outputs(deployed, batch)) < 1e-12


def test_values_as_wide_as_keys_have_a_mode_of_their_own() -> None:
    model, _ = built("vit")
    message = refused(NothingToConvertError, lambda: convert(model, "concat-key"))
    assert "V is not wider than K (12 and 12 channels a head)" in message
    assert "use kv" in message
