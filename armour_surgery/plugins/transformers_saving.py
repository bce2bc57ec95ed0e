"""transformers: what `save_pretrained` writes of a converted model loads into no class without the surgery.

This is imported when somebody imports transformers' base class: what takes time is imported when a model is saved.
"""

import functools
from collections.abc import Callable
from typing import Any

from transformers.modeling_utils import PreTrainedModel

__all__ = ["register"]


def register() -> None:
    """Wrap `PreTrainedModel.save_pretrained`."""
    PreTrainedModel.save_pretrained = _for_converted(PreTrainedModel.save_pretrained)


def _for_converted(save: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained`, with an entry of one number for each projection that is gone.

    A stock class then finds a weight of the wrong size, and fails, instead of filling in random ones. A model that has
    converted parts in it gets a config that says so first.
    """

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        if any("surgery" in vars(module) for module in self.modules()):
            _mark_whole(self)
            # By the names that modules have: transformers writes older ones by default, and its Trainer cannot resume
            # from those.
            kwargs.setdefault("save_original_format", False)
            state_dict = _with_placeholders(self, state_dict)
        return save(self, save_directory, *args, state_dict=state_dict, **kwargs)

    return save_pretrained


def _mark_whole(model: Any) -> None:
    """A part that was converted by itself cannot know the model that it was put into."""
    from armour_surgery.hosts import mark_converted
    from armour_surgery.surgery.perform import surgery_of

    if "surgery" not in vars(model):
        mark_converted(model, surgery_of(model))


def _with_placeholders(model: Any, state_dict: Any) -> dict[str, Any]:
    import torch

    from armour_surgery.hosts.transformers_marks import placeholders

    whole = dict(model.state_dict() if state_dict is None else state_dict)
    return whole | {name: torch.zeros(1) for name in placeholders(model)}
