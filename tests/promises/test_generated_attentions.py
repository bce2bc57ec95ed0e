"""Attention in any way of writing it converts exactly in every mode that its sizes allow, or is refused."""

import os

import torch
from generated_attentions import D, Generated, Recipe, recipes
from hypothesis import HealthCheck, given, settings
from oracle import check, randomize
from own_attentions import tokens
from torch import nn

from armour_surgery import inspect

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
    (site,) = inspect(model, example_input=tokens(2, 7))
    if recipe.softmax == "written out":
        assert "write it as torch.softmax" in site.refused["qv"], site.refused
        return
    modes = {mode for mode in site.modes if "grouped" not in mode}
    assert modes == fitting(recipe), (recipe, site.refused)
    for mode in sorted(modes - {"qk-diag"}):
        errors = check(model, mode, [{"x": tokens(2, 7)}, {"x": tokens(3, 7)}, {"x": tokens(2, 5)}])
        assert max(errors.values()) <= 1e-9, (mode, errors)
