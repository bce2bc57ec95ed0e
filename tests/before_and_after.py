"""A host and its conversion, which owe each other equal outputs."""

from typing import Any

import torch
from oracle import relative_error
from shared_hosts import merged
from torch import nn

from armour_surgery.copies import full_copy
from armour_surgery.rewrite import ArmourAttention

__all__ = ["SAMPLE", "close", "leaves", "pair", "sites"]

SAMPLE = [
    "vit",
    "deit-distilled",
    "eva",
    "eva02",
    "beit",
    "levit",
    "levit-conv",
    "swin",
    "hf-vit",
    "hf-levit",
    "hf-beit",
]


def pair(name: str, mode: str | None = None) -> tuple[nn.Module, nn.Module]:
    """A host and its conversion, which owe each other equal outputs; copies."""
    model, converted = merged(name, mode)
    return full_copy(model), full_copy(converted)


def sites(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ArmourAttention)}


def close(expected: Any, got: Any, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        assert relative_error(leaves(expected), leaves(got)) <= tolerance


def leaves(value: Any) -> list[torch.Tensor]:
    found = torch.utils._pytree.tree_leaves(value.to_tuple() if hasattr(value, "to_tuple") else value)
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
