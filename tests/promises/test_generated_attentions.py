"""Attention in any way of writing it converts exactly in every mode that its sizes allow, or is refused."""

import os

import torch
from generated_attentions import D, Generated, Recipe, recipes
from hypothesis import HealthCheck, given, settings
from oracle import check, randomize
from own_attentions import tokens
from torch import nn

from armour_surgery.discover import find_sites
from armour_surgery.records import RefusedSite
from armour_surgery.traced import FoundSite

EXAMPLES = int(os.environ.get("ARMOUR_TEST_EXAMPLES", "6"))


class Host(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(self.norm(x))


def fitting(recipe: Recipe) -> set[str]:
    """The modes of which the formula can be written down with these sizes."""
    equal = recipe.key_dim == recipe.value_dim
    if recipe.groups > 1:
        return {"kv"} if equal else {"concat-key"}
    modes = {"qk", "qk-diag"} | ({"qv", "kv"} if equal else {"concat-half", "concat-key"})
    if not equal and recipe.value_dim >= 2 * recipe.key_dim:
        modes.add("concat-full")
    return modes


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 100, suppress_health_check=[HealthCheck.too_slow]
)
@given(recipes())
def test_any_attention_converts_exactly_or_is_refused(recipe: Recipe) -> None:
    model = randomize(Host(Generated(recipe))).double().eval()
    batches = [{"x": tokens(2, 7)}, {"x": tokens(3, 7)}, {"x": tokens(2, 5)}]
    (found,) = sites = find_sites(model, batches[0])
    if recipe.softmax == "written out":
        assert isinstance(found, RefusedSite)
        assert "write it as torch.softmax" in found.reason
        return
    assert isinstance(found, FoundSite), (recipe, found)
    modes = {mode for mode in found.site.modes if "grouped" not in mode}
    assert modes == fitting(recipe), (recipe, found.site.refused)
    first, *others = sorted(modes - {"qk-diag"})
    for mode in (first, *others):
        errors = check(model, mode, batches, None if mode == first else sites)
        assert max(errors.values()) <= 1e-9, (mode, errors)
