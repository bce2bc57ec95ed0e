"""Images reach a model as its own preprocessing says, whatever kind of picture they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from pictures import PREP, collect, picture
from PIL import Image

from armour_surgery.errors import CalibrationError, ExampleInputError
from armour_surgery.hosts import example_input
from armour_surgery.hosts.preprocessing import Preprocessing, preprocessing

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
}


def hf(name: str, **changes: Any) -> torch.nn.Module:
    model: Any = getattr(transformers, f"{name}Model")
    return model(getattr(transformers, f"{name}Config")(**{**VIT, **changes}))


def on_meta(name: str, **options: Any) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = torchvision.models.get_model(name, **options)
    return model


HALF, IMAGENET = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[Any, ...]]] = {
    "timm": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=1),
        ((3, 224, 224), HALF, "bicubic", 0.9, "center"),
    ),
    "timm-gray": (
        lambda: timm.create_model("deit_tiny_patch16_224", depth=1, in_chans=1, img_size=(96, 64)),
        ((1, 96, 64), (0.449,), "bicubic", 0.9, "center"),
    ),
    "hf-vit": (lambda: hf("ViT"), ((3, 32, 32), HALF, "bilinear", 1.0, "squash")),
    "hf-deit": (lambda: hf("DeiT"), ((3, 32, 32), HALF, "bicubic", 0.875, "squash")),
    "hf-levit": (
        lambda: transformers.LevitModel(transformers.LevitConfig(image_size=64)),
        ((3, 64, 64), IMAGENET, "bicubic", 0.875, "center"),
    ),
    "hf-clip-vision": (
        lambda: hf("CLIPVision"),
        ((3, 32, 32), (0.48145466, 0.4578275, 0.40821073), "bicubic", 1.0, "center"),
    ),
    "hf-mobilevit": (
        lambda: transformers.MobileViTModel(transformers.MobileViTConfig()),
        ((3, 256, 256), (0.0, 0.0, 0.0), "bicubic", 1.0, "center"),
    ),
    "hf-timm": (
        lambda: transformers.AutoModel.from_config(
            transformers.TimmWrapperConfig(architecture="deit_tiny_patch16_224", model_args={"depth": 1})
        ),
        ((3, 224, 224), IMAGENET, "bicubic", 0.9, "center"),
    ),
    "torchvision": (
        lambda: on_meta("vit_b_16", image_size=64),
        ((3, 64, 64), IMAGENET, "bilinear", 0.875, "center"),
    ),
    "torchvision-large": (
        lambda: on_meta("vit_h_14", image_size=518),
        ((3, 518, 518), IMAGENET, "bicubic", 1.0, "center"),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_preprocessing_is_that_of_the_model(name: str) -> None:
    make, (size, mean, interpolation, crop_pct, crop_mode) = MODELS[name]
    model = make()
    prep = preprocessing(model)
    assert prep.size == size == tuple(next(iter(example_input(model).values())).shape[1:])
    assert prep.mean == pytest.approx(mean)
    assert (prep.interpolation, prep.crop_pct, prep.crop_mode) == (interpolation, pytest.approx(crop_pct), crop_mode)
    assert prep.tensor(picture(3, (40, 30))).shape == size


def test_the_file_beside_the_weights_wins(tmp_path: Path) -> None:
    hf("ViT").save_pretrained(tmp_path)
    for text in ('{"image_mean": [0.1, 0.2, 0.3], "size": 32}', "{"):
        (tmp_path / "preprocessor_config.json").write_text(text)
        prep = preprocessing(transformers.ViTModel.from_pretrained(tmp_path))
        assert prep.mean == ((0.1, 0.2, 0.3) if text != "{" else HALF)
        assert (prep.std, prep.crop_mode) == (HALF, "squash")


def test_models_of_no_library_have_the_size_of_their_example() -> None:
    model = torch.nn.Conv2d(4, 8, 3)
    with pytest.raises(ExampleInputError, match="pass example_input"):
        preprocessing(model)
    prep = preprocessing(model, {"input": torch.empty(2, 4, 8, 12, device="meta")})
    assert (prep.size, prep.mean) == ((4, 8, 12), (0.5,) * 4)
    assert collect("synthetic", 2, prep=prep).shape == (2, 4, 8, 12)
    with pytest.raises(CalibrationError, match=r"takes 4 channels.*batches \[B, 4, 8, 12\]"):
        prep.tensor(picture(0))
    assert preprocessing(model, {"input": torch.empty(2, 3, 8, 8)}).mean == IMAGENET


def test_only_images_can_calibrate() -> None:
    with pytest.raises(CalibrationError, match=r"Linear takes input \[2, 4\].*init=\"wq\""):
        preprocessing(torch.nn.Linear(4, 4), {"input": torch.empty(2, 4)})
    video = {"pixel_values": torch.empty(2, 8, 3, 16, 16)}
    with pytest.raises(CalibrationError, match=r"pixel_values \[2, 8, 3, 16, 16\]"):
        preprocessing(torch.nn.Linear(4, 4), video)


def test_tensor_is_resized_cropped_and_normalized() -> None:
    wide = Image.new("RGB", (60, 20), (0, 0, 0))
    wide.paste((255, 255, 255), (20, 0, 40, 20))
    middle = PREP.tensor(wide)
    assert torch.allclose(middle[..., 1:-1], PREP.normalize(torch.ones(3, 16, 14)))
    squash = Preprocessing((3, 16, 16), PREP.mean, PREP.std, "bilinear", 1.0, "squash").tensor(wide)
    assert squash[0, 8, 0] < 0 < squash[0, 8, 8]
    assert Preprocessing((1, 8, 20), (0.5,), (0.5,)).tensor(wide).shape == (1, 8, 20)
    many = PREP.normalize(torch.full((2, 3, 4, 4), 0.5))
    assert torch.allclose(many[1, :, 0, 0], torch.tensor((0.0, 0.5, 1.0)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "P-clear", "1", "CMYK", "LA", "I;16", "I", "F"])
def test_every_kind_of_picture_is_converted(mode: str, channels: int, tmp_path: Path) -> None:
    prep = Preprocessing((channels, 16, 16), (0.0,) * channels, (1.0,) * channels, "bilinear", 1.0)
    gray = np.full((16, 16), 200, dtype=np.uint8)
    gray[:8] = 100
    path = tmp_path / ("a.tif" if mode in ("CMYK", "F", "I") else "a.png")
    if mode == "I;16":
        Image.fromarray(gray.astype(np.uint16) * 257).save(path)
    elif mode == "F":
        Image.fromarray(gray.astype(np.float32) / 255).save(path)
    elif mode == "P-clear":
        Image.fromarray(gray).convert("P").save(path, transparency=bytes([255] * 100 + [0]))
    else:
        Image.fromarray(gray).convert(mode).save(path)
    image = collect(tmp_path, 1, prep=prep)
    assert image.shape == (1, channels, 16, 16)
    if mode != "1":
        assert torch.allclose(image[..., :7, :], torch.tensor(100 / 255), atol=0.01)
        assert torch.allclose(image[..., 9:, :], torch.tensor(200 / 255), atol=0.01)
