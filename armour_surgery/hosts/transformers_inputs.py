"""What transformers' models are fed: images, and what tells how large those are, from their configs."""

import contextlib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_KEYPOINT_MATCHING_MAPPING

from armour_surgery.copies import meta_copy
from armour_surgery.errors import ExampleInputError

__all__ = ["example", "writing_parts"]

# Name, shape without batch, and type; or what one image adds to the first axis.
Told = Mapping[str, tuple[tuple[int, ...], torch.dtype] | torch.Tensor]

_IMAGES = ("pixel_values", "pixel_values_videos", "flattened_patches")
_GRIDS = ("grid_thw", "image_grid_thw")
# An image in patches: not square, so that rows are not taken for columns.
_ROWS, _COLUMNS = 4, 6
_WORDS = 8
_SMALL = 32


def example(model: nn.Module) -> Told:
    """What `forward` takes, or the part of it that sees where words and images are mixed: see `Adapter`.

    Raises:
        ExampleInputError: neither the model nor a part of it takes images.
    """
    name, part = _seeing_part(model)
    names = list(inspect.signature(part.forward).parameters)
    config: Any = getattr(part, "config", None) or model.config
    # CLIP and its like keep the image encoder's part of the config apart from the text encoder's.
    vision = getattr(config, "vision_config", None) or config
    inputs: Told
    if any(grid in names for grid in _GRIDS):
        inputs = _in_a_grid(part, names, vision)
    elif "spatial_shapes" in names:
        inputs = _in_shapes(vision)
    elif "aspect_ratio_ids" in names:
        inputs = _in_tiles(vision)
    elif "pixel_position_ids" in names:
        inputs = _at_positions(vision)
    elif "flattened_patches" in names:
        inputs = _flattened(vision)
    else:
        image = next((image for image in _IMAGES if image in names), None)
        if image is None and part is not model:
            image = names[0]
        if image is None:
            raise ExampleInputError(
                f"{type(model).__name__} takes {getattr(model, 'main_input_name', names[0])} and no pixel_values, and "
                "only images are known here; pass example_input={name: tensor}"
            )
        shape = _image(vision, image == "pixel_values_videos")
        # A type may have models of videos besides (Perceiver).
        shape = shape[-3:] if "ForImage" in type(part).__name__ else shape
        # A converted model's config has a class of its own, below the one that is known.
        if any(kind in MODEL_FOR_KEYPOINT_MATCHING_MAPPING for kind in type(config).__mro__):
            # Two images, in which the same points are looked for. Without weights all pixels are points.
            shape = (2, shape[0], _SMALL, _SMALL)
        if _reads_patches(part, vision):
            shape = (vision.num_position_embeddings, _patch(vision))
        inputs = {image: (shape, torch.float32)}
    inputs = {**inputs, **_words(names, config)}
    return {f"{name}:{key}" if name else key: value for key, value in inputs.items()}


def writing_parts(model: nn.Module) -> list[str]:
    """The text models that write about what the rest of a model sees."""
    if not _mixes(model):
        return []
    found = []
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel):
            names = set(inspect.signature(module.forward).parameters)
            if names & {"past_key_values", "cache"} and not names & {*_IMAGES, "image_hidden_states"}:
                found.append(name)
    return found


def _mixes(model: nn.Module) -> bool:
    """Whether images take the places of words, or are what words are about, in one sequence or in two."""
    names = inspect.signature(model.forward).parameters
    config: Any = model.config
    mixed = any(hasattr(config, f"image_token_{key}") for key in ("id", "index")) or model.can_generate()  # type: ignore[operator]
    # CLIP and its like are two models side by side.
    return mixed and not hasattr(model, "get_text_features") and bool({"input_ids", "decoder_input_ids"} & set(names))


def _seeing_part(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of a model that makes features of images, with its name; all of it where that runs on images.

    A model that mixes them with words runs on the two together alone, with as many words as its processor says.
    """
    if not _mixes(model):
        return "", model
    part: Any = model
    while isinstance(part, PreTrainedModel):
        encoder = part.get_encoder("image")
        if encoder is None or encoder is part:
            break
        if part is not model and _takes_images(part) and not _takes_images(encoder):
            break  # what is inside takes what the rest of this part makes of them
        part = encoder
    if part is model:
        part = _first_that_sees(model)
    part = _that_runs(part)
    return next((name, module) for name, module in model.named_modules() if module is part)


def _takes_images(part: nn.Module) -> bool:
    names = inspect.signature(part.forward).parameters
    return any(image in names for image in _IMAGES)


def _first_that_sees(model: nn.Module) -> Any:
    for module in model.modules():
        if module is model or not isinstance(module, PreTrainedModel) or module.main_input_name not in _IMAGES:
            continue
        # An encoder of images, and not what has one inside and takes words too.
        if "input_ids" not in inspect.signature(module.forward).parameters:
            return module
    return model


def _that_runs(part: Any) -> Any:
    """The part itself, or what is inside of one that has no forward (a tokenizer of images: Apertus 1.5, Emu 3)."""
    if type(part).forward is not nn.Module.forward:
        return part
    for module in part.modules():
        if "pixel_values" in inspect.signature(module.forward).parameters:
            return module
    return part


def _image(vision: Any, video: bool) -> tuple[int, ...]:
    backbone = getattr(vision, "backbone_config", None)
    size = None
    for config in (vision, backbone):
        size = size or getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    if size is None and (ratios := getattr(vision, "scaled_images_ratios", None)):
        size = math.ceil(vision.patch_size / min(ratios))  # the smallest version of an image is one patch (Depth Pro)
    size = size or 224
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    # Where an image is cut into as many windows as a config says, each has as many patches (RF-DETR).
    windowed = backbone or vision
    windows = getattr(windowed, "num_windows_side", None) or getattr(windowed, "num_windows", None)
    if isinstance(windows, int):
        step = windows * windowed.patch_size
        height, width = math.ceil(height / step) * step, math.ceil(width / step) * step
    shape = (_channels(vision), height, width)
    frames = getattr(vision, "num_frames", None)
    if video and frames is None:
        frames = 2 * getattr(vision, "tubelet_size", 1)
    return (frames, *shape) if isinstance(frames, int) else shape


def _channels(vision: Any) -> int:
    for name in ("num_channels", "in_channels", "in_chans"):
        if isinstance(channels := getattr(vision, name, None), int):
            return channels
    return 3


def _reads_patches(part: nn.Module, vision: Any) -> bool:
    """Whether the first layer takes flattened patches, as many as there are positions (Molmo 2)."""
    first = next((layer for layer in part.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear)), None)
    counted = isinstance(getattr(vision, "num_position_embeddings", None), int)
    return counted and isinstance(first, nn.Linear) and first.in_features == _patch(vision)


def _patch(vision: Any) -> int:
    """How many numbers a flattened patch has."""
    size = getattr(vision, "patch_size", 16)
    pixels = size**2 if isinstance(size, int) else math.prod(size)
    frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1
    return _channels(vision) * pixels * int(frames)


def _words(names: list[str], config: Any) -> Told:
    """A few tokens will do, since nothing here looks at the text."""
    text = getattr(config, "text_config", None) or config
    words: dict[str, tuple[tuple[int, ...], torch.dtype] | torch.Tensor] = {}
    if "input_ids" in names:
        words["input_ids"] = ((min(_WORDS, getattr(text, "max_position_embeddings", _WORDS)),), torch.int64)
    for name in ("classes_input_ids", "classes_attention_mask", "tasks_input_ids", "tasks_attention_mask"):
        if name in names:  # OmDet-Turbo
            words[name] = ((_WORDS,), torch.int64)
    if "decoder_input_ids" in names:
        words["decoder_input_ids"] = ((_WORDS,), torch.int64)
    if "classes_structure" in names:
        words["classes_structure"] = torch.tensor([1])  # how many classes an image has
    if "bbox" in names and "input_ids" in words:
        words["bbox"] = ((*words["input_ids"][0], 4), torch.int64)
    if "task_inputs" in names:
        words["task_inputs"] = ((getattr(config, "task_seq_len", _WORDS),), torch.int64)
    return words


def _in_a_grid(part: nn.Module, names: list[str], vision: Any) -> Told:
    """Images as rows of patches, one after the other (Qwen-VL); a grid tells frames, rows and columns of each."""
    merged = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None) or 2
    merged = merged if isinstance(merged, int) else max(merged)
    rows, columns = 2 * merged, 3 * merged
    grid = next(name for name in _GRIDS if name in names)
    if hasattr(vision, "native_patch_size"):
        # Squares of patches, which are counted, with their channels last (Inkling 2).
        side = merged * vision.patch_size
        squares = torch.empty(_ROWS * _COLUMNS, side, side, _channels(vision), device="meta")
        return {names[0]: squares, grid: torch.tensor([[1, _ROWS, _COLUMNS]])}
    inputs = {
        names[0]: _rows_of_patches(part, names[0], grid, rows * columns, vision),
        grid: torch.tensor([[1, rows, columns]]),
    }
    if "merge_sizes" in names:
        inputs["merge_sizes"] = torch.tensor([merged])
    return inputs


def _rows_of_patches(part: nn.Module, name: str, grid: str, count: int, vision: Any) -> torch.Tensor:
    """Patches as the numbers that they have; where a plain convolution is applied to them as they come, as images."""
    patches = torch.empty(count, _patch(vision), device="meta")
    first = next((layer for layer in part.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear)), None)
    if not isinstance(first, nn.Conv2d) or first.in_channels * math.prod(first.kernel_size) != patches.shape[1]:
        return patches
    images = patches.reshape(count, first.in_channels, *first.kernel_size)
    for told in (patches, images, images[None]):
        if _reaches_a_layer(part, {name: told, grid: None}):
            return told
    return patches


def _reaches_a_layer(part: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the first convolution can be applied to what comes to it; what the part does later is not looked at."""
    copied = meta_copy(part)
    reached = []
    for layer in copied.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *_: reached.append(True))
    with contextlib.suppress(Exception), torch.no_grad():
        copied(**inputs)
    return bool(reached)


def _in_shapes(vision: Any) -> Told:
    """Images as patches, padded to as many in all (SigLIP 2 NaFlex)."""
    count = _ROWS * _COLUMNS
    return {
        "pixel_values": ((count, _patch(vision)), torch.float32),
        "pixel_attention_mask": torch.ones(1, count, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[_ROWS, _COLUMNS]]),
    }


def _in_tiles(vision: Any) -> Told:
    """Every image in tiles, and several images to a text (Llama 3.2 Vision)."""
    tiles = vision.max_num_tiles
    return {
        "pixel_values": ((1, tiles, *_image(vision, False)), torch.float32),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.int64),
    }


def _places(pooled: int = 1) -> torch.Tensor:
    """Row and column of every patch; squares of `pooled` by `pooled` of them become one."""
    return torch.cartesian_prod(torch.arange(_ROWS * pooled), torch.arange(_COLUMNS * pooled))


def _at_positions(vision: Any) -> Told:
    """Patches, and where each of them is (Gemma 4)."""
    places = _places(getattr(vision, "pooling_kernel_size", 1))
    return {
        "pixel_values": ((len(places), _patch(vision)), torch.float32),
        "pixel_position_ids": places[None],
    }


def _flattened(vision: Any) -> Told:
    """Patches that begin with their row and column, counted from 1 (Pix2Struct)."""
    patches = torch.zeros(_ROWS * _COLUMNS, _patch(vision))
    return {"flattened_patches": torch.cat([_places() + 1.0, patches], dim=1)[None]}
