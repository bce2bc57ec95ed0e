"""A file's weights in one of timm's models, in whatever form of them timm or the authors have saved it."""

import sys
from functools import partial
from pathlib import Path

import timm
import torch
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import nn

from armour_surgery.hosts.checkpoint import Builder, load_checkpoint
from armour_surgery.hosts.hub import quiet
from armour_surgery.hosts.weights_file import Tables

__all__ = ["load_weights"]


def load_weights(model: nn.Module, tables: Tables, path: str | Path, name: str, *, headless: bool) -> None:
    """Load the weights as they are, or in the first other form of them that fits.

    `headless` says that the model was to have no head: one in the file is left aside.

    Raises:
        CheckpointError: nothing in the file fits.
    """
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifiers = (named,) if isinstance(named, str) else named
    head = [key for key in model.state_dict() if key.rpartition(".")[0] in classifiers]
    load_checkpoint(
        model,
        tables,
        path=path,
        builder=Builder(name, ("num_classes", "in_chans"), head, _headless(name)),
        forms=(dict, partial(_filtered, model), partial(_from_facebook_levit, model)),
        without=[absent for absent in map(partial(_absent, model), classifiers) if absent] if headless else (),
    )


def _absent(model: nn.Module, classifier: str) -> str | None:
    """The module that stands in for a classifier, or for the head around it, where the model has none."""
    parts = classifier.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        # The classifier's own parts are gone with the head around it.
        if isinstance(dict(model.named_modules()).get(name), nn.Identity):
            return name
    return None


def _headless(name: str) -> str:
    """How to come to this model without its classifier, which some of its published weights do without."""
    architecture = split_model_name_tag(name)[0]
    for tagged in timm.list_pretrained(f"{architecture}.*"):
        if get_pretrained_cfg(tagged).num_classes == 0:
            return f"name {tagged} as MODEL, which has none"
    return "pass --num-classes 0 for the model without one"


def _filtered(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The weights as timm's own converter for this architecture makes them, or None without one."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        with quiet():
            converted: dict[str, torch.Tensor] = convert(dict(weights), model)
    except Exception:
        # The converters index what they expect to find; a file of something else is reported by its own keys.
        return None
    return converted


def _from_facebook_levit(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """LeViT as its authors saved it: other names, in timm's order. None unless every kind and size agrees."""
    if type(model).__module__ != "timm.models.levit":
        return None
    expected = model.state_dict()
    ordered = [(key, value) for key, value in weights.items() if not key.endswith("attention_bias_idxs")]
    if len(ordered) != len(expected):
        return None
    renamed: dict[str, torch.Tensor] = {}
    for (key, wanted), (old, value) in zip(expected.items(), ordered, strict=True):
        if key.rpartition(".")[2] != old.rpartition(".")[2] or wanted.numel() != value.numel():
            return None
        # The levit_conv variants hold the same matrices as 1x1 convolutions.
        renamed[key] = value.reshape(wanted.shape)
    return renamed
