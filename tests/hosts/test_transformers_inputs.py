"""What models of transformers are fed by default: such that each of them runs, and its attention is found."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from armour_surgery.discover.record import record
from armour_surgery.hosts import example_input
from armour_surgery.hosts.transformers import mark_config
from armour_surgery.hosts.transformers_inputs import _that_runs

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": 31, "num_key_value_heads": 3, "head_dim": 8, "pad_token_id": 2}


def weightless(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model.eval()


def siglip2() -> nn.Module:
    """It takes patches, and words besides."""
    vision = {**SMALL, "patch_size": 4, "num_patches": 16}
    text = {**SMALL, "vocab_size": 31, "max_position_embeddings": 9}
    config = transformers.Siglip2Config(vision_config=vision, text_config=text)
    torch.manual_seed(0)
    return transformers.Siglip2Model(config).eval()


def gemma4_vision() -> nn.Module:
    """It makes one of every three by three patches."""
    config = transformers.Gemma4VisionConfig(**{**SMALL, "num_key_value_heads": 3, "head_dim": 8}, patch_size=4)
    return weightless(transformers.Gemma4VisionModel, config)


def superglue() -> nn.Module:
    """It looks for the points of one image in another one."""
    detector = transformers.SuperPointConfig(
        encoder_hidden_sizes=[4, 4, 4, 8], decoder_hidden_size=8, keypoint_decoder_dim=65, descriptor_decoder_dim=8
    )
    config = transformers.SuperGlueConfig(
        keypoint_detector_config=detector,
        hidden_size=8,
        keypoint_encoder_sizes=[4, 8],
        gnn_layers_types=["self", "cross"],
        num_attention_heads=2,
    )
    return weightless(transformers.SuperGlueForKeypointMatching, config)


def perceiver() -> nn.Module:
    """Its type has models of videos too, and so its config has a number of frames."""
    config = transformers.PerceiverConfig(
        num_latents=5, d_latents=24, num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=2,
        num_cross_attention_heads=2, image_size=8,
    )  # fmt: skip
    return weightless(transformers.PerceiverForImageClassificationLearned, config)


def rf_detr() -> nn.Module:
    """Three windows a side do not fit the five patches that its image has a side."""
    config = transformers.RfDetrDinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, mlp_ratio=1, image_size=20, patch_size=4,
        num_windows=3,
    )  # fmt: skip
    return weightless(transformers.RfDetrDinov2Backbone, config)


def udop() -> nn.Module:
    """Every word has its place on the page."""
    config = transformers.UdopConfig(
        vocab_size=31, d_model=24, d_kv=8, d_ff=28, num_layers=1, num_heads=3, image_size=32, patch_size=16,
        pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    return weightless(transformers.UdopForConditionalGeneration, config)


def muse_glimmer_vision() -> nn.Module:
    """A patch is of two frames, which its config calls by another name than Qwen's do."""
    config = transformers.MuseGlimmerVisionConfig(**SMALL, patch_size=4)
    return weightless(transformers.MuseGlimmerVisionModel, config)


def molmo2_vision() -> nn.Module:
    """It is fed patches, as many as it has positions for, and a linear layer reads them."""
    sizes = {**SMALL, "image_size": [20, 12], "patch_size": 4, "num_key_value_heads": 3, "head_dim": 8}
    return weightless(transformers.Molmo2VisionModel, transformers.Molmo2VisionConfig(**sizes))


def video_mae() -> nn.Module:
    """As many numbers as a patch has are no sign: a convolution reads its images, and its layers are as wide."""
    config = transformers.VideoMAEConfig(
        hidden_size=48, intermediate_size=28, num_hidden_layers=1, num_attention_heads=3, image_size=8, patch_size=4,
        num_frames=2,
    )  # fmt: skip
    return weightless(transformers.VideoMAEModel, config)


def dots3_note_vision() -> nn.Module:
    """It merges squares of patches too, and is fed patches."""
    config = transformers.Dots3NoteVisionConfig(**SMALL, patch_size=4, adapter_in_dim=24, per_layer_config={})
    return weightless(transformers.Dots3NoteVisionModel, config)


def inkling2_vision() -> nn.Module:
    """It is fed squares of patches, and told how many of those an image has."""
    config = transformers.Inkling2VisionConfig(**SMALL, patch_size=5)
    return weightless(transformers.Inkling2VisionModel, config)


def omdet_turbo() -> nn.Module:
    """It is told what to look for in words, and of how many classes those of an image are."""
    backbone = transformers.SwinConfig(
        image_size=64, embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 3], window_size=2,
        out_indices=[2, 3, 4],
    )  # fmt: skip
    config = transformers.OmDetTurboConfig(
        backbone_config=backbone, apply_layernorm_after_vision_backbone=False, image_size=64,
        encoder_in_channels=[24, 48, 96],
        decoder_num_layers=1, num_queries=5, text_config={"model_type": "clip_text_model", "num_hidden_layers": 1},
    )  # fmt: skip
    return weightless(transformers.OmDetTurboForObjectDetection, config)


def unlimited_ocr() -> nn.Module:
    """The encoder in its tower takes what the tower makes of images."""
    sam = {**SMALL, "image_size": 224, "mlp_dim": 28, "global_attn_indexes": [0], "window_size": 2}
    encoder = {**SMALL, "hidden_size": 1024, "num_attention_heads": 2, "patch_size": 16}
    config = transformers.UnlimitedOcrConfig(
        vision_config={"sam_config": sam, "encoder_config": encoder}, text_config={"num_hidden_layers": 1}
    )
    return weightless(transformers.UnlimitedOcrForConditionalGeneration, config)


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (siglip2, {"pixel_values": (2, 24, 48), "input_ids": (2, 8)}),
        (gemma4_vision, {"pixel_values": (2, 216, 48), "pixel_position_ids": (2, 216, 2)}),
        (perceiver, {"pixel_values": (2, 3, 8, 8)}),
        (rf_detr, {"pixel_values": (2, 3, 24, 24)}),
        (udop, {"pixel_values": (2, 3, 32, 32), "bbox": (2, 8, 4)}),
        (muse_glimmer_vision, {"pixel_values": (48, 96)}),
        (molmo2_vision, {"pixel_values": (2, 15, 48)}),
        (video_mae, {"pixel_values": (2, 2, 3, 8, 8)}),
        (dots3_note_vision, {"pixel_values": (48, 48), "grid_thw": (2, 3)}),
        (inkling2_vision, {"pixel_values": (48, 10, 10, 3), "image_grid_thw": (2, 3)}),
        (omdet_turbo, {"pixel_values": (2, 3, 64, 64), "classes_input_ids": (2, 8), "classes_structure": (2,)}),
        (unlimited_ocr, {"model.vision_tower:pixel_values": (2, 3, 224, 224)}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_runs_on_its_own_example(make: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    model = make()
    example = example_input(model)
    told = {name: tuple(value.shape) for name, value in example.items()}
    assert {name: told[name] for name in shapes} == shapes
    assert record(model, example).innermost
    mark_config(model)  # as in a converted model
    again = example_input(model)
    assert {name: value.shape for name, value in again.items()} == {
        name: value.shape for name, value in example.items()
    }


@pytest.mark.parametrize("converted", [False, True])
def test_models_that_match_points_get_two_images(converted: bool) -> None:
    model = superglue()
    if converted:
        mark_config(model)
    assert [tuple(value.shape) for value in example_input(model).values()] == [(2, 2, 3, 32, 32)]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("Kimi_K25", (48, 3, 4, 4)), ("PaddleOCRVL", (2, 24, 3, 4, 4)), ("Qwen2VL", (48, 96))],
)
def test_patches_have_the_shape_that_a_tower_takes_them_in(kind: str, shape: tuple[int, ...]) -> None:
    sizes = {"patch_size": 4, "merge_kernel_size": (2, 2), "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "Qwen2VL":
        config: Any = transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
            depth=1, embed_dim=16, num_heads=2, patch_size=4
        )
        tower = weightless(transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel, config)
    elif kind == "Kimi_K25":
        config = transformers.Kimi_K25VisionConfig(**sizes, hidden_size=16, intermediate_size=20)
        tower = weightless(transformers.Kimi_K25VisionModel, config)
    else:
        config = transformers.PaddleOCRVisionConfig(
            hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
            image_size=16,
        )  # fmt: skip
        tower = weightless(transformers.PaddleOCRVisionModel, config)
    assert tuple(next(iter(example_input(tower).values())).shape) == shape


def test_a_tokenizer_of_images_without_a_forward_runs_by_its_encoder() -> None:
    vision = transformers.Apertus1p5VisionTokenizerConfig(
        base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, attn_resolutions=[], latent_channels=4,
        embed_dim=4, codebook_size=7, resolution=16,
    )  # fmt: skip
    tokenizer = weightless(transformers.Apertus1p5VisionTokenizerModel, vision)
    assert _that_runs(tokenizer) is tokenizer.encoder
    assert _that_runs(tokenizer.encoder) is tokenizer.encoder


def test_a_model_that_could_see_and_has_nothing_to_see_with() -> None:
    """By default Gemma 4 has no part for images; that it does not run on them is told by running it."""
    config = transformers.Gemma4Config(text_config={**TEXT, "hidden_size_per_layer_input": 4}, vision_config=None)
    assert set(example_input(weightless(transformers.Gemma4ForConditionalGeneration, config))) == {
        "pixel_values",
        "input_ids",
    }
