"""What a measured fidelity says about accuracy: the digits ViT converted in many ways, near and far.

    python benchmarks/fidelity_grades.py

Fidelity is measured on 256 training images that nothing was fitted to, accuracy on the 500 test images. The bounds of
`report.wording.GRADES` come from this table; it takes about three minutes on two cores.
"""

from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from armour_surgery import convert, hosts
from armour_surgery.demo.digits_vit import accuracy, digits_source, load_digits_vit
from armour_surgery.images.digits import digits_split
from armour_surgery.measure.fidelity import compare_outputs
from armour_surgery.report.wording import GRADES, grade_of

RESULTS = Path(__file__).with_name("results") / "fidelity_grades.md"
# Every way to choose weights, with all channels and with fewer and fewer.
WAYS = product(("qv", "kv"), ("wq-refit", "joint-svd", "calibrated"), (None, 24, 16, 8, 4))


def _features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    return hosts.features(model, {"x": images})


def main() -> None:
    """Convert, measure, and write the table."""
    original = load_digits_vit()
    train_images, _, images, labels = digits_split()
    fitted, held_out = train_images[:512].split(64), train_images[-256:].split(64)
    before = accuracy(original, images, labels)
    with torch.no_grad():
        answers = [_features(original, batch) for batch in held_out]
    rows = []
    for mode, init, rank in WAYS:
        model = partial(convert, original, mode, init=init, rank=rank, source=digits_source())
        converted = model(calibration=fitted) if init == "calibrated" else model()
        near = compare_outputs(answers, converted, held_out, _features, "digits")
        lost = before - accuracy(converted, images, labels)
        grade = GRADES.index(grade_of(near)) + 1
        rows.append((near.cosine, f"{near.agreement:.1f} %", f"{lost:.1f}", grade, mode, init, rank or "all"))
    lines = [
        "`python benchmarks/fidelity_grades.py`",
        "",
        f"The digits ViT, {before:.1f} % right; cosine and equal first choices on 256 held-out images, points of "
        "accuracy lost on the 500 test images, and the grade of `report/wording.py`, 1 being the best.",
        "",
        "| cosine | same first choice | points lost | grade | mode | init | rank |",
        "|---:|---:|---:|---:|---|---|---:|",
    ]
    for cosine, *cells in sorted(rows, key=lambda row: -row[0]):
        lines.append(f"| {cosine:.4f} | {' | '.join(map(str, cells))} |")
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
