"""What a library reads beside the weights of a saved folder, to load it like any other model of its own."""

import copy
import json
from pathlib import Path
from typing import Any

from torch import nn

from armour_surgery.records import Source

__all__ = ["CONFIG", "PROCESSOR", "TIMM_FOLDER", "is_config_of_ours", "write_config"]

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
        text = json.dumps(_of_timm(model), indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
    elif source.library == "transformers":
        from armour_surgery.hosts.preprocessing import write_processor

        config: Any = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        config.to_json_file(folder / CONFIG)
        write_processor(model, folder)


def is_config_of_ours(path: Path) -> bool:
    """Whether a config.json is one that `write_config` wrote."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(told, dict) and (told.get("architecture") == TIMM_FOLDER or "armour_surgery" in told)


def _of_timm(model: nn.Module) -> dict[str, Any]:
    """What timm reads of its own folders."""
    from armour_surgery.hosts.timm import example, jsonable

    # What JSON cannot hold is a function that made weights fit.
    cfg = jsonable(getattr(model, "pretrained_cfg", None) or {})
    told = {name: value for name, value in cfg.items() if name not in _OF_WEIGHTS and value is not None}
    ((told["input_size"], _),) = example(model).values()
    classes = getattr(model, "num_classes", None)
    if classes is not None:
        told["num_classes"] = classes
    features = getattr(model, "num_features", None)
    return {"architecture": TIMM_FOLDER, "num_classes": classes, "num_features": features, "pretrained_cfg": told}
