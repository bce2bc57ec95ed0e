"""Tables 1 to 4 of the Armour paper (arXiv 2108.01778), every printed cell, as it is printed.

`params` is in millions, throughput in images per second: on one NVIDIA V100 (`gpu`) and one Intel Xeon
E5-2686 (`cpu`). A `*_change` is relative to the row of the table's own baseline. An empty string is a cell
that the table has not got, or a dash. The names of the first three rows of Table 1 are formulas that plain
text lost; they are restored from section 3.2.
"""

from dataclasses import dataclass

__all__ = ["CAPTIONS", "COLUMNS", "RECIPES", "ROWS", "PaperRow"]

CAPTIONS = {
    1: "Armour and the other ways of sharing, on DeiT-Ti; EfficientNet-B0 for comparison",
    2: "The generalized form on LeViT-128S",
    3: "Armour on DeiT-Ti, -S and -B",
    4: "The generalized form on larger LeViTs",
}
COLUMNS = ("params", "params_change", "top1", "gpu", "gpu_change", "cpu", "cpu_change")


@dataclass(frozen=True)
class PaperRow:
    """One row: the paper's cells, and the timm model and mode that make this row's network.

    `mode` is empty where nothing is converted. The row it is compared with is the one of the same table and
    model without a mode.
    """

    table: int
    name: str
    model: str
    mode: str = ""
    params: str = ""
    params_change: str = ""
    top1: str = ""
    gpu: str = ""
    gpu_change: str = ""
    cpu: str = ""
    cpu_change: str = ""


_TINY = "deit_tiny_patch16_224"
_DISTILLED = "deit_tiny_distilled_patch16_224"
_SMALL = "deit_small_patch16_224"
_BASE = "deit_base_patch16_224"

ROWS = (
    PaperRow(1, "Q=K", _TINY, "qk", params="5.3", top1="71.4%", gpu="2,790"),
    PaperRow(1, "Q=K diag", _TINY, "qk-diag", params="5.3", top1="71.2%", gpu="2,759"),
    PaperRow(1, "K=V", _TINY, "kv", params="5.3", top1="70.9%", gpu="2,791"),
    PaperRow(1, "Armour-Ti", _TINY, "qv", params="5.3", top1="72.0%", gpu="2,828"),
    PaperRow(1, "DeiT-Ti", _TINY, params="5.7", top1="72.1%", gpu="2,661"),
    PaperRow(1, "DeiT-Ti dist", _DISTILLED, params="5.9", top1="73.8%", gpu="2,649"),
    PaperRow(1, "Armour-Ti dist", _DISTILLED, "qv", params="5.5", top1="73.8%", gpu="2,819"),
    PaperRow(1, "Armour-Ti dist / 1200", _DISTILLED, "qv", params="5.5", top1="76.5%", gpu="2,819"),
    PaperRow(1, "EfficientNet-B0", "efficientnet_b0", params="5.3", top1="77.1%", gpu="2,743"),
    PaperRow(2, "LeViT-128S", "levit_128s", params="7.76", top1="74.4%", gpu="12,880", cpu="77.6"),
    PaperRow(2, "Armour-128S", "levit_128s", "concat-half", params="7.47", top1="75.5%", gpu="12,947", cpu="77.9"),
    PaperRow(2, "Armour-128S+", "levit_128s", "concat-full", params="7.18", top1="75.0%", gpu="13,035", cpu="81.2"),
    PaperRow(3, "DeiT-Ti", _TINY, params="5.7", gpu="2661"),
    PaperRow(3, "Armour-Ti", _TINY, "qv", params="5.3", params_change="-7.8%", gpu="2828", gpu_change="+7.2%"),
    PaperRow(3, "DeiT-S", _SMALL, params="22.1", gpu="987"),
    PaperRow(3, "Armour-S", _SMALL, "qv", params="20.3", params_change="-8.1%", gpu="1053", gpu_change="+6.7%"),
    PaperRow(3, "DeiT-B", _BASE, params="86.6", gpu="313"),
    PaperRow(3, "Armour-B", _BASE, "qv", params="79.5", params_change="-8.2%", gpu="335", gpu_change="+6.9%"),
    PaperRow(4, "LeViT-192", "levit_192", params="10.9", gpu="8,565", cpu="37.1"),
    PaperRow(4, "Armour-192", "levit_192", "concat-half", "10.4", "-4.6%", "", "8,695", "+1.5%", "38.1", "+2.7%"),
    PaperRow(4, "Armour-192+", "levit_192", "concat-full", "9.8", "-10.1%", "", "8,862", "+3.5%", "39.8", "+7.3%"),
    PaperRow(4, "LeViT-256", "levit_256", params="18.9", gpu="6,557", cpu="23.5"),
    PaperRow(4, "Armour-256", "levit_256", "concat-half", "17.9", "-5.3%", "", "6,675", "+1.8%", "24.8", "+5.5%"),
    PaperRow(4, "Armour-256+", "levit_256", "concat-full", "17.0", "-10.1%", "", "6,817", "+4.0%", "25.6", "+8.9%"),
    PaperRow(4, "LeViT-384", "levit_384", params="39.1", gpu="4,136", cpu="12.1"),
    PaperRow(4, "Armour-384", "levit_384", "concat-half", "37.1", "-5.1%", "", "4,226", "+2.2%", "12.5", "+3.3%"),
    PaperRow(4, "Armour-384+", "levit_384", "concat-full", "35.0", "-10.5%", "", "4,314", "+4.3%", "13.0", "+7.4%"),
)

# The shipped recipe that trains a row of Tables 1 and 2 as the paper did, by the row's name.
RECIPES = {
    "Q=K": "deit_tiny_qk_300ep",
    "Q=K diag": "deit_tiny_qk_diag_300ep",
    "K=V": "deit_tiny_kv_300ep",
    "Armour-Ti": "deit_tiny_qv_300ep",
    "DeiT-Ti": "deit_tiny_300ep",
    "DeiT-Ti dist": "deit_tiny_distilled_300ep",
    "Armour-Ti dist": "deit_tiny_distilled_qv_300ep",
    "Armour-Ti dist / 1200": "deit_tiny_distilled_qv_1200ep",
    "LeViT-128S": "levit_128s_500ep",
    "Armour-128S": "levit_128s_concat_half_500ep",
    "Armour-128S+": "levit_128s_concat_full_500ep",
}
