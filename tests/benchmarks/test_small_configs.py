"""Configs of transformers that are made small still fit together: the classes take them."""

import copy
from typing import Any

import pytest
import transformers
from small_configs import shrink

from armour_surgery.hosts.transformers_catalog import cut_config


def small(name: str) -> dict[str, Any]:
    """The config of a class with two layers in every part, made small; its class has accepted it."""
    entries = cut_config(name)
    assert shrink(entries)
    getattr(transformers, name).config_class(**copy.deepcopy(entries))
    return entries


def test_images_words_and_layers_are_few() -> None:
    entries = small("CLIPModel")
    assert entries["vision_config"]["image_size"] == 224  # seven patches of 32 pixels
    assert entries["vision_config"]["intermediate_size"] == 1000
    assert entries["text_config"]["vocab_size"] == 1000
    assert max(entries["text_config"][key] for key in ("bos_token_id", "eos_token_id")) < 1000


def test_layers_of_another_part_are_those_that_are_left() -> None:
    assert small("Molmo2ForConditionalGeneration")["adapter_config"]["vision_feature_layer"] == [1, 1]


def test_stages_are_as_many_as_are_described() -> None:
    audio = small("MuseSparkForConditionalGeneration")["audio_config"]
    assert audio["num_hidden_layers"] == len(audio["depths"])


def test_no_layer_shares_what_none_has_made() -> None:
    text = small("Gemma3nForConditionalGeneration")["text_config"]
    assert text["num_kv_shared_layers"] == 0
    assert text["intermediate_size"] == [1000, 1000]


def test_codebooks_follow_each_other_in_the_dictionary() -> None:
    entries = small("Apertus1p5ForConditionalGeneration")
    end = entries["audio_token_offset"] + entries["audio_config"]["codebook_size"]
    assert entries["image_token_offset"] + entries["vision_config"]["codebook_size"] == entries["audio_token_offset"]
    assert end <= entries["text_config"]["vocab_size"]


def test_maps_of_features_shrink_with_the_image() -> None:
    vision = small("Sam3TrackerModel")["vision_config"]
    assert vision["backbone_config"]["image_size"] == 8 * vision["backbone_config"]["patch_size"]
    assert vision["backbone_feature_sizes"] == [[32, 32], [16, 16], [8, 8]]


@pytest.mark.parametrize("entries", [{"hidden_size": 64}, {"image_size": 32, "patch_size": 16, "text_config": {}}])
def test_what_is_small_stays(entries: dict[str, Any]) -> None:
    before = copy.deepcopy(entries)
    assert not shrink(entries)
    assert entries == before
