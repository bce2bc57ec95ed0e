"""transformers: `AutoConfig` and `AutoModel` know the types of converted models, `armour_vit` and so on."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import image_processing_auto, modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping

from armour_surgery.errors import SchemaError
from armour_surgery.hosts.transformers_marks import PREFIX, config_class, model_class, placeholders, replays
from armour_surgery.patching import on_cpu_by_default
from armour_surgery.records import SurgeryPlan
from armour_surgery.saving.document import check_plan
from armour_surgery.saving.replay import replay
from armour_surgery.surgery.parts import converted_parts, plan_of_whole
from armour_surgery.surgery.perform import mark_with

__all__ = ["register"]


def register() -> None:
    """Add the types to transformers' tables; each when it is first asked for."""
    replays(_replay)
    known = _Converted()
    known.update(CONFIG_MAPPING._extra_content)
    CONFIG_MAPPING._extra_content = known
    PreTrainedModel.save_pretrained = _for_converted(PreTrainedModel.save_pretrained)


def _for_converted(save: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained`, such that what it writes of a converted model loads into no class without the surgery.

    An entry of one number stands for each projection that is gone: a stock class finds a weight of the wrong size, and
    fails, instead of filling in random ones. A model that has converted parts in it gets a config that says so first.
    """

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        parts = {} if "surgery" in vars(self) else converted_parts(self)
        if parts:
            mark_with(self, plan_of_whole(self, parts))
        if "surgery" in vars(self) or parts:
            # By the names that modules have: transformers writes older ones by default, and its Trainer cannot resume
            # from those.
            kwargs.setdefault("save_original_format", False)
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            state_dict |= {name: torch.zeros(1) for name in placeholders(self)}
        return save(self, save_directory, *args, state_dict=state_dict, **kwargs)

    return save_pretrained


class _Converted(dict[str, Any]):
    """Configs that others registered, and one for each type that transformers has, made when it is asked for.

    There are hundreds of types, and making one imports its model.
    """

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        return isinstance(key, str) and key.startswith(PREFIX) and key.removeprefix(PREFIX) in CONFIG_MAPPING._mapping

    def __missing__(self, key: str) -> Any:
        stock = CONFIG_MAPPING[key.removeprefix(PREFIX)]
        converted = config_class(stock)
        self[key] = converted
        for table in _tables():
            if stock in table:
                table.register(converted, _converted(table[stock]), exist_ok=True)
        return converted


def _tables() -> Iterator[Any]:
    """What says, by the class of a config, which model or image processor belongs to it."""
    for module in (modeling_auto, image_processing_auto):
        yield from (table for table in vars(module).values() if isinstance(table, _LazyAutoMapping))


def _converted(entry: Any) -> Any:
    """A table's entry for converted models: one class, several, or processors by their backend."""
    if isinstance(entry, tuple | list):
        return type(entry)(map(_converted, entry))
    return model_class(entry) if isinstance(entry, type) and issubclass(entry, nn.Module) else entry


@on_cpu_by_default
def _replay(model: nn.Module, plan: Mapping[str, Any]) -> None:
    """Do the surgery that a config tells of; it may come from anywhere."""
    kind = type(model).__name__
    try:
        surgery = TypeAdapter(SurgeryPlan).validate_python(plan)
        check_plan(surgery)
    except (ValidationError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise SchemaError(
            f"the surgery in the config of this {kind} is none: {first}; take config.json from the folder that was "
            "saved"
        ) from error
    replay(model, _in_names_of(model, surgery))


def _in_names_of(model: nn.Module, surgery: SurgeryPlan) -> SurgeryPlan:
    """The plan in the names of a model with another head, or with none: `AutoModel` gives the base of a classifier."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    present = dict(model.named_modules())

    def named(fqn: str) -> str:
        inside = fqn.removeprefix(prefix)
        return next((name for name in (fqn, inside, f"{prefix}{fqn}") if name in present), fqn)

    sites = tuple(replace(site, fqn=named(site.fqn)) for site in surgery.sites)
    return replace(surgery, sites=sites, parts=tuple(replace(part, fqn=named(part.fqn)) for part in surgery.parts))
