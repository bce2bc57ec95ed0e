"""Configs of transformers made small, so that many models can be run one after the other."""

from typing import Any

__all__ = ["shrink"]

_PATCHES = 8  # along a side of an image
_PIXELS = 128  # along a side of an image of which no patches are told
_WORDS = 1000  # that the language model behind a tower knows; it is not run
_CODES = 500  # words that stand for parts of an image, or for sounds
# A layer within an MLP may have any width, and a convolution any number of channels that its norm's 32 groups divide.
_MOST = {
    "vocab_size": _WORDS, "vocab_size_per_layer_input": _WORDS, "intermediate_size": 1000,
    "moe_intermediate_size": 1000, "d_ff": 1000, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "moe_num_experts": 8, "base_channels": 64, "codebook_size": _CODES, "num_queries": 300,
}  # fmt: skip
_LAYERS = 2  # that a part has whose config was cut


def shrink(entries: dict[str, Any]) -> bool:
    """Make images small, where a config tells how large they are, and MLPs, experts and the dictionary of words.

    What a config that was cut to two layers in every part says of layers is made to fit those.

    Returns whether anything became smaller.
    """
    most = dict(_MOST)
    patch = entries.get("patch_size")
    if isinstance(patch, list | tuple):  # of a video: images in time, rows, columns
        patch = patch[-1]
    most["image_size"] = most["img_size"] = _PATCHES * patch if isinstance(patch, int) else _PIXELS
    smaller = _fit_layers(entries)
    _fit_features(entries)
    _number_codes(entries)
    for key, value in entries.items():
        limit = most.get(key)
        if isinstance(value, dict):
            smaller |= shrink(value)
        elif limit is not None and isinstance(value, int) and value > limit:
            entries[key] = limit
            smaller = True
        elif key == "intermediate_size" and isinstance(value, list):  # of each layer
            entries[key] = [min(width, most[key]) for width in value]
            smaller |= entries[key] != value
        elif str(key).endswith("_num_hidden_layers") and isinstance(value, int) and value > _LAYERS:
            entries[key] = _LAYERS  # of a part that has no config of its own
            smaller = True
        elif str(key).endswith("_token_id") and isinstance(value, int) and value >= _WORDS:
            entries[key] = 0
    return smaller


def _fit_features(entries: dict[str, Any]) -> None:
    """Make the sizes that the maps of a backbone's features are told to have those of a small image."""
    backbone, sizes = entries.get("backbone_config"), entries.get("backbone_feature_sizes")
    if not isinstance(backbone, dict) or not sizes:
        return
    size, patch = backbone.get("image_size"), backbone.get("patch_size")
    if isinstance(size, int) and isinstance(patch, int):
        entries["backbone_feature_sizes"] = [[side * _PATCHES * patch // size for side in sides] for sides in sizes]


def _number_codes(entries: dict[str, Any]) -> None:
    """Have the words of one codebook follow those of the other in the small dictionary too."""
    offsets = [key for key, value in entries.items() if str(key).endswith("_token_offset") and isinstance(value, int)]
    for place, key in enumerate(sorted(offsets, key=entries.__getitem__)):
        entries[key] = place * _CODES


def _fit_layers(entries: dict[str, Any]) -> bool:
    """Have what names or counts layers agree with how many there are. Returns whether anything changed."""
    before = dict(entries)
    depth = entries.get("num_hidden_layers")
    stages = entries.get("depths")
    if depth == _LAYERS and isinstance(stages, list | tuple):
        entries["num_hidden_layers"] = len(stages)  # what are counted are stages, and sizes of all of them are told
    named = entries.get("vision_feature_layer")
    if isinstance(named, list | tuple):
        entries["vision_feature_layer"] = [min(number, _LAYERS - 1) for number in named]
    # So many of the last layers read what earlier ones computed; of two layers none does.
    shared = entries.get("num_kv_shared_layers")
    if depth == _LAYERS and isinstance(shared, int) and shared > depth:
        entries["num_kv_shared_layers"] = 0
    return entries != before
