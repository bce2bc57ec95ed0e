"""The vision models of transformers, each once, and a config for those that are too large as they are by default."""

from typing import Any

import transformers
from transformers.models.auto import modeling_auto

__all__ = ["cut_config", "vision_classes"]

# What a model is for, the plainest first: a type is taken for the first of these that it can do.
_TASKS = (
    "IMAGE_CLASSIFICATION",
    "BACKBONE",
    "IMAGE",
    "VIDEO_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "MASK_GENERATION",
    "POSE_ESTIMATION",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "IMAGE_TO_IMAGE",
    "VISUAL_QUESTION_ANSWERING",
    "DOCUMENT_QUESTION_ANSWERING",
    "IMAGE_TEXT_TO_TEXT",
)
# How configs call the number of their layers.
_DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "vision_layers",
    "n_layers",
    "n_layer",
)
_LAYERS = 2


def vision_classes() -> list[str]:
    """The name of one class for each model type that takes images; wrappers of other libraries' models are left out."""
    chosen: dict[str, str] = {}
    for task in _TASKS:
        for kind, classes in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).items():
            # Some types map to several classes; the first is the plain one.
            chosen.setdefault(kind, classes if isinstance(classes, str) else classes[0])
    # Asked for its names, transformers imports nothing; asked for a class, the class.
    exported = set(dir(transformers))
    names = [name for kind, name in chosen.items() if not kind.startswith("timm_") and name in exported]
    return list(dict.fromkeys(names))


def cut_config(name: str) -> dict[str, Any]:
    """The default config of a class with two layers in every part: they are alike, and language models are long."""
    config: Any = getattr(transformers, name).config_class()
    _cut(config)
    entries: dict[str, Any] = config.to_dict()
    return entries


def _cut(config: Any) -> None:
    depth = getattr(config, "num_hidden_layers", None)
    for key in _DEPTHS:
        if isinstance(value := getattr(config, key, None), int) and value > _LAYERS:
            setattr(config, key, _LAYERS)
    # Lists with an entry for each layer; the last layers are often of the other kind.
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and isinstance(depth, int) and len(value) == depth > _LAYERS:
            setattr(config, key, [value[0], *value[1 - _LAYERS :]])
    for key in getattr(config, "sub_configs", None) or {}:
        if getattr(config, key, None) is not None:
            _cut(getattr(config, key))
