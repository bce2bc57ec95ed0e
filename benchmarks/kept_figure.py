"""README's figure: what a DINOv2 keeps of its class token, by how the shared weight is chosen.

    python benchmarks/kept_figure.py [--out FIGURE.png]

Draws what `python benchmarks/calibrated_conversion.py photos` wrote to benchmarks/results/calibrated_photos.json.
"""

import argparse
import json
from pathlib import Path

from armour_surgery.report.style import INK, MUTED, SERIES, blank_figure, save_figure, tidy

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks" / "results" / "calibrated_photos.json"
# Ways that end at the same size, by method and images; ours in a color of their own.
OTHERS = {
    ("mean of Wq and Wv", ""): "mean of Q and V",
    ("SVD per head, no whitening", ""): "SVD per head",
    ("magnitude: MLP channels, equal size", ""): "pruned MLP channels",
    ("feature PCA, all Linears of the blocks, one share of rank, equal size", "photos"): "low rank, one share",
    ("feature PCA, all Linears of the blocks, ranks by variance, equal size", "photos"): "low rank, by variance",
}
OURS = {
    ("wq", ""): "wq",
    ("joint-svd", ""): "joint-svd",
    ("calibrated", "synthetic"): "calibrated, drawn images",
    ("calibrated", "photos"): "calibrated, photos",
    ("calibrated, sites and ranks chosen", "photos"): "calibrated, chosen",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "kept.png")
    arguments = parser.parse_args()
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["models"]["timm"]
    kept = {(row["method"], row["images"]): row["class_cosine"] for row in rows}
    bars = sorted((kept[key], name, key in OURS) for key, name in {**OTHERS, **OURS}.items())
    figure = blank_figure(7.2, 3.4)
    axes = figure.add_subplot()
    tidy(axes)
    for place, (cosine, _, ours) in enumerate(bars):
        axes.barh(place, cosine, height=0.62, color=SERIES[0] if ours else MUTED)
        axes.text(cosine + 0.01, place, f"{cosine:.3f}", va="center", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(bars)), [name for _, name, _ in bars], color=INK)
    axes.set_xlim(0, 1.09)
    axes.set_xlabel("cosine of the class token to the original's; 8 % fewer parameters")
    axes.grid(visible=False, axis="y")
    print(save_figure(arguments.out, figure))


if __name__ == "__main__":
    main()
