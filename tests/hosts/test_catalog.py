"""Every architecture of a library, and how it is built."""

import pytest
from transformers import CLIPConfig

from armour_surgery.hosts.catalog import architectures, skeleton
from armour_surgery.hosts.transformers_catalog import cut_config, vision_classes


def test_the_names_are_those_of_the_library() -> None:
    assert "deit_tiny_patch16_224" in architectures("timm")
    assert "vit_b_16" in architectures("torchvision")
    names = architectures("transformers")
    assert {"ViTForImageClassification", "DetrModel", "LlavaForConditionalGeneration"} <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("Timm")]


def test_no_type_is_there_twice() -> None:
    # One of the classes of ViT is enough: its attention is the same in all of them.
    assert [name for name in vision_classes() if name.startswith("ViTFor")] == ["ViTForImageClassification"]


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_skeletons_have_no_weights(library: str) -> None:
    name = {"timm": "vit_tiny_patch16_224", "torchvision": "vit_b_16"}[library]
    model, example = skeleton(library, name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert [tuple(value.shape) for value in example.values()] == [(2, 3, 224, 224)]


def test_videos_and_pairs_of_images_are_fed_as_such() -> None:
    _, example = skeleton("torchvision", "mvit_v1_b")
    assert {name: tuple(value.shape) for name, value in example.items()} == {"x": (1, 3, 16, 224, 224)}
    _, example = skeleton("torchvision", "raft_small")
    assert list(example) == ["image1", "image2"]


def test_what_reads_the_layers_of_a_config_that_is_cut_reads_those_that_are_left() -> None:
    entries = cut_config("MllamaVisionModel")
    assert max(entries["intermediate_layers_indices"]) < entries["num_hidden_layers"] == 2
    # Four stages are read, so that there are four.
    backbone = cut_config("CHMv2ForDepthEstimation")["backbone_config"]
    assert (backbone["num_hidden_layers"], backbone["out_indices"]) == (4, [1, 2, 3, 4])
    assert backbone["out_features"] == ["stage1", "stage2", "stage3", "stage4"]
    text = cut_config("Gemma4ForConditionalGeneration")["text_config"]
    assert all(int(number) < 2 for number in text["per_layer_config"])


def test_a_config_that_is_cut_has_two_layers_in_every_part() -> None:
    entries = cut_config("CLIPModel")
    assert entries["vision_config"]["num_hidden_layers"] == entries["text_config"]["num_hidden_layers"] == 2
    assert entries["vision_config"]["hidden_size"] == CLIPConfig().vision_config.hidden_size


def test_a_config_that_cannot_be_cut_is_taken_as_it_is() -> None:
    model, _ = skeleton("transformers", "Molmo2ForConditionalGeneration")
    assert model.config.vision_config.num_hidden_layers > 2


def test_detectors_see_images_of_the_size_that_they_are_fed() -> None:
    model, example = skeleton("torchvision", "fasterrcnn_mobilenet_v3_large_fpn")
    assert [tuple(value.shape) for value in example.values()] == [(2, 3, 224, 224)]
    assert model.transform.min_size == (224,)
    # SSD has a size of its own.
    assert skeleton("torchvision", "ssdlite320_mobilenet_v3_large")[0].transform.fixed_size == (320, 320)
