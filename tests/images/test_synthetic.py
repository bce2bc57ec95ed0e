"""Drawn images have any size, depend on their seed and number alone, and are varied."""

from typing import Any

import pytest
import torch
from pictures import PREP

from armour_surgery.errors import CalibrationError
from armour_surgery.images.for_calibration import calibration_batches
from armour_surgery.images.synthetic import synthetic_images


@pytest.mark.parametrize("size", [(3, 48, 48), (1, 32, 32), (3, 8, 8), (5, 17, 40), (2, 1, 7), (1, 1, 1)])
def test_synthetic_images_have_any_size(size: tuple[int, int, int]) -> None:
    images = list(synthetic_images(12, size))
    assert len(images) == 12
    for image in images:
        assert (tuple(image.shape), image.dtype) == (size, torch.float32)
        assert 0 <= image.min() <= image.max() <= 1
        assert size == (1, 1, 1) or image.std() > 0.01


def test_a_synthetic_image_depends_on_seed_number_and_size_alone() -> None:
    before = torch.get_rng_state()
    whole = list(synthetic_images(5, (3, 24, 24), seed=3))
    assert torch.equal(torch.stack(list(synthetic_images(2, (3, 24, 24), 3, start=3))), torch.stack(whole[3:]))
    assert not torch.equal(next(synthetic_images(1, (3, 24, 24), seed=4)), whole[0])
    assert len({float(image.sum()) for image in whole}) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_synthetic_images_are_varied_and_balanced() -> None:
    images = torch.stack(list(synthetic_images(60, (3, 32, 32))))
    means = images.mean((2, 3))
    assert ((means.mean(0) - 0.48).abs() < 0.08).all()
    assert means.std(0).min() > 0.1
    saturation = (images.amax(1) - images.amin(1)).mean((1, 2))
    assert saturation.min() < 0.1 < 0.3 < saturation.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "not -1, 0 and 0"),
        ({"count": 1, "seed": -2}, "not 1, 0 and -2"),
        ({"count": 1, "size": (3, 0, 4)}, r"size \(3, 0, 4\): pass \(channels"),
    ],
)
def test_synthetic_images_of_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        synthetic_images(**arguments)


def test_synthetic_source_is_normalized() -> None:
    expected = torch.stack([PREP.normalize(image) for image in synthetic_images(5, PREP.size, seed=9)])
    batches = calibration_batches("synthetic", PREP, images=5, batch_size=2, seed=9)
    assert torch.equal(torch.cat(list(batches)), expected)
    assert batches.images == 5
