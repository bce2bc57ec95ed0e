"""What a converted DINOv2's features are good for, at 112 pixels: k-nearest-neighbor classification of Fashion-MNIST.

    python benchmarks/retrieval.py --dinov2 dinov2.safetensors --photos photos

All blocks of DINOv2-S/14 go to `qv`, without labels: calibrated on photos, on photos and unlabelled Fashion-MNIST
images that are in no gallery, and on photos with steps by gradient after it. Cosine to the original's features on other
photos; top-1 of test images whose neighbors are training images, 28 pixels enlarged to 112: queries of the converted
model against the original's gallery, and against its own. The files are those of calibrated_conversion.py.
"""

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from calibrated_conversion import Method, Task, command, count_files, crops, heading, made, ours, row, say, table, write
from dinov2_weights import timm_model
from fashion_mnist import DATA, read_split
from feature_quality import at_size, cosines, final_tokens, gallery_of, gray_batches, knn_accuracy
from torch import Tensor, nn

from armour_surgery import convert
from armour_surgery.benchmarking.environment import environment
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.initialize import HELD_OUT

PIXELS = 112
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, required=True, help="weights that dinov2_weights.py wrote")
    parser.add_argument("--photos", type=Path, required=True, help="folder that photos.py wrote")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of Fashion-MNIST's .gz files")
    parser.add_argument("--images", type=int, default=384, help="photos to calibrate with (%(default)s)")
    parser.add_argument("--gray", type=int, default=256, help="Fashion-MNIST images beside them (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of --reconstruct (%(default)s)")
    parser.add_argument("--test-crops", type=int, default=128, help="crops of test photos (%(default)s)")
    parser.add_argument("--gallery", type=int, default=1000, help="training images in galleries (%(default)s)")
    parser.add_argument("--queries", type=int, default=2000, help="test images as queries (%(default)s)")
    parser.add_argument("--only", help="only methods whose name has this in it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/retrieval.json"))
    options = parser.parse_args()

    loaded = timm_model(options.dinov2)
    prep = replace(preprocessing(loaded), size=(3, PIXELS, PIXELS))
    model = at_size(loaded, PIXELS)
    training, test = read_split(options.data, "train"), read_split(options.data, "test")

    def gray(images: Tensor) -> Iterable[Tensor]:
        return gray_batches(images, PIXELS, prep.mean, prep.std, BATCH)

    def tokens(one: nn.Module, images: tuple[Tensor, Tensor], count: int) -> Any:
        return gallery_of(one, gray(images[0][:count]), images[1][:count], "x")

    photos = crops(options.photos / "calib", prep, options.images)
    beside = list(gray(training[0][options.gallery : options.gallery + options.gray]))
    both = "photos and Fashion-MNIST"
    task = Task(model, "qv", "x", {"photos": photos, both: mixed(photos, beside)})
    stepped = Method(
        f"calibrated, reconstruct {options.steps}",
        lambda task: reconstructed(task, options),
        "photos",
    )
    pictures = crops(options.photos / "test", prep, options.test_crops)
    wanted = final_tokens(model, pictures, "x")
    gallery, queries = tokens(model, training, options.gallery), tokens(model, test, options.queries)
    own = knn_accuracy(queries, gallery)
    rows = [row("original", model, class_cosine=1.0, patch_cosine=1.0, knn=own, knn_own=own)]
    say(f"original: {own:.4f}")
    methods = [ours("calibrated", "photos"), ours("calibrated", both), stepped]
    for method, small, seconds in made(task, methods, options.only):
        near = cosines(wanted, final_tokens(small, pictures, "x"))
        queries = tokens(small, test, options.queries)
        against = knn_accuracy(queries, gallery)
        within = knn_accuracy(queries, tokens(small, training, options.gallery))
        say(f"class {near[0]:.4f}, patch {near[1]:.4f}, kNN {against:.4f}, own gallery {within:.4f}")
        measured = {"class_cosine": near[0], "patch_cosine": near[1], "knn": against, "knn_own": within}
        rows.append(row(method, small, seconds=seconds, **measured))
    record = {"command": command(None), "environment": environment().to_dict(), "rows": rows}
    told = (
        f"DINOv2-S/14 at {PIXELS} pixels, all blocks `qv`, calibrated on {options.images} crops of "
        f"{count_files(options.photos / 'calib')} photos (and {options.gray} Fashion-MNIST images); cosine on "
        f"{options.test_crops} crops of other photos; kNN: {options.queries} queries, {options.gallery} in the gallery."
    )
    columns = {"class_cosine": "class cosine", "patch_cosine": "patch cosine", "knn": "kNN, original's gallery"}
    lines = [*heading(record), "", told, "", *table(rows, {**columns, "knn_own": "kNN, own gallery"})]
    write(record, "\n".join(lines) + "\n", options.out)


def reconstructed(task: Task, options: argparse.Namespace) -> nn.Module:
    """From the folder itself, so that every step sees crops that no other saw."""
    return convert(
        task.model,
        "qv",
        init="calibrated",
        calibration=str(options.photos / "calib"),
        calibration_images=options.images,
        reconstruct=options.steps,
        example_input=torch.empty(1, 3, PIXELS, PIXELS),
    ).eval()


def mixed(photos: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Batches of both kinds in turns, held-out photos and held-out others at the places of held-out batches."""
    held = photos[HELD_OUT - 1 :: HELD_OUT]
    fitted = [batch for place, batch in enumerate(photos) if place % HELD_OUT != HELD_OUT - 1]
    apart = max(1, len(others) // HELD_OUT)
    held, fitted = held + others[:apart], fitted + others[apart:]
    order = iter([fitted[place] for place in torch.randperm(len(fitted), generator=torch.Generator().manual_seed(0))])
    waiting = iter(held)
    return [
        next(itertools.chain(waiting, order) if place % HELD_OUT == HELD_OUT - 1 else itertools.chain(order, waiting))
        for place in range(len(held) + len(fitted))
    ]


if __name__ == "__main__":
    main()
