"""scikit-learn's handwritten digits, always split the same way."""

import torch
from torch import Tensor

from armour_surgery.errors import ArmourError

__all__ = ["digits_split"]

TEST_IMAGES = 500
SPLIT_SEED = 0


def digits_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits, always split the same way: 1,297 to train on and 500 to test on, stratified.

    Returns `(train_x, train_y, test_x, test_y)`: images are float32 `[n, 1, 8, 8]` in [-1, 1], labels int64.

    Raises:
        ArmourError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ArmourError(
            'the digits come with scikit-learn, which is not installed; run: pip install "armour-surgery[demo]"'
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, labels, test_size=TEST_IMAGES, stratify=labels, random_state=SPLIT_SEED
    )
    return _images(train_x), torch.as_tensor(train_y).long(), _images(test_x), torch.as_tensor(test_y).long()


def _images(pixels: object) -> Tensor:
    """Rows of 64 gray values from 0 to 16 as images in [-1, 1]."""
    return torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
