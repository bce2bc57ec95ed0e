"""What a library reads beside the weights of a saved folder, to load it like any other model of its own."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.records import Source

__all__ = ["CONFIG", "PROCESSOR", "TIMM_FOLDER", "is_config_of_ours", "placeholders", "write_config"]

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
# The architecture that a folder of a timm model names: whoever creates it finds the rest in surgery.json.
TIMM_FOLDER = "armour_surgery_folder"
# Where weights lay, and what is told of them, is not true of the ones in the folder.
_OF_WEIGHTS = (
    "architecture",
    "custom_load",
    "file",
    "hf_hub_filename",
    "hf_hub_id",
    "notes",
    "source",
    "state_dict",
    "tag",
    "url",
)


def write_config(model: nn.Module, source: Source, folder: Path) -> None:
    """Write what timm and transformers read of a folder; the other libraries read nothing."""
    if source.library == "timm":
        from armour_surgery.hosts.timm import example

        ((shape, _),) = example(model).values()
        text = json.dumps(_of_timm(model, shape), indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
    elif source.library == "transformers":
        from armour_surgery.hosts.preprocessing import write_processor

        config: Any = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        config.to_json_file(folder / CONFIG)
        write_processor(model, folder)


def placeholders(model: nn.Module) -> dict[str, Tensor]:
    """One number for each projection that the surgery removed, under the name that its weight had.

    A stock class of transformers finds a weight of the wrong size by it, and fails; without it, it would draw one.
    """
    numbers = {}
    for fqn, module in model.named_modules():
        # The surgery leaves None where a module was.
        gone = [name for name, child in module._modules.items() if child is None]
        for name in gone:
            numbers[f"{fqn}.{name}.weight" if fqn else f"{name}.weight"] = torch.zeros(1)
    return numbers


def is_config_of_ours(path: Path) -> bool:
    """Whether a config.json is one that `write_config` wrote."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(told, dict) and (told.get("architecture") == TIMM_FOLDER or "armour_surgery" in told)


def _of_timm(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """What timm reads of its own folders, for a model that takes images of this shape."""
    cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    told: dict[str, Any] = {}
    for name, value in cfg.items():
        # What JSON cannot hold is a function that made weights fit.
        if name not in _OF_WEIGHTS and _is_plain(value):
            told[name] = value
    told["input_size"] = shape
    classes = getattr(model, "num_classes", None)
    if classes is not None:
        told["num_classes"] = classes
    features = getattr(model, "num_features", None)
    return {"architecture": TIMM_FOLDER, "num_classes": classes, "num_features": features, "pretrained_cfg": told}


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return value is not None
