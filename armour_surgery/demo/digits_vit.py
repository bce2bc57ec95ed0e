"""What `armour-surgery demo` works on: a small trained Vision Transformer and the digits it was trained for.

Everything is on this machine: the weights are a file of this package (made by `demo/train_digits.py`), the
images come inside scikit-learn's wheel.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from armour_surgery.errors import ArmourError
from armour_surgery.records import Source

__all__ = ["accuracy", "digits_source", "digits_split", "load_digits_vit"]

WEIGHTS = Path(__file__).with_name("digits_vit.safetensors")
RECORD = WEIGHTS.with_suffix(".json")

TEST_IMAGES = 500
SPLIT_SEED = 0


def digits_source() -> Source:
    """How the demo's model is built, under the name by which its converted forms find it again."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return Source("timm", record["architecture"], record["arguments"], name="digits_vit")


def load_digits_vit() -> nn.Module:
    """The demo's model: a trained timm VisionTransformer for `[B, 1, 8, 8]` digits, float32, in eval mode."""
    from armour_surgery.hosts import build

    model = build(digits_source())
    weights = {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


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


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The percentage of images `x` for which the model's first choice is `y`, measured in eval mode."""
    was_training = model.training
    model.eval()
    correct = int((model(x).argmax(dim=-1) == y).sum())
    model.train(was_training)
    return 100 * correct / len(y)


def _images(pixels: object) -> Tensor:
    """Rows of 64 gray values from 0 to 16 as images in [-1, 1]."""
    return torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
