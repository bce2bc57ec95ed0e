"""Options that cannot be are refused before any work, with what to write instead."""

from typing import Any

import pytest
from small_models import refused, vit
from tiny_hosts import CASES, case

from armour_surgery import convert
from armour_surgery.errors import UsageError
from armour_surgery.modes import MODES
from armour_surgery.surgery.order import INITS


def test_unknown_modes_and_inits_are_wrong_usage() -> None:
    message = refused(UsageError, lambda: convert(vit(), "vq"))
    assert "'vq'" in message
    assert all(name in message for name in ("auto", *MODES))
    message = refused(UsageError, lambda: convert(vit(), init="magic"))
    assert "'magic'" in message
    assert all(name in message for name in INITS)


@pytest.mark.parametrize("rank", [0, -8, True, 8.0, "8", {"blocks.0.attn": 0}])
def test_what_is_no_rank(rank: Any) -> None:
    with pytest.raises(UsageError, match="not a whole number from 1 to key_dim"):
        convert(CASES["vit"].build(), "qv", rank=rank)


@pytest.mark.parametrize("mode", ["qk", "qk-diag", "concat-half", "grouped"])
def test_modes_without_a_rank(mode: str) -> None:
    with pytest.raises(UsageError, match=f"mode '{mode}' has no rank"):
        convert(CASES["vit"].build(), mode, rank=8)


def test_images_for_an_init_that_uses_none() -> None:
    with pytest.raises(UsageError, match="uses no images"):
        convert(case("vit").build(), "qv", init="wq", calibration="synthetic")
