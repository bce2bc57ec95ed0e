"""Weights of transformers' models: from their folder, from the hub, and from a file."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from armour_surgery.errors import CheckpointError, UsageError
from armour_surgery.hosts.arguments import spelled
from armour_surgery.hosts.checkpoint import (
    Builder,
    Difference,
    Selection,
    compare,
    lies_inside,
    named,
    odd_kinds,
    odd_tensor,
    selections,
)
from armour_surgery.hosts.hub import cached_folder
from armour_surgery.hosts.transformers_positions import Fill, fitted
from armour_surgery.hosts.weights_file import Tables, kinds_in_folder

__all__ = ["WEIGHT_FILES", "load_checkpoint", "load_published"]

# Weights too large for one file are split, and an index says where each tensor lies.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load_published(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    own: PreTrainedConfig,
    name: str,
    sizes: Mapping[str, Any],
) -> tuple[nn.Module, str]:
    """The model with the weights of its folder, or of the hub, and what was done to them to fit, if anything was.

    `own` is its config without the image size of `sizes`.

    Raises:
        CheckpointError: they would leave a part of it random, except a head that was asked for, or hold no floats.
        UsageError: they are for another size of images, and cannot be resampled.
    """
    folder: Path | None = Path(name)
    if local := Path(name).is_dir():
        # Before transformers reads them, which has no bounds.
        kinds = kinds_in_folder(Path(name))
    model, info = _filled(cls, config, name, None)
    if not local:
        folder = cached_folder(name, getattr(config, "_commit_hash", None), WEIGHT_FILES)
        kinds = kinds_in_folder(folder) if folder else {}
    if problem := odd_kinds(kinds, model.state_dict()):
        raise CheckpointError(f"the weights of hf:{name}: the file {problem}")
    difference, done = _difference(info), ""
    if difference.wrong and "img_size" in sizes:
        resized = fitted(cls, config, own, difference, _filling(cls, name, None))
        model, difference, done = resized or (model, difference, "")
    # A published model may come with heads that this class does not have (a pre-training head, a distillation one).
    left_over = {key for key in difference.left_over if lies_inside(model, key, str(model.base_model_prefix))}
    if sizes.get("num_classes") == 0:
        left_over = {key for key in left_over if not key.startswith(_below(_absent_heads(model)))}
    missing, wrong = difference.missing, difference.wrong
    if "num_classes" in sizes:
        # What lies outside of the body is the head, which starts anew with another number of classes.
        body = f"{model.base_model_prefix}."
        missing = {key for key in missing if key.startswith(body)}
        wrong = {key: shapes for key, shapes in wrong.items() if key.startswith(body)}
    changed = [option for option in sizes if option != "num_classes"]
    if wrong and changed:
        raise UsageError(
            f"the pretrained weights of hf:{name} do not fit {changed[0]}={sizes[changed[0]]} ({sorted(wrong)[0]} "
            f"has another shape); leave {spelled(changed[0])} out, or pass --no-pretrained"
        )
    if difference := Difference(missing, left_over, wrong):
        # No option helps: a head that is asked for starts with random weights.
        raise CheckpointError(difference.message(f"of hf:{name}", Builder(cls.__name__)))
    return model, done


def load_checkpoint(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    own: PreTrainedConfig,
    tables: Tables,
    path: str,
    *,
    headless: bool,
) -> tuple[nn.Module, list[Selection], str]:
    """The model with a file's weights, what of the file fits it, beginning with those, and what was done to them.

    `own` is the config without the image size that was asked for; `headless` says that no head was wanted.

    Raises:
        CheckpointError: nothing in the file fits.
    """
    outline = _outline(cls, config)
    expected = dict(outline.state_dict())
    absent = _absent_heads(outline) if headless else []
    tried = [selection.without(absent) for selection in selections(tables, expected)]
    odd = {selection: odd_tensor(selection.weights, expected) for selection in tried}
    sound = [selection for selection in tried if odd[selection] is None]
    fitting = [selection for selection in sound if not compare(expected, selection.weights)]
    closest = max(tried, key=lambda selection: selection.known)
    message = f"checkpoint {path} {odd[closest]}"
    # Names of older versions fit only after transformers has translated them.
    for selection in fitting[:1] or sound:
        model, info = _filled(cls, config, None, selection.weights)
        difference, done = _difference(info), ""
        if difference.wrong:
            resized = fitted(cls, config, own, difference, _filling(cls, None, selection.weights))
            model, difference, done = resized or (model, difference, "")
        if not difference:
            return model, fitting or [selection], done
        if selection is closest:
            message = difference.message(named(path, selection), Builder(cls.__name__, _options(config)))
    raise CheckpointError(message)


def _outline(cls: type[PreTrainedModel], config: PreTrainedConfig) -> nn.Module:
    """The model, without values where it can be made so."""
    model: nn.Module
    try:
        with torch.device("meta"):
            model = cls(copy.deepcopy(config))
    except Exception:
        # Some look at values when they are made, which meta tensors do not have.
        model = cls(copy.deepcopy(config))
    return model


def _absent_heads(model: nn.Module) -> list[str]:
    """What stands beside the body where a model without classes would have its heads."""
    return [name for name, module in model.named_children() if isinstance(module, nn.Identity)]


def _below(modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{module}." for module in modules)


def _options(config: PreTrainedConfig) -> list[str]:
    """Which numbers of a checkpoint's own the model can be built with."""
    vision = getattr(config, "vision_config", None) or config
    classifies = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None) is not None
    return ["num_classes"] * classifies + ["in_chans"] * hasattr(vision, "num_channels")


def _filled(
    cls: type[PreTrainedModel], config: PreTrainedConfig, name: str | None, weights: dict[str, torch.Tensor] | None
) -> tuple[nn.Module, Mapping[str, Any]]:
    # from_pretrained and not load_state_dict: files keep the key names of older versions, and it translates them.
    model, info = cls.from_pretrained(
        name,
        config=config,
        state_dict=weights,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return model, info


def _filling(cls: type[PreTrainedModel], name: str | None, weights: dict[str, torch.Tensor] | None) -> Fill:
    """`_filled` for any config, with what did not fit."""

    def fill(config: PreTrainedConfig) -> tuple[nn.Module, Difference]:
        model, info = _filled(cls, config, name, weights)
        return model, _difference(info)

    return fill


def _difference(info: Mapping[str, Any]) -> Difference:
    """What from_pretrained said of the keys."""
    wrong = {key: (tuple(in_file), tuple(wanted)) for key, in_file, wanted in info["mismatched_keys"]}
    return Difference(set(info["missing_keys"]) - set(wrong), set(info["unexpected_keys"]), wrong)
