"""`--img-size` of transformers' models: their own interpolation, done while they run or once beforehand."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from saved_models import HF
from torch import nn

from armour_surgery import convert, load, save
from armour_surgery.errors import CheckpointError, UsageError
from armour_surgery.hosts import example_input, load_model
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.notes import ArmourWarning

ASKED = {"interpolate_pos_encoding": True}
# Class, config, and what its own forward has to be told.
RESAMPLED: dict[str, tuple[Any, Any]] = {
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(**HF, num_labels=5)),
    "vit-body": (transformers.ViTModel, transformers.ViTConfig(**HF)),
    "deit": (transformers.DeiTForImageClassification, transformers.DeiTConfig(**HF)),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**HF)),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**HF)),
}
BY_ITSELF: dict[str, tuple[Any, Any]] = {
    "dinov2": (transformers.Dinov2ForImageClassification, transformers.Dinov2Config(**HF, num_labels=5)),
    "dinov2-registers": (transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig(**HF)),
    "beit": (transformers.BeitForImageClassification, transformers.BeitConfig(**HF)),
}


def saved(kind: Any, config: Any, folder: Path) -> nn.Module:
    model: nn.Module = kind(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def loaded(name: str, **options: Any) -> tuple[nn.Module, Any, list[str]]:
    """The model, its source, and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, source = load_model(name, **options)
    assert {warning.category for warning in caught} <= {ArmourWarning}
    return model, source, [str(warning.message) for warning in caught]


def answer(model: nn.Module, images: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        given = model(images, **options)
    found: torch.Tensor = given[0] if getattr(given, "logits", None) is None else given.logits
    return found


@pytest.mark.parametrize("size", [64, 24])
@pytest.mark.parametrize("name", RESAMPLED)
def test_positions_are_resampled_as_the_model_itself_does_it(name: str, size: int, tmp_path: Path) -> None:
    host = saved(*RESAMPLED[name], tmp_path / "hf")
    model, source, (said,) = loaded(f"hf:{tmp_path / 'hf'}", img_size=size)
    assert "are for images of 32 x 32 pixels: resampled " in said
    assert said.endswith(f"for {size} x {size}")
    images = torch.randn(2, 3, size, size)
    assert torch.equal(answer(model, images), answer(host, images, **ASKED))
    assert preprocessing(model).size == (3, size, size)
    assert example_input(load(save(convert(model, source=source), tmp_path / "out")))["pixel_values"].shape[-1] == size


@pytest.mark.parametrize("name", BY_ITSELF)
def test_where_the_model_interpolates_by_itself_the_size_is_that_of_its_images(name: str, tmp_path: Path) -> None:
    host = saved(*BY_ITSELF[name], tmp_path / "hf")
    model, source, said = loaded(f"hf:{tmp_path / 'hf'}", img_size=64)
    assert said == []
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(answer(model, images), answer(host, images))
    # Nothing was interpolated for good: another size is interpolated from what was trained.
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(answer(model, images), answer(host, images))
    for again in (model, load(save(convert(model, source=source), tmp_path / "out"))):
        assert preprocessing(again).size == (3, 64, 64)
        assert example_input(again, 3)["pixel_values"].shape == (3, 3, 64, 64)


def test_a_checkpoint_is_for_images_of_its_own_size(tmp_path: Path) -> None:
    kind, config = RESAMPLED["vit"]
    saved(kind, config, tmp_path / "hf")
    trained = kind(transformers.ViTConfig(**{**HF, "image_size": 48}, num_labels=5)).eval()
    torch.save({f"net.{key}": value for key, value in trained.state_dict().items()}, tmp_path / "w.pth")
    for size, hint in ((None, "; --img-size builds the model for another size"), (64, "")):
        model, _, (prefix, said) = loaded(f"hf:{tmp_path / 'hf'}", checkpoint=tmp_path / "w.pth", img_size=size)
        assert "took the prefix 'net.' off" in prefix
        resampled = "is for images of 48 x 48 pixels: resampled vit.embeddings.position_embeddings for "
        assert said.removeprefix(f"checkpoint {tmp_path / 'w.pth'} ") == f"{resampled}{size or 32} x {size or 32}{hint}"
        images = torch.randn(2, 3, size or 32, size or 32)
        assert torch.equal(answer(model, images), answer(trained, images, **ASKED))
    model, _, said_of_it = loaded(f"hf:{tmp_path / 'hf'}", checkpoint=tmp_path / "w.pth", img_size=48)
    assert len(said_of_it) == 1
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(answer(model, images), answer(trained, images))


def test_a_new_head_does_not_stand_in_the_way(tmp_path: Path) -> None:
    host = saved(*RESAMPLED["vit"], tmp_path / "hf")
    model, _, (said,) = loaded(f"hf:{tmp_path / 'hf'}", img_size=64, num_classes=3)
    assert "resampled" in said
    images = torch.randn(2, 3, 64, 64)
    assert answer(model, images).shape == (2, 3)
    assert torch.equal(answer(model.vit, images), answer(host.vit, images, **ASKED))  # type: ignore[arg-type]


def test_tables_that_nobody_interpolates_are_refused(tmp_path: Path) -> None:
    """Positions of a host with no interpolation of its own, and a table that is no square."""
    mae = transformers.ViTMAEConfig(**HF, decoder_hidden_size=16, decoder_num_attention_heads=2,
                                    decoder_num_hidden_layers=1, decoder_intermediate_size=16)  # fmt: skip
    saved(transformers.ViTMAEForPreTraining, mae, tmp_path / "mae")
    with pytest.raises(UsageError, match=r"do not fit img_size=64 .*--no-pretrained"):
        load_model(f"hf:{tmp_path / 'mae'}", img_size=64)
    kind, config = RESAMPLED["vit"]
    model = saved(kind, config, tmp_path / "vit")
    weights = model.state_dict()
    key = "vit.embeddings.position_embeddings"
    weights[key] = torch.zeros(1, 14, HF["hidden_size"])
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"wrong shape {key} \(1, 14, 48\)"):
        load_model(f"hf:{tmp_path / 'vit'}", checkpoint=tmp_path / "w.pth")
