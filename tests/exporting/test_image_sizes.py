"""Graphs take the image sizes that the model takes, or say that they take its own alone."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from small_models import vit
from torch import Tensor, nn

from armour_surgery import convert, export
from armour_surgery.measure.difference import largest_difference
from armour_surgery.notes import ArmourWarning

ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
SIZES = ((32, 32), (40, 24), (56, 56))


class Resizing(nn.Module):
    """Its positions are left alone at the size that they were made for, and resized at others."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.positions = nn.Parameter(torch.randn(1, 48, 4, 4))
        self.attention = vit(depth=1).blocks[0].attn

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x)
        positions = self.positions
        if tokens.shape[2:] != positions.shape[2:]:
            positions = nn.functional.interpolate(positions, size=tokens.shape[2:], mode="bilinear")
        out: Tensor = self.attention((tokens + positions).flatten(2).transpose(1, 2))
        return out


class Doubling(Resizing):
    """At its own size it does something that no other size is like."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.shape[2] == 32 else 1)


def dinov2() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=32, patch_size=8)).eval()


HOSTS = {
    "timm": lambda: convert(vit(dynamic_img_size=True, depth=1), "qv"),
    "transformers": lambda: convert(dinov2(), "qv"),
    "own": lambda: convert(Resizing().eval(), "qv", example_input=(2, 3, 32, 32)),
}


def answer(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(images)
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found


def differences(model: nn.Module, file: Path) -> list[float]:
    """How far ONNX Runtime is from the model, at every size."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = [one.name for one in session.get_inputs()]
    found = []
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        output = session.run(None, {name: images.numpy()})[0]
        found.append(largest_difference([answer(model, images)], [torch.from_numpy(output)]))
    return found


@pytest.mark.parametrize("name", HOSTS)
def test_a_graph_takes_the_sizes_that_the_model_takes(name: str, tmp_path: Path) -> None:
    model = HOSTS[name]()
    export(model, tmp_path / "any.onnx", format="onnx")
    assert max(differences(model, tmp_path / "any.onnx")) < 1e-4


@pytest.mark.parametrize("format", ENDINGS)
def test_what_no_graph_does_for_any_size_is_written_for_one(format: str, tmp_path: Path) -> None:
    model = convert(Doubling().eval(), "qv", example_input=(2, 3, 32, 32))
    file = tmp_path / f"one{ENDINGS[format]}"
    with pytest.warns(ArmourWarning, match=f"the {format} file takes images of the model's own size alone") as told:
        done = export(model, file, format=format)
    assert "when it was written for any size, the " in str(told[0].message)
    assert told[0].filename == __file__
    assert done.max_relative_error < 1e-4
    assert {path.suffix for path in tmp_path.iterdir()} == {file.suffix} | ({".bin"} if format == "openvino" else set())


def test_transformers_own_sizes_in_torch_export(tmp_path: Path) -> None:
    """torch keeps the question that the host asks of the size, and its answer."""
    model = HOSTS["transformers"]()
    with pytest.warns(ArmourWarning, match="own size alone"):
        export(model, tmp_path / "one.pt2", format="pt2")
    images = torch.randn(2, 3, 32, 32)
    loaded = torch.export.load(tmp_path / "one.pt2").module()
    assert torch.equal(loaded(pixel_values=images)[0], answer(model, images))
