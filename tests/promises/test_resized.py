"""What a host's forward reads off its module may be set to something else after the conversion."""

from typing import Any

import pytest
import timm
import torch
from before_and_after import close
from oracle import merge, outputs, randomize
from torch import nn

from armour_surgery.hosts import example_input
from armour_surgery.surgery.conversion import convert

SWIN: dict[str, Any] = {"window_size": 4, "depths": (1, 2), "num_heads": (1, 2)}
RELPOS: dict[str, Any] = {"depth": 2, "num_heads": 2}
WINDOWS = [
    {"img_size": (96, 96), "window_size": (6, 6)},
    {"img_size": (64, 96), "window_size": (4, 3)},
    {"img_size": (64, 64), "window_size": (4, 4)},
]


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # of timm's resizing
@pytest.mark.parametrize(
    ("name", "built", "resized"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, WINDOWS),
        ("swinv2_tiny_window8_256", SWIN, WINDOWS),
        ("swinv2_cr_tiny_224", SWIN, WINDOWS),
        (
            "vit_relpos_small_patch16_224",
            {"depth": 2, "num_heads": 2},
            [{"img_size": (96, 96)}, {"img_size": (64, 96)}],
        ),
    ],
)
def test_a_converted_model_may_be_resized(name: str, built: dict[str, Any], resized: list[dict[str, Any]]) -> None:
    """Windows and tables of positions change with it, in the original as in the model converted before."""
    model = randomize(timm.create_model(name, img_size=64, embed_dim=16, num_classes=3, **built).eval().double())
    merge(model, "qv", example_input(model))
    converted = convert(model, "qv")
    generator = torch.Generator().manual_seed(8)
    for size in resized:
        for one in (model, converted):
            one.set_input_size(**size)
        x = torch.randn(2, 3, *size["img_size"], dtype=torch.float64, generator=generator)
        for training in (False, True):
            with torch.no_grad():
                expected = outputs(model.train(training), {"x": x}, seed=3)
                close(expected, outputs(converted.train(training), {"x": x}, seed=3))


def test_whole_numbers_that_a_forward_reads_may_change() -> None:
    """They steer Python and leave no trace in what is computed: each value has a branch of its own."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))
            self.steps, self.window = 2, (4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (layer(x).unflatten(-1, (3, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            logits = q @ k.transpose(-2, -1) / self.window[0]
            for _ in range(self.steps):
                logits = logits * 1.5
            return self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2) + self.window[1])

    model = nn.Sequential(Scaled(), nn.LayerNorm(24)).double().eval()
    model[0].v.load_state_dict(model[0].q.state_dict())
    converted = convert(model, "qv", example_input={"input": torch.empty(2, 5, 24, dtype=torch.float64)})
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    seen = []
    for steps, window in ((2, (4, 3)), (1, (4, 3)), (1, (2, 5)), (2, (4, 3))):
        for one in (model, converted):
            one[0].steps, one[0].window = steps, window
        with torch.no_grad():
            close([model(x)], [converted(x)])
            seen.append(converted(x))
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[1], seen[2])
