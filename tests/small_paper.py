"""Rows of the paper's tables for networks that are timed in a moment."""

from armour_surgery.paper.printed import PaperRow

__all__ = ["SMALL"]

# Two kinds of attention in one table, and something else to hold against the first.
SMALL = (
    PaperRow(1, "A", "test_vit", "qv", params="0.3", top1="71.0%", gpu="1,100", cpu="12.0"),
    PaperRow(1, "A base", "test_vit", params="0.4", top1="70.0%", gpu="1,000", cpu="10.0"),
    PaperRow(1, "Else", "test_efficientnet", params="0.4", gpu="1,500"),
    PaperRow(3, "B base", "test_vit2", params="0.4", gpu="500"),
    PaperRow(3, "B", "test_vit2", "qv", params="0.4", params_change="-9.9%", gpu="510", gpu_change="+9.0%"),
)
