"""Configs of transformers made small, so that many models can be run one after the other."""

from typing import Any

__all__ = ["shrink"]

_PATCHES = 8  # along a side of an image
_PIXELS = 128  # along a side of an image of which no patches are told
_WORDS = 1000  # that the language model behind a tower knows; it is not run
# A layer within an MLP may have any width.
_MOST = {
    "vocab_size": _WORDS, "intermediate_size": 1000, "moe_intermediate_size": 1000, "num_experts": 8,
    "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
}  # fmt: skip


def shrink(entries: dict[str, Any]) -> bool:
    """Make images small, where a config tells how large they are, and MLPs, experts and the dictionary of words.

    Returns whether anything became smaller.
    """
    most = dict(_MOST)
    patch = entries.get("patch_size")
    if isinstance(patch, list | tuple):  # of a video: images in time, rows, columns
        patch = patch[-1]
    most["image_size"] = _PATCHES * patch if isinstance(patch, int) else _PIXELS
    large = [key for key, value in most.items() if isinstance(entries.get(key), int) and entries[key] > value]
    entries |= {key: most[key] for key in large}
    smaller = bool(large)
    for key, value in entries.items():
        if isinstance(value, dict):
            smaller |= shrink(value)
        elif str(key).endswith("_token_id") and isinstance(value, int) and value >= _WORDS:
            entries[key] = 0
    return smaller
