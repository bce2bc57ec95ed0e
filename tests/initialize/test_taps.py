"""Products with a weight are seen whatever runs them, inside torch's own attention too."""

import pytest
import torch
from oracle import randomize
from torch import nn

from armour_surgery import convert


class Pictures(nn.Module):
    """A ViT of torch's own layers, which project in functions and not in modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 8, 8)
        self.layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.stem(x).flatten(2).mT).mean(1))


@pytest.mark.parametrize("steps", [0, 2])
def test_calibration_sees_inside_torchs_attention(steps: int) -> None:
    model, images = randomize(Pictures()).eval(), torch.randn(32, 3, 32, 32)
    calibrated = convert(
        model,
        "qv",
        init="calibrated",
        calibration=images.split(8),
        reconstruct=steps,
        example_input=(2, 3, 32, 32),
    )
    started = convert(model, "qv", example_input=(2, 3, 32, 32))
    with torch.no_grad():
        expected, got, worse = model(images), calibrated(images), started(images)
    assert (got - expected).norm() < 0.8 * (worse - expected).norm()
