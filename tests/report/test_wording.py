"""Names of sites are put together for people."""

from armour_surgery.report.wording import grouped_names


def test_grouped_names() -> None:
    assert grouped_names(["blocks.0.attn", "blocks.1.attn", "blocks.3.attn"]) == "blocks.0-1,3.attn"
