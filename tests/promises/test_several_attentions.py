"""Modules that attend in several places convert exactly, all places at once, or are refused with the reason."""

import pytest
import torch
from oracle import check
from own_attentions import alone as host
from own_attentions import tokens
from several_attentions import FOLLOWED, REFUSED, AtOnce, Cascade, HeadByHead
from small_models import refused
from torch import nn

from armour_surgery import convert, inspect
from armour_surgery.errors import NothingToConvertError

EVERY = [(kind, mode) for kind, modes in FOLLOWED.items() for mode in modes]


@pytest.mark.parametrize("kind", FOLLOWED, ids=lambda kind: kind.__name__)
def test_the_modes_that_fit(kind: type[nn.Module]) -> None:
    (site,) = inspect(host(kind), example_input=tokens())
    assert tuple(mode for mode in site.modes if mode != "qk-diag") == FOLLOWED[kind]


@pytest.mark.parametrize(("kind", "mode"), EVERY, ids=lambda value: getattr(value, "__name__", value))
def test_surgery_changes_nothing_where_the_projections_are_equal(kind: type[nn.Module], mode: str) -> None:
    errors = check(host(kind), mode, [{"x": tokens()}, {"x": tokens(3)}])
    assert max(errors.values()) <= 1e-12, errors


def test_no_head_attends_to_itself_in_qk_diag() -> None:
    """Head by head it is what all heads at once are."""
    batch = tokens()
    apart, together = (convert(host(kind), "qk-diag", example_input=batch) for kind in (HeadByHead, AtOnce))
    assert torch.allclose(apart(batch), together(batch), rtol=0, atol=1e-12)


def test_weights_are_worked_out_for_one_attention_a_module_alone() -> None:
    message = refused(
        NothingToConvertError, lambda: convert(host(Cascade), "qv", init="joint-svd", example_input=tokens())
    )
    assert (
        "holds 3 attentions with projections of their own, and only init 'wq' without a rank is there for that"
        in message
    )


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_shares_its_projections_in_part_is_refused(kind: type[nn.Module]) -> None:
    message = refused(NothingToConvertError, lambda: convert(host(kind), "qv", example_input=tokens()))
    assert REFUSED[kind] in message
