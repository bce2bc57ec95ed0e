"""Architectures of a library with random weights, as small as they run, and what they answer to noise."""

import copy
from collections.abc import Callable

import torch
import torch.utils._pytree as pytree
from small_configs import shrink
from torch import Tensor, nn

from armour_surgery.calls import run
from armour_surgery.examples import with_numbers
from armour_surgery.hosts.catalog import skeleton
from armour_surgery.hosts.running import example_input
from armour_surgery.measure.cost import count_params
from armour_surgery.saving.any_model import load_any

__all__ = ["images", "outputs", "quiet_outputs", "running"]

_WIDE = 512  # pixels from which on an image is made small where it may have any size
_LARGE = 500_000_000  # parameters from which on a model is run with two layers in every part or not at all


def _builders(library: str, name: str) -> list[Callable[[], nn.Module]]:
    """What may build the architecture with random weights; of transformers, smaller ones first."""
    if library != "transformers":
        return [lambda: load_any(f"{library}:{name}", pretrained=False)[0]]
    import transformers

    from armour_surgery.hosts.transformers_catalog import cut_config

    cls = getattr(transformers, name)
    entries = [cut_config(name)]
    if count_params(skeleton(library, name)[0]) < _LARGE:  # some cannot be cut
        entries.append(cls.config_class().to_dict())
    configs = []
    for config in entries:
        smaller = copy.deepcopy(config)
        configs += [smaller, config] if shrink(smaller) else [config]
    return [lambda config=config: cls(cls.config_class(**config)).eval() for config in configs]  # type: ignore[misc]


def running(library: str, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The architecture, with what it ran on."""
    *smaller, whole = _builders(library, name)
    for build in smaller:
        try:
            return _built(build)
        except Exception:  # not made for small images, or for two layers
            continue
    return _built(whole)


def _built(build: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    original = build()
    one = images(original, 1)
    quiet_outputs(original, one)
    return original, one


def images(model: nn.Module, count: int) -> dict[str, Tensor]:
    """So many images, or what else a model sees, of noise."""
    inputs = with_numbers(example_input(model, count), "cpu")
    least = getattr(model, "pretrained_cfg", {}).get("min_input_size")  # timm says it of models that take any size
    if least is None or inputs["x"].shape[-1] <= _WIDE:
        return inputs
    return {"x": inputs["x"][..., : least[-2], : least[-1]].contiguous()}


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All floating tensors of the output, drawing equal random numbers where the model draws any."""
    torch.manual_seed(0)
    leaves = pytree.tree_leaves(run(model, inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def quiet_outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """`outputs`, without gradients."""
    with torch.no_grad():
        return outputs(model, inputs)
