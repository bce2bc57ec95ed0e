"""What a model costs: its parameters and its multiply-accumulates, counted and not estimated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from armour_surgery.altered import run_weightless
from armour_surgery.calls import run, without_fast_paths
from armour_surgery.copies import copy_of_zeros, meta_copy
from armour_surgery.errors import ExampleInputError
from armour_surgery.examples import batch_of, on_meta, part_of, shapes_of, with_numbers
from armour_surgery.shapes import RememberedShapes

__all__ = ["CostReport", "count_folded_params", "count_macs", "count_params"]

_FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class CostReport:
    """Multiply-accumulates for one image.

    `macs` is the whole model's. `by_module` has every module that did some, by fully qualified name, each
    including the modules inside it; the model itself is "". Matrix products and convolutions are counted,
    wherever they come from; softmax, normalization and element-wise work are not. `batch_size` is what the
    total was divided by.
    """

    macs: int
    by_module: dict[str, int] = field(default_factory=dict)
    batch_size: int = 1

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"macs": self.macs, "by_module": dict(self.by_module)}


def count_params(module: nn.Module) -> int:
    """How many numbers the parameters hold; one with several names counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_folded_params(module: nn.Module) -> int:
    """Parameters that would be left after each BatchNorm is folded into the Linear or convolution beside it.

    Folded into the layer before it, or into the layer after it, a BatchNorm leaves a bias where that layer
    had none, and nothing else. One with neither neighbor among its siblings is counted as it is.
    """
    return count_params(module) - sum(_saved_by_folding(parent) for parent in module.modules())


def count_macs(model: nn.Module, example: Mapping[str, Any]) -> CostReport:
    """Count the multiply-accumulates of a model on an example in eval mode, for one image.

    `example` maps argument names to tensors whose first axis is the batch (that of the first tensor is
    taken), or nested arguments as in `examples.py`. It may be on any device, meta included. The count is made on a
    copy on the meta device: neither
    weights nor inputs are needed, the model is neither run nor changed, and the result does not depend on
    the attention kernel or the torch version. A model whose control flow needs values is run on the CPU
    instead, on inputs and weights of zero.

    Raises:
        ExampleInputError: the model did not accept the example, on meta or on the CPU.
    """
    if not example:
        raise ExampleInputError("no example input: pass a dictionary from argument names to tensors")
    batch_size = batch_of(example)
    try:
        inputs = on_meta(example)
        flops = run_weightless(partial(meta_copy, model), lambda copied: _run(copied.eval(), inputs))
    except Exception:
        flops = _run_on_zeros(model, example)
    # A name arrives as the class of what ran, a dot, and the fqn inside of it.
    prefix = part_of(example)
    by_module = {}
    for name, count in flops.items():
        if name != "Global":
            by_module[".".join(filter(None, (prefix, name.partition(".")[2])))] = count
    return CostReport(
        macs=_per_image(flops.get("Global", 0), batch_size),
        by_module={name: _per_image(count, batch_size) for name, count in by_module.items() if count},
        batch_size=batch_size,
    )


def _per_image(flops: int, batch_size: int) -> int:
    return flops // (_FLOPS_PER_MAC * batch_size)


class _ForwardTracker(ModuleTracker):
    """Tells in which modules a forward is, and prepares for no backward."""

    # To follow a backward, torch's tracker hooks the gradients of all that goes into a module, and fails on a view that
    # was made without gradients of a parameter that has some (`cls_token.expand(B, -1, -1)`).
    def _fw_pre_hook(self, mod: nn.Module, input: Any) -> None:
        super()._fw_pre_hook(mod, ())

    def _fw_post_hook(self, mod: nn.Module, input: Any, output: Any) -> None:
        super()._fw_post_hook(mod, (), ())


def _run(model: nn.Module, example: Mapping[str, Any]) -> dict[str, int]:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _ForwardTracker()
    # The fused CPU kernel has no FLOP formula before torch 2.15; the plain products always have one. Which kernels may
    # run is set for all threads: inside `without_fast_paths`, which lets in one thread at a time, or of two that
    # overlap the second would put back what the first had set, and the process would be left without fused attention.
    with torch.no_grad(), without_fast_paths(), sdpa_kernel(SDPBackend.MATH), RememberedShapes(), counter:
        run(model, example)
    return {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}


def _run_on_zeros(model: nn.Module, example: Mapping[str, Any]) -> dict[str, int]:
    try:
        copy = copy_of_zeros(model, part_of(example)).eval()
        return _run(copy, with_numbers(example, "cpu", noise=False))
    except Exception as error:
        raise ExampleInputError(
            f"{type(model).__name__} could not run on inputs of shape {shapes_of(example)}: "
            f"{type(error).__name__}: {error}; pass as the example what its forward takes"
        ) from error


def _saved_by_folding(parent: nn.Module) -> int:
    """Parameters that go when the BatchNorms directly inside `parent` are folded into their siblings."""
    # A Dropout does nothing at inference, so a norm folds across it.
    children = [child for child in parent.children() if not isinstance(child, nn.Dropout)]
    saved = 0
    for index, norm in enumerate(children):
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        before = children[index - 1] if index else None
        after = children[index + 1] if index + 1 < len(children) else None
        for layer, channels in ((before, _channels(before)[1]), (after, _channels(after)[0])):
            if isinstance(layer, nn.Linear | nn.Conv2d) and channels == norm.num_features:
                bias = 0 if layer.bias is not None else _channels(layer)[1]
                saved += count_params(norm) - bias
                break
    return saved


def _channels(layer: nn.Module | None) -> tuple[int, int]:
    """Channels that go in and that come out; zeros for what is neither a Linear nor a convolution."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return 0, 0
