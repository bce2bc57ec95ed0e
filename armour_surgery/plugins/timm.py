"""timm: converted folders by `local-dir:` and `hf-hub:`, the paper's models by name, and `attn_layer="armour"`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import register_model
from timm.models.vision_transformer import ATTN_LAYERS, Attention
from torch import nn

from armour_surgery.errors import ModelError
from armour_surgery.hosts.library_config import TIMM_FOLDER
from armour_surgery.plugins import timm_arguments

__all__ = ["PAPER", "register"]

_LEVITS = ("128s", "128", "192", "256", "384")
# Names of the paper's models (Tables 1, 3 and 4): what timm calls the original, and the mode.
PAPER = {
    **{f"armour_deit_{size}_patch16_224": (f"deit_{size}_patch16_224", "qv") for size in ("tiny", "small", "base")},
    "armour_deit_tiny_distilled_patch16_224": ("deit_tiny_distilled_patch16_224", "qv"),
    **{f"armour_levit_{size}": (f"levit_{size}", "concat-half") for size in _LEVITS},
    **{f"armour_plus_levit_{size}": (f"levit_{size}", "concat-full") for size in _LEVITS},
}


def register() -> None:
    """Add what timm can create and use by name, and what older versions of it do not keep."""
    timm_arguments.register()
    ATTN_LAYERS["armour"] = Armour
    _add(TIMM_FOLDER, from_folder)
    for name, (original, mode) in PAPER.items():
        _add(name, _of_paper(name, original, mode))


def _add(name: str, make: Callable[..., nn.Module]) -> None:
    make.__name__ = name
    make.__module__ = __name__  # where timm looks for what belongs to it
    register_model(make)


class Armour(Attention):  # type: ignore[misc]
    """timm's attention with one projection for Q and V, `softmax(QK^T) Q`; see mode `qv`."""

    def __init__(self, dim: int, *args: Any, **kwargs: Any) -> None:
        from armour_surgery.surgery.conversion import convert

        super().__init__(dim, *args, **kwargs)
        # Not one token: an axis of size one hides which axis is which.
        convert(self, "qv", example_input=torch.empty(2, 5, dim, device="meta"), inplace=True)


def from_folder(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
    """The model of a folder that `save` wrote, as `timm.create_model("local-dir:FOLDER")` asks for it.

    Without `pretrained` it has random weights, and takes the builder's arguments (`num_classes`, `drop_path_rate`, ..).

    Raises:
        ModelError: it is asked for without a folder, or its weights with other arguments.
        FolderError: see `armour_surgery.load`.
    """
    # When this file is imported, timm is being imported, by whoever began to.
    from armour_surgery.hosts.libraries import adapter
    from armour_surgery.saving.folder import load, read_plan
    from armour_surgery.saving.replay import replay

    folder = _folder_of(pretrained_cfg)
    arguments = {name: value for name, value in kwargs.items() if name not in _PLACES and value is not None}
    if pretrained and not arguments:
        return _told(load(folder), pretrained_cfg)
    surgery = read_plan(folder)
    source = surgery.source
    assert source is not None
    model = adapter("timm").build(source.architecture, {**source.arguments, **arguments})
    model = replay(model, replace(surgery, trained=None, fidelity=None))
    if pretrained:
        _fill(model, load(folder), arguments)
    return _told(model, pretrained_cfg) if "img_size" not in arguments else model


# Arguments of create_model that are not the model's.
_PLACES = ("cache_dir", "pretrained_cfg_overlay", "pretrained_model_args")


def _folder_of(pretrained_cfg: Any) -> Path:
    told = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
    if told.get("source") == "local-dir":
        return Path(told["file"])
    if told.get("source") == "hf-hub":
        from armour_surgery.saving.folder import find_folder

        return find_folder(f"hf-hub:{told['hf_hub_id']}")
    raise ModelError(
        f"{TIMM_FOLDER} names no architecture: it stands for what a saved folder holds; "
        'timm.create_model("local-dir:FOLDER", pretrained=True), or the original\'s name and armour_surgery.convert'
    )


def _told(model: nn.Module, pretrained_cfg: dict[str, Any]) -> nn.Module:
    """The model with what its folder says of images and classes, where timm's scripts look for it."""
    from armour_surgery.hosts.timm import DATA_CONFIG

    cfg: Any = model.pretrained_cfg
    for name in DATA_CONFIG:
        if name in pretrained_cfg and name != "num_classes":
            value = pretrained_cfg[name]
            cfg[name] = tuple(value) if isinstance(value, list) else value
    return model


def _fill(model: nn.Module, saved: nn.Module, arguments: dict[str, Any]) -> None:
    """Give a model with another head the weights of all the rest, as timm does."""
    weights = saved.state_dict()
    wanted = model.state_dict()
    other = [name for name, tensor in weights.items() if name not in wanted or wanted[name].shape != tensor.shape]
    heads = tuple(f"{name}." for name in _heads(saved))
    if not all(name.startswith(heads) for name in other):
        raise ModelError(
            f"{other[0]} of the folder does not fit the arguments {arguments}; load it without them, or with "
            "num_classes alone"
        )
    kept = {name: tensor for name, tensor in weights.items() if name not in other}
    model.load_state_dict(kept, strict=False)


def _heads(model: nn.Module) -> tuple[str, ...]:
    cfg: Any = getattr(model, "pretrained_cfg", {})
    named = cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _of_paper(name: str, original: str, mode: str) -> Callable[..., nn.Module]:
    def make(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from armour_surgery.surgery.conversion import convert

        if pretrained:
            raise ModelError(
                f"{name} has no pretrained weights: none were published; train it, or convert {original} with its own "
                f"weights (armour_surgery.convert(model, {mode!r}, init='calibrated'))"
            )
        taken = {key: value for key, value in kwargs.items() if key not in ("pretrained_cfg", *_PLACES)}
        return convert(timm.create_model(original, **taken), mode, inplace=True)

    return make
