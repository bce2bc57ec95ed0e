"""transformers' base class: a converted model's `save_pretrained` writes what no class without the surgery loads.

This is imported when somebody imports transformers' base class: what takes time is imported when a model is saved.
"""

import functools
from collections.abc import Callable
from typing import Any

from transformers.modeling_utils import PreTrainedModel

__all__ = ["register"]


def register() -> None:
    """Wrap what `PreTrainedModel` saves and draws."""
    PreTrainedModel.save_pretrained = _for_converted(PreTrainedModel.save_pretrained)
    PreTrainedModel._initialize_weights = _with_stand_ins(PreTrainedModel._initialize_weights)


def _for_converted(save: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained`, with an entry of one number for each projection that is gone.

    A stock class then finds a weight of the wrong size, and fails, instead of filling in random ones. A model that has
    converted parts in it gets a config that says so first.
    """

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        if any("surgery" in vars(module) for module in self.modules()):
            from armour_surgery.hosts.gone import with_placeholders

            _mark_whole(self)
            # By the names that modules have: transformers writes older ones by default, and its Trainer cannot resume
            # from those.
            kwargs.setdefault("save_original_format", False)
            state_dict = with_placeholders(self, state_dict)
        return save(self, save_directory, *args, state_dict=state_dict, **kwargs)

    return save_pretrained


def _with_stand_ins(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """What draws a module's weights, also where a projection is gone."""

    @functools.wraps(initialize)
    def _initialize_weights(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        if None not in module._modules.values():  # every module of every model comes by here
            return initialize(self, module, *args, **kwargs)
        from armour_surgery.hosts.gone import with_stand_ins

        return with_stand_ins(functools.partial(initialize, self), module, *args, **kwargs)

    return _initialize_weights


def _mark_whole(model: Any) -> None:
    """A part that was converted by itself cannot know the model that it was put into."""
    from armour_surgery.hosts import mark_converted
    from armour_surgery.surgery.perform import surgery_of

    if "surgery" not in vars(model):
        mark_converted(model, surgery_of(model))
