"""timm before 1.0.31 forgets what a model was built with (`depth=6`); it is kept here, so that models can be saved."""

import functools
from collections.abc import Callable
from typing import Any

from timm import models
from timm.models import _factory
from torch import nn

__all__ = ["register"]

# What `create_model` hands its builders besides the caller's arguments.
_OF_TIMM = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def register() -> None:
    """Have `create_model` keep its arguments on the model, under the name that newer versions of timm use.

    The lookup of builders is wrapped, since `create_model` itself may have been imported by its users already.
    """
    if not hasattr(models, "get_model_traits"):  # which came together with the arguments
        _factory.model_entrypoint = _handing_out_keepers(_factory.model_entrypoint)


def _handing_out_keepers(find: Callable[..., Callable[..., nn.Module]]) -> Callable[..., Callable[..., nn.Module]]:
    @functools.wraps(find)
    def model_entrypoint(*args: Any, **kwargs: Any) -> Callable[..., nn.Module]:
        return _keeper(find(*args, **kwargs))

    return model_entrypoint


def _keeper(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(build)
    def build_and_keep(**kwargs: Any) -> Any:
        model: Any = build(**kwargs)
        given = {key: value for key, value in kwargs.items() if key not in _OF_TIMM}
        # A builder may have had another model created, and changed it.
        model._model_args = {**getattr(model, "_model_args", {}), **given}
        return model

    return build_and_keep
