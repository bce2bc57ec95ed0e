"""Architectures are built small, and run on images as small as they take."""

import torch
from small_architectures import images, quiet_outputs, running

from armour_surgery.hosts.catalog import skeleton


def test_wide_images_of_models_that_take_any_are_the_smallest() -> None:
    model, example = skeleton("timm", "gemma4_vit_167m")
    assert example["x"].shape[-1] == 768
    assert images(model, 3)["x"].shape == (3, 3, 96, 96)
    model, _ = skeleton("timm", "test_vit2")
    assert images(model, 1)["x"].shape[-2:] == model.patch_embed.img_size


def test_a_model_of_transformers_runs_with_two_layers_on_a_small_image() -> None:
    model, example = running("transformers", "Dinov2Backbone")
    assert model.config.num_hidden_layers == 2
    assert example["pixel_values"].shape == (1, 3, 112, 112)
    first, second = quiet_outputs(model, example), quiet_outputs(model, example)
    assert all(map(torch.equal, first, second))
