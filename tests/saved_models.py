"""Hosts to save, and what two models or two folders have to have in common to be the same."""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn

from armour_surgery import convert
from armour_surgery.hosts import example_input

__all__ = [
    "CARD",
    "FILES",
    "HF",
    "HOSTS",
    "PLAN",
    "TIMM",
    "WEIGHTS",
    "armour",
    "contents",
    "edit",
    "host",
    "outputs",
    "put",
    "same",
]

PLAN, WEIGHTS, CARD = "surgery.json", "model.safetensors", "README.md"
# What a folder of a timm model holds.
FILES = sorted([PLAN, WEIGHTS, CARD, "config.json"])
TIMM: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
HF: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "image_size": 32,
    "patch_size": 8,
}


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{**TIMM, "patch_size": 8, **arguments})


def _timm_levit(name: str) -> Callable[[], nn.Module]:
    sizes = {"embed_dim": (24, 36), "depth": (1, 1), "num_heads": (3, 5), "key_dim": 8, "attn_ratio": 2.0}
    return lambda: timm.create_model(name, img_size=64, num_classes=5, **sizes)


def _hf_levit() -> nn.Module:
    config = transformers.LevitConfig(
        image_size=64,
        hidden_sizes=[24, 32, 40],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        num_labels=5,
    )
    return transformers.LevitForImageClassification(config)


def _hf_swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return transformers.SwinForImageClassification(config)


def _clip() -> nn.Module:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=HF, text_config=text, projection_dim=16))


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "vit": _timm("vit_tiny_patch16_224"),
    "distilled": _timm("deit_tiny_distilled_patch16_224"),
    "beit": _timm("beit_base_patch16_224"),
    "eva02": _timm("eva02_tiny_patch14_224"),
    "eva-rope-mixed": _timm("vit_small_patch16_rope_mixed_224"),
    "levit": _timm_levit("levit_128s"),
    "levit-conv": _timm_levit("levit_conv_128s"),
    "hf-vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=5)),
    "hf-vit-eager": lambda: transformers.ViTModel(transformers.ViTConfig(**HF, attn_implementation="eager")),
    "hf-dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF)),
    "hf-levit": _hf_levit,
    "hf-swin": _hf_swin,
    "hf-clip-vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF)),
    "hf-clip": _clip,
}


def host(name: str = "vit") -> nn.Module:
    """A host in which no two tensors are equal, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(0)
    model = HOSTS[name]()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(drawn + 0.5 if key.endswith("running_var") else (drawn - 0.5) / 2)
    return model.eval()


def outputs(model: nn.Module, images: int = 2) -> list[torch.Tensor]:
    """All tensors that the model answers for the same images."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        name: torch.rand(like.shape, generator=generator).to(like.dtype)
        if like.is_floating_point()
        else torch.ones(like.shape, dtype=like.dtype)
        for name, like in example_input(model, images).items()
    }

    def tensors(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from tensors(inner)

    with torch.no_grad():
        found = list(tensors(model.eval()(**inputs)))
    assert found
    assert all(tensor.isfinite().all() for tensor in found)
    return found


def same(first: nn.Module, second: nn.Module) -> bool:
    """Equal to the last bit: outputs, tensors, their names and types, and the classes of all modules."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    assert [tensor.dtype for tensor in ours.values()] == [tensor.dtype for tensor in theirs.values()]
    assert [type(m).__qualname__ for m in first.modules()] == [type(m).__qualname__ for m in second.modules()]
    return all(torch.equal(ours[key], theirs[key]) for key in ours) and all(
        torch.equal(a, b) for a, b in zip(outputs(first), outputs(second), strict=True)
    )


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@functools.cache
def _armour(name: str) -> nn.Module:
    return convert(host(name))


def armour(name: str = "vit") -> nn.Module:
    """A host that was converted; a copy, to do with as one likes."""
    return copy.deepcopy(_armour(name))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((path / PLAN).read_text())
    change(document)
    (path / PLAN).write_text(json.dumps(document))


def put(document: Any, where: tuple[str | int, ...], value: Any) -> None:
    for step in where[:-1]:
        document = document[step]
    document[where[-1]] = value
