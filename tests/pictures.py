"""Pictures that can be told apart after any preprocessing, in memory and in folders."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from armour_surgery.hosts.preprocessing import Preprocessing
from armour_surgery.images.for_calibration import calibration_batches
from armour_surgery.images.sources import Pictures, Stream

__all__ = ["PREP", "SIZE", "collect", "level", "numbered", "photos", "picture", "stream"]

PREP = Preprocessing((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bilinear", 1.0)


def collect(source: Any, images: int = 8, *, prep: Preprocessing = PREP, **options: Any) -> torch.Tensor:
    return torch.cat(list(calibration_batches(source, prep, images=images, **options)))


def picture(number: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """Noise over a level of its own, by which it can be told from the others."""
    noise = np.random.default_rng(number).integers(0, 9, (size[1], size[0], 3)) + 12 * number
    return Image.fromarray(noise.astype(np.uint8)).convert(mode)


def level(image: torch.Tensor) -> int:
    """The number of the picture that became this input."""
    mean, std = torch.tensor(PREP.mean).reshape(3, 1, 1), torch.tensor(PREP.std).reshape(3, 1, 1)
    return int(((image * std + mean).mean() * 255 / 12).floor())


def photos(folder: Path, count: int, name: str = "{}.png") -> Path:
    for number in range(count):
        path = folder / name.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return folder


SIZE = (3, 12, 10)


def numbered(count: int) -> Pictures:
    """Picture i is 4 x 4 pixels of value i."""
    return Pictures(
        "numbers", count, lambda i: (Image.fromarray(np.full((4, 4), i, np.uint8)), i % 3), lambda i: f"number {i}"
    )


def stream(count: int | None = 10) -> Stream:
    def epoch(number: int) -> "object":
        return iter([(numbered(256).read((10 * number + i) % 256)[0], i % 3) for i in range(10)])

    return Stream("wds/some", count, epoch)  # type: ignore[arg-type]
