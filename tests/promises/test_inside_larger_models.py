"""A vision tower inside of a model that takes words too converts in place, and the rest stays what it is."""

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import merge, outputs, randomize, relative_error
from torch import nn

from armour_surgery import convert, inspect, load, save
from armour_surgery.calls import run
from armour_surgery.hosts import example_input

IMAGE_TOKEN = 3
TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "attention_dropout": 0.2,
}


def llava(attention: str = "sdpa") -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    config._attn_implementation = attention
    return _made(transformers.LlavaForConditionalGeneration(config))


def qwen() -> nn.Module:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 24, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    return _made(transformers.Qwen2VLForConditionalGeneration(config))


def _made(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomize(model).double().eval()


def of_llava(images: int) -> dict[str, torch.Tensor]:
    """What its processor gives: four places for each image, and words."""
    generator = torch.Generator().manual_seed(images)
    words = torch.tensor([[5, *[IMAGE_TOKEN] * 4, 7, 8]] * images)
    pixels = torch.randn(images, 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "pixel_values": pixels}


def of_qwen(*grids: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Images of several sizes in one text, packed; every four patches take the place of a word."""
    patches = sum(rows * columns for rows, columns in grids)
    words = [5]
    for rows, columns in grids:
        words += [IMAGE_TOKEN] * (rows * columns // 4) + [7]
    generator = torch.Generator().manual_seed(patches)
    ids = torch.tensor([words])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, *grid] for grid in grids]),
    }


def check_exact(model: nn.Module, batches: list[dict[str, Any]]) -> nn.Module:
    """Converted as by default, where K's partner is equal already, the whole model computes what it did."""
    merged = merge(model, "qv", example_input(model))
    converted = convert(model)
    assert [site.fqn for site in converted.surgery.sites] == merged
    for training in (False, True):
        model.train(training)
        converted.train(training)
        for batch in batches:
            with torch.no_grad():
                assert relative_error(_numbers(model, batch), _numbers(converted, batch)) <= 1e-9
    return converted.eval()


def _numbers(model: nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    return [tensor for tensor in outputs(model, {**batch, "use_cache": False}) if tensor.is_floating_point()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_tower_converts_in_place_and_the_whole_model_computes_what_it_did(attention: str) -> None:
    converted = check_exact(llava(attention), [of_llava(1), of_llava(3)])
    assert all(site.fqn.startswith("model.vision_tower.") for site in converted.surgery.sites)
    assert converted.surgery.macs_after < converted.surgery.macs_before
    assert all(site.macs_after < site.macs_before for site in converted.surgery.sites)


def test_images_of_several_sizes_in_one_sequence() -> None:
    model = qwen()
    # It is shown two images of one size; here come one, and three that differ.
    check_exact(model, [of_qwen((4, 4)), of_qwen((4, 6), (2, 4), (6, 4))])


def test_it_is_saved_and_loaded_with_the_whole(tmp_path: Path) -> None:
    converted = convert(qwen().float())
    save(converted, tmp_path / "out")
    batch = {**of_qwen((4, 6), (2, 4)), "use_cache": False}
    batch["pixel_values"] = batch["pixel_values"].float()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(**batch).logits, converted(**batch).logits)


@pytest.mark.parametrize("init", ["joint-svd", "wq-refit"])
def test_weights_are_chosen_for_a_tower_that_looks_at_numbers(init: str) -> None:
    converted = convert(qwen(), init=init)
    assert all(site.residual > 0 for site in converted.surgery.sites)


def test_what_a_processor_gives_is_run_and_auto_leaves_the_text_model_alone() -> None:
    given = UserDict({**of_llava(1), "use_cache": False})
    model = llava()
    assert {site.fqn.split(".")[1] for site in inspect(model, example_input=given)} == {
        "vision_tower",
        "language_model",
    }
    converted = convert(model, example_input=given)
    assert {site.fqn.split(".")[1] for site in converted.surgery.sites} == {"vision_tower"}
    (left,) = converted.surgery.refused
    assert left.reason.endswith("include='model.language_model'")
    asked = convert(model, example_input=given, include="model.language_model")
    assert [site.fqn for site in asked.surgery.sites] == [left.fqn]


def test_its_example_is_saved_with_it(tmp_path: Path) -> None:
    converted = convert(llava(), example_input=of_llava(2))
    save(converted, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.surgery == converted.surgery
    with torch.no_grad():
        assert run(loaded, of_llava(3)).logits.shape == (3, 7, 40)


def test_a_part_can_be_named_in_an_example() -> None:
    sites = inspect(llava(), example_input={"model.vision_tower:pixel_values": of_llava(2)["pixel_values"]})
    assert [site.fqn for site in sites] == [f"model.vision_tower.encoder.layers.{index}.self_attn" for index in (0, 1)]
