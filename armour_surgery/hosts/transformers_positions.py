"""Weights of transformers' models for images of another size than they were trained on."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from armour_surgery.calls import run
from armour_surgery.examples import arguments_of, part_of
from armour_surgery.hosts.checkpoint import Difference
from armour_surgery.hosts.examples import keep_image_size
from armour_surgery.hosts.transformers_inputs import example

__all__ = ["Fill", "fitted"]

# Makes a model of a config and fills it; what of the weights did not fit.
Fill = Callable[[PreTrainedConfig], tuple[nn.Module, Difference]]
# By its name in the library; what has it says how it would be asked for other positions.
METHOD = "interpolate_pos_encoding"


def fitted(
    cls: type[PreTrainedModel], config: PreTrainedConfig, own: PreTrainedConfig, wrong: Difference, fill: Fill
) -> tuple[nn.Module, Difference, str] | None:
    """A model for images of `config`'s size, with weights whose tables are for another size; None if there is none.

    `own` is the config without the size that was asked for. Where a model interpolates its positions by itself, it
    keeps them, and is fed images of that size. Elsewhere they are resampled once, as the model itself does it where it
    is asked to; the text, the end of a sentence about the weights, then says so.
    """
    size = _image_size(config)
    if own is not config and size is not None and size[0] == size[1] and _runs_on(cls, own, size[0]):
        model, difference = fill(own)
        if not difference.wrong.keys() & wrong.wrong.keys():
            keep_image_size(model, example(model), size[0])
            return model, difference, ""
    resampled = _resampled(cls, config, wrong, fill)
    if resampled is None or own is not config:
        return resampled
    return *resampled[:2], f"{resampled[2]}; --img-size builds the model for another size"


def _resampled(
    cls: type[PreTrainedModel], config: PreTrainedConfig, wrong: Difference, fill: Fill
) -> tuple[nn.Module, Difference, str] | None:
    model, size = _empty(cls, config), _image_size(config)
    tables: dict[str, str] = {}
    for key in wrong.wrong:
        if owner := _interpolating(model, key):
            tables[key] = owner
    sizes = {_size_of_table(config, *wrong.wrong[key]) for key in tables}
    trained = next(iter(sizes), None)
    if size is None or trained is None or len(sizes) > 1:
        return None
    source, difference = fill(_with_image_size(config, trained))
    if difference.wrong.keys() & tables.keys():
        return None
    state = source.state_dict()
    for key, owner in tables.items():
        wanted = wrong.wrong[key][1]
        # Of the embeddings it looks at the shape alone.
        embeddings = torch.zeros(1, *wanted[-2:])
        try:
            with torch.no_grad():
                state[key] = getattr(source.get_submodule(owner), METHOD)(embeddings, *size).reshape(wanted)
        except Exception:
            # Some take other arguments, or give something else than a table of places.
            return None
    model = cls(copy.deepcopy(config))
    model.load_state_dict(state)
    return (
        model,
        difference,
        (f"for images of {trained} x {trained} pixels: resampled {', '.join(tables)} for {size[0]} x {size[1]}"),
    )


def _interpolating(model: nn.Module, key: str) -> str | None:
    """The module that interpolates the table of that name: its owner, or where that is an embedding, the one around."""
    owner = key.rpartition(".")[0]
    for name in (owner, owner.rpartition(".")[0]):
        if hasattr(model.get_submodule(name), METHOD):
            return name
    return None


def _size_of_table(config: PreTrainedConfig, in_file: tuple[int, ...], wanted: tuple[int, ...]) -> int | None:
    """The height and width of the square images that a file's table is for, in pixels."""
    size, patch = _image_size(config), getattr(_vision(config), "patch_size", None)
    if size is None or type(patch) is not int or len(in_file) < 2 or in_file[-1] != wanted[-1]:
        return None
    # Class tokens have places of their own.
    others = wanted[-2] - (size[0] // patch) * (size[1] // patch)
    side = math.isqrt(max(0, in_file[-2] - others))
    return side * patch if side and others >= 0 and side**2 == in_file[-2] - others else None


def _runs_on(cls: type[PreTrainedModel], config: PreTrainedConfig, size: int) -> bool:
    """Whether a model runs on images of another size than it was built for, without being told to."""
    try:
        model = _empty(cls, config).eval()
        keep: Mapping[str, Any] = example(model)
        inputs = {}
        for name, (shape, dtype) in keep.items():
            sizes = (shape[0], size, size) if len(shape) == 3 else shape
            inputs[name] = torch.empty(1, *sizes, dtype=dtype, device="meta")
        run(model.get_submodule(part_of(inputs)), arguments_of(inputs))
    except Exception:
        # Hosts say in their own ways that they do not take such images.
        return False
    return True


def _empty(cls: type[PreTrainedModel], config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = cls(copy.deepcopy(config))
    return model


def _with_image_size(config: PreTrainedConfig, size: int) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    _vision(changed).image_size = size
    return changed


def _image_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    size = getattr(_vision(config), "image_size", None)
    if type(size) is int:
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return size[0], size[1]
    return None


def _vision(config: PreTrainedConfig) -> Any:
    return getattr(config, "vision_config", None) or config
