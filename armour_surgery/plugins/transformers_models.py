"""The classes that `AutoModel` finds for the configs of converted models: they do the surgery when they are built.

`from_pretrained` then meets the weights that there are. An `ArmourViTForImageClassification` is a
`ViTForImageClassification` as soon as it is built.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import image_processing_auto, modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping

from armour_surgery.copies import align
from armour_surgery.errors import SchemaError
from armour_surgery.hosts.gone import placeholders
from armour_surgery.hosts.transformers_marks import PLAN
from armour_surgery.patching import on_cpu_by_default
from armour_surgery.records import SurgeryPlan
from armour_surgery.saving.document import check_plan
from armour_surgery.saving.replay import replay

__all__ = ["add_models"]


def add_models(stock: type, converted: type) -> None:
    """Add to transformers' tables what belongs to a converted model's config, as they have it for the stock one."""
    for table in _tables():
        if stock in table:
            # `register` of transformers 5.18 leaves out classes whose module is in transformers, as these say of
            # themselves.
            table._extra_content[converted] = _entry(table[stock], converted)


def _tables() -> Iterator[Any]:
    """What says, by the class of a config, which model or image processor belongs to it."""
    for module in (modeling_auto, image_processing_auto):
        yield from (table for table in vars(module).values() if isinstance(table, _LazyAutoMapping))


def _entry(stock: Any, config: type) -> Any:
    """A table's entry for converted models: one class, several, or processors by their backend."""
    if isinstance(stock, tuple | list):
        return type(stock)(_entry(one, config) for one in stock)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        return stock
    members = {"__module__": stock.__module__, "config_class": config, "_stock": stock}
    return type(f"Armour{stock.__name__}", (_Converted, stock), members)


class _Converted:
    """What is built for the config of a converted model; its stock class comes next among the bases."""

    _stock: type

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        plan = getattr(config, PLAN, None)
        # A tower that is built inside of a model, by its own config, has had its surgery then.
        if plan is not None and not any("surgery" in vars(module) for module in model.modules()):
            _replay(model, plan)
        # The file has an entry of one number for each projection that is gone; transformers would report them.
        known = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = known | set(map(re.escape, placeholders(model)))
        object.__setattr__(self, "__class__", self._stock)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it, with weights where torch would have put them; see `align`."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        align(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


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
    mlps = tuple(replace(mlp, fqn=named(mlp.fqn)) for mlp in surgery.mlps)
    parts = tuple(replace(part, fqn=named(part.fqn)) for part in surgery.parts)
    return replace(surgery, sites=sites, mlps=mlps, parts=parts)
