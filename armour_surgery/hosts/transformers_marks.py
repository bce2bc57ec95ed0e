"""Converted models of transformers have configs of their own, so that nothing takes them for unconverted ones.

The config of a converted `ViTForImageClassification` is an `ArmourViTConfig` of type `armour_vit`, which carries the
surgery. `AutoModel` finds `ArmourViTForImageClassification` for it: that does the surgery when it is built, so that
`from_pretrained` meets the weights that there are, and is a `ViTForImageClassification` from then on.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from armour_surgery.errors import UsageError

__all__ = ["PLAN", "PREFIX", "config_class", "mark", "model_class", "placeholders", "replays", "stock_class"]

PREFIX = "armour_"
# The entry of a config that holds what is to be done when a model is built.
PLAN = "armour_surgery"

# One class for each class, so that two converted models of one class still have the same one.
_CONFIGS: dict[type, type] = {}
_MODELS: dict[type, type] = {}

Replay = Callable[[nn.Module, Mapping[str, Any]], None]
_replays: list[Replay] = []


def replays(replay: Replay) -> None:
    """Say how a surgery is done on a fresh model: the floors above know it."""
    _replays[:] = [replay]


def config_class(kind: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of a converted model's config: of a type of its own."""
    if kind in _CONFIGS.values():
        return kind
    if kind not in _CONFIGS:
        members = {"model_type": f"{PREFIX}{kind.model_type}", "__module__": kind.__module__}
        _CONFIGS[kind] = type(f"Armour{kind.__name__}", (_ConvertedConfig, kind), members)
    return _CONFIGS[kind]


class _ConvertedConfig:
    """What a converted model's config has over its stock class, which comes next among the bases."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: with the names of the classes that do the surgery, which no pipeline takes for stock ones."""
        entries: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        named = entries.get("architectures") or ()
        if named:
            entries["architectures"] = [name if name.startswith("Armour") else f"Armour{name}" for name in named]
        return entries


def model_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of a converted model."""
    if kind in _MODELS.values():
        return kind
    if kind not in _MODELS:
        members: dict[str, Any] = {"__module__": kind.__module__, "config_class": config_class(kind.config_class)}
        _MODELS[kind] = type(f"Armour{kind.__name__}", (_Converted, kind), members)
    return _MODELS[kind]


def stock_class(kind: type) -> type:
    """The class that a converted model's own derives from; any other class itself."""
    return next((stock for stock, converted in _MODELS.items() if converted is kind), kind)


class _Converted:
    """What is built for the config of a converted model; its stock class comes next among the bases."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        plan = getattr(config, PLAN, None)
        # A tower that is built inside of a model, by its own config, has had its surgery then.
        if plan is not None and not any("surgery" in vars(module) for module in model.modules()):
            if not _replays:
                raise UsageError(f"{type(self).__name__} is built by its name alone after `import armour_surgery`")
            _replays[0](model, plan)
        # The file has an entry of one number for each projection that is gone; transformers would report them.
        known = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = known | set(map(re.escape, placeholders(model)))
        object.__setattr__(self, "__class__", stock_class(type(self)))


def placeholders(model: nn.Module) -> list[str]:
    """Names that the unconverted model has for weights of projections that the surgery removed."""
    names = []
    for fqn, module in model.named_modules():
        # The surgery leaves None where a module was.
        gone = [name for name, child in module._modules.items() if child is None]
        names += [f"{fqn}.{name}.weight" if fqn else f"{name}.weight" for name in gone]
    return names


def mark(model: nn.Module, plan: Mapping[str, Any] | None) -> None:
    """Give the config of a converted model the class that says so, and the plan."""
    config: Any = model.config
    # Whoever holds this config (each submodule does) has to see the change; a new object would reach only one of them.
    object.__setattr__(config, "__class__", config_class(type(config)))
    # A config that was read from JSON has the type on itself as well, where it would hide that of its class.
    vars(config).pop("model_type", None)
    if plan is not None:
        setattr(config, PLAN, dict(plan))
