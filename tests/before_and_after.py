"""A host and its conversion, which owe each other equal outputs."""

import copy
import functools
from typing import Any

import torch
from oracle import merge, relative_error
from tiny_hosts import CASES
from torch import nn

from armour_surgery.rewrite import ArmourAttention
from armour_surgery.surgery.conversion import convert

__all__ = ["SAMPLE", "close", "converted_host", "leaves", "merged_host", "pair", "sites"]

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


def merged_host(name: str, mode: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A host in which `mode` merges equal projections, so that its own outputs are what the converted one owes."""
    model = CASES[name].build()
    merge(model, mode or CASES[name].auto, CASES[name].example())
    return model.to(dtype)


@functools.cache
def _pair(name: str, mode: str | None) -> tuple[nn.Module, nn.Module]:
    model = merged_host(name, mode)
    return model, convert(model, mode or CASES[name].auto, example_input=CASES[name].example())


def pair(name: str, mode: str | None = None) -> tuple[nn.Module, nn.Module]:
    """A host and its conversion, which owe each other equal outputs; copies."""
    return copy.deepcopy(_pair(name, mode)[0]), copy.deepcopy(_pair(name, mode)[1])


def converted_host(name: str, **options: Any) -> nn.Module:
    return convert(CASES[name].build(), CASES[name].auto, example_input=CASES[name].example(), **options)


def sites(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ArmourAttention)}


def close(expected: Any, got: Any, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        assert relative_error(leaves(expected), leaves(got)) <= tolerance


def leaves(value: Any) -> list[torch.Tensor]:
    found = torch.utils._pytree.tree_leaves(value.to_tuple() if hasattr(value, "to_tuple") else value)
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
