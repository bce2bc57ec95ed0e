"""Converted models of transformers have configs of their own, so that nothing takes them for unconverted ones.

The config of a converted `ViTForImageClassification` is an `ArmourViTConfig` of type `armour_vit`, which carries the
surgery; the model's class stays what it was.
"""

import json
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from armour_surgery.records import SurgeryPlan

__all__ = ["PLAN", "PREFIX", "config_class", "mark", "stock_config_class"]

PREFIX = "armour_"
# The entry of a config that holds what is to be done when a model is built.
PLAN = "armour_surgery"

# One class for each class, so that configs of two converted models still have the same type.
_CONFIGS: dict[type, type] = {}


def config_class(kind: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of a converted model's config: of a type of its own."""
    if kind in _CONFIGS.values():
        return kind
    if kind not in _CONFIGS:
        members = {"model_type": f"{PREFIX}{kind.model_type}", "__module__": kind.__module__}
        _CONFIGS[kind] = type(f"Armour{kind.__name__}", (_ConvertedConfig, kind), members)
    return _CONFIGS[kind]


def stock_config_class(kind: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of the config that the model had before, for that of a converted model."""
    return next(stock for stock, converted in _CONFIGS.items() if converted is kind)


class _ConvertedConfig:
    """What a converted model's config has over its stock class, which comes next among the bases."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: with the names of the classes that do the surgery, which no pipeline takes for stock ones."""
        entries: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        named = entries.get("architectures") or ()
        if named:
            entries["architectures"] = [name if name.startswith("Armour") else f"Armour{name}" for name in named]
        return entries


def mark(model: nn.Module, plan: SurgeryPlan | None) -> None:
    """Give the config of a converted model the class that says so, and what of the plan it takes to do it again."""
    config: Any = model.config
    # Whoever holds this config (each submodule does) has to see the change; a new object would reach only one of them.
    object.__setattr__(config, "__class__", config_class(type(config)))
    # A config that was read from JSON has the type on itself as well, where it would hide that of its class.
    vars(config).pop("model_type", None)
    if plan is not None:
        # What was weighed and measured can be long.
        short = replace(plan, refused=(), source=None, fidelity=None, sensitivities=(), frontier=(), original={})
        setattr(config, PLAN, json.loads(json.dumps(short.to_dict())))
