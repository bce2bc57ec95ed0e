"""What `armour-surgery demo` works on: a small trained Vision Transformer and the digits it was trained for.

Everything is on this machine: the weights are a file of this package (made by `demo/train_digits.py`), the
images come inside scikit-learn's wheel.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from armour_surgery.records import Source

__all__ = ["accuracy", "digits_source", "load_digits_vit"]

WEIGHTS = Path(__file__).with_name("digits_vit.safetensors")
RECORD = WEIGHTS.with_suffix(".json")


def digits_source() -> Source:
    """How the demo's model is built, under the name by which its converted forms find it again."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return Source("timm", record["architecture"], record["arguments"], name="digits_vit")


def load_digits_vit() -> nn.Module:
    """The demo's model: a trained timm VisionTransformer for `[B, 1, 8, 8]` digits, float32, in eval mode."""
    from armour_surgery.hosts import build

    model = build(digits_source())
    # The file holds float16, to keep the package small; the CPU is made for float32.
    weights = {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The percentage of images `x` for which the model's first choice is `y`, measured in eval mode."""
    was_training = model.training
    model.eval()
    correct = int((model(x).argmax(dim=-1) == y).sum())
    model.train(was_training)
    return 100 * correct / len(y)
