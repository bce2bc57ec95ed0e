"""Attention converts exactly whatever is done to its tokens, as long as channels stay what they are."""

from functools import partial

import own_attentions
import pytest
from oracle import check
from own_attentions import alone as host
from small_models import refused
from token_attentions import FOLLOWED, MIXED, SIDE
from torch import nn

from armour_surgery import convert, inspect
from armour_surgery.errors import NothingToConvertError

tokens = partial(own_attentions.tokens, count=SIDE * SIDE)
EVERY = [(kind, mode) for kind, modes in FOLLOWED.items() for mode in modes]


@pytest.mark.parametrize("kind", FOLLOWED, ids=lambda kind: kind.__name__)
def test_the_modes_that_fit(kind: type[nn.Module]) -> None:
    (site,) = inspect(host(kind), example_input=tokens())
    assert site.modes == FOLLOWED[kind]
    assert "so there is no diagonal to take out" in site.refused["qk-diag"]


@pytest.mark.parametrize(("kind", "mode"), EVERY, ids=lambda value: getattr(value, "__name__", value))
def test_surgery_changes_nothing_where_the_projections_are_equal(kind: type[nn.Module], mode: str) -> None:
    errors = check(host(kind), mode, [{"x": tokens()}, {"x": tokens(3)}])
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("kind", MIXED, ids=lambda kind: kind.__name__)
def test_where_channels_are_mixed_nothing_is_shared(kind: type[nn.Module]) -> None:
    message = refused(NothingToConvertError, lambda: convert(host(kind), "qv", example_input=tokens()))
    assert MIXED[kind] in message
