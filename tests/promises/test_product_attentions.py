"""Projections that are products with a parameter convert exactly, or are refused with the reason."""

from functools import partial

import own_attentions
import pytest
from oracle import check, merge
from own_attentions import D
from own_attentions import alone as host
from product_attentions import FOLLOWED, REFUSED, EinsumStacked, TimesPacked
from small_models import refused
from torch import nn

from armour_surgery import convert, inspect, redundancy
from armour_surgery.errors import NothingToConvertError, TraceError

tokens = partial(own_attentions.tokens, count=7)
EVERY = [(kind, mode) for kind in FOLLOWED for mode in ("qv", "qk", "kv")]


@pytest.mark.parametrize("kind", FOLLOWED, ids=lambda kind: kind.__name__)
def test_the_modes_that_fit(kind: type[nn.Module]) -> None:
    (site,) = inspect(host(kind), example_input=tokens())
    assert site.modes == ("qv", "qk", "qk-diag", "kv")


@pytest.mark.parametrize(("kind", "mode"), EVERY, ids=lambda value: getattr(value, "__name__", value))
def test_surgery_changes_nothing_where_the_projections_are_equal(kind: type[nn.Module], mode: str) -> None:
    errors = check(host(kind), mode, [{"x": tokens()}, {"x": tokens(3)}])
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize(("kind", "shape"), [(TimesPacked, (D, 24)), (EinsumStacked, (2, 3, D, 4))])
def test_a_weight_keeps_its_form(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    converted = convert(host(kind), "qv", example_input=tokens())
    assert tuple(converted.weights[0].shape) == shape


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_cannot_be_narrowed_is_refused(kind: type[nn.Module]) -> None:
    message = refused(
        (NothingToConvertError, TraceError),  # type: ignore[arg-type]
        lambda: convert(host(kind), "qv", example_input=tokens()),
    )
    assert REFUSED[kind] in message


def test_weights_are_not_worked_out_for_them() -> None:
    message = refused(
        NothingToConvertError, lambda: convert(host(TimesPacked), "qv", init="joint-svd", example_input=tokens())
    )
    assert "multiplies by weights.0 without a layer, and only init 'wq' without a rank is there for that" in message


def test_no_rank_is_chosen_for_them() -> None:
    message = refused(
        (NothingToConvertError, TraceError),  # type: ignore[arg-type]
        lambda: convert(host(TimesPacked), "qv", rank=2, example_input=tokens()),
    )
    assert "multiplies by weights.0 without a layer" in message


@pytest.mark.parametrize("kind", FOLLOWED, ids=lambda kind: kind.__name__)
def test_projections_are_compared_in_whatever_form(kind: type[nn.Module]) -> None:
    """What makes q and k is read as one matrix a head: with equal rows they are alike."""
    model = host(kind)
    assert merge(model, "qk", {"x": tokens().to("meta")})
    (site,) = redundancy(model, example_input=tokens())
    assert site.pairs["qk"].mean_abs_difference == 0
