"""Names are put together, and made short, for people."""

import pytest

from armour_surgery.spelled import grouped_names, shortened


def test_grouped_names() -> None:
    assert grouped_names(["blocks.0.attn", "blocks.1.attn", "blocks.3.attn"]) == "blocks.0-1,3.attn"


@pytest.mark.parametrize(
    ("width", "short"),
    [(13, "blocks.0.attn"), (12, "block\u20260.attn"), (4, "b\u2026tn"), (2, "\u2026n"), (1, "\u2026")],
)
def test_a_long_name_loses_its_middle(width: int, short: str) -> None:
    assert shortened("blocks.0.attn", width) == short
    assert len(short) <= width
