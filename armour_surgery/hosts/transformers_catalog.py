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
    "num_blocks",
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
    _drop_layers(entries)
    return entries


def _drop_layers(entries: dict[str, Any]) -> None:
    """Take out what a config says of single layers that there are no longer."""
    depth = entries.get("num_hidden_layers")
    alone = entries.get("per_layer_config")
    if isinstance(alone, dict) and isinstance(depth, int):
        entries["per_layer_config"] = {key: value for key, value in alone.items() if int(key) < depth}
    for value in entries.values():
        if isinstance(value, dict):
            _drop_layers(value)


def _cut(config: Any) -> None:
    depth = getattr(config, "num_hidden_layers", None)
    # A backbone whose stages are its layers has as many as what is built upon it reads.
    stages = [f"stage{number}" for number in range(1, depth + 1)] if isinstance(depth, int) else []
    read = len(config.out_indices or ()) if getattr(config, "stage_names", None) == ["stem", *stages] else 0
    kept = max(_LAYERS, read)
    for key in _DEPTHS:
        if isinstance(value := getattr(config, key, None), int) and value > kept:
            setattr(config, key, kept)
    if read:
        config.stage_names = ["stem", *stages[:kept]]
        config._out_indices, config._out_features = list(range(kept - read + 1, kept + 1)), stages[kept - read : kept]
    for key, value in list(vars(config).items()):
        if not isinstance(value, list) or not isinstance(depth, int):
            continue
        if len(value) == depth > kept:
            # An entry for each layer; the last layers are often of the other kind.
            setattr(config, key, [value[0], *value[1 - kept :]])
        elif key.endswith(("indices", "indexes", "_layer", "_layers")) and key != "_out_indices":
            # Numbers of layers.
            setattr(config, key, [min(number, kept - 1) if isinstance(number, int) else number for number in value])
    for key in getattr(config, "sub_configs", None) or {}:
        if getattr(config, key, None) is not None:
            _cut(getattr(config, key))
