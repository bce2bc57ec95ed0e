"""The exactness oracle for one module: where the merged projections are equal already, surgery must change nothing.

Only the module has real weights, in float64, and only while it is looked at.
"""

import copy
import math
from functools import partial

import torch
from torch import Tensor, nn

from armour_surgery.copies import copy_with
from armour_surgery.coverage.smaller import mapped, outputs_of, smaller
from armour_surgery.measure.difference import largest_difference
from armour_surgery.rewrite import become
from armour_surgery.surgery.operation import Operation
from armour_surgery.surgery.rows import merge
from armour_surgery.traced import Call, FoundSite

__all__ = ["Oracle", "real_copy"]

# What transformers' attentions call the places where a packed sequence begins anew.
_PLACES = "cu_seqlens"


class Oracle:
    """A site as it is asked about several modes: one copy with random weights, and one call.

    `module` is the site, with or without weights; neither it nor its weights play a part.
    """

    def __init__(self, module: nn.Module, found: FoundSite, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._seed = seed
        self._original = real_copy(module, generator)
        call = mapped(found.call, partial(_argument, generator))
        core = found.traced.core
        _cut_evenly(call, core.q.meta["value"].shape[core.q_axes[0]])
        self._call = smaller(self._original, call)

    def difference(self, operation: Operation) -> float:
        """The largest relative difference that a conversion makes where it must make none; in eval and train mode."""
        original = copy.deepcopy(self._original)
        merge(original, operation.found.traced, operation.mode)
        converted = copy.deepcopy(original)
        become(converted, operation.rewritten, operation.cls)
        worst = 0.0
        for training in (False, True):
            # Not chained: the train() of some modules returns nothing.
            original.train(training)
            converted.train(training)
            try:
                wanted = outputs_of(original, self._call, self._seed)
            except Exception:
                if training:
                    continue  # it takes other calls while it trains
                raise
            worst = max(worst, largest_difference(wanted, outputs_of(converted, self._call, self._seed)))
        return worst


def real_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy on the CPU with random weights in float64. Every bias and scale has a value of its own: zeros and ones
    would hide mistakes. Tables that a module computed when it was built stay as they are."""
    copied = copy_with(module, _in_doubles)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if parameter.is_floating_point():
                parameter.copy_(_weight(name, parameter, generator))
        for name, buffer in copied.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * _noise(buffer, generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + _noise(buffer, generator).abs())
    for child in copied.modules():
        if isinstance(child, nn.Dropout):
            child.p = child.p or 0.1
    return copied


def _in_doubles(tensor: Tensor) -> Tensor:
    dtype = _double(tensor.dtype)
    if tensor.is_meta:
        made = torch.zeros(tensor.shape, dtype=dtype)
    else:
        made = tensor.detach().to("cpu", dtype, copy=True)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, tensor.requires_grad)
    return made


def _double(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn in single precision: as random, and twice as fast.
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def _weight(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = _noise(like, generator)
    if like.ndim > 1:
        # Such that what it is applied to keeps its size.
        return noise / math.sqrt(max(1, like[0].numel()))
    # Norms and scales are near one, biases near zero.
    return 1 + 0.2 * noise if name.endswith(("weight", "scale", "gamma")) else 0.3 * noise


def _argument(generator: torch.Generator, tensor: Tensor) -> Tensor:
    dtype = _double(tensor.dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(tensor.shape, generator=generator, dtype=dtype)
    if dtype == torch.bool:
        # A mask: whichever way round it is meant, nearly every row has something that is seen.
        return torch.rand(tensor.shape, generator=generator) < 0.5
    return torch.zeros(tensor.shape, dtype=dtype)


def _cut_evenly(call: Call, tokens: int) -> None:
    """Give the places where a packed sequence is cut into images their numbers: zeros would be images of no size."""
    places = call.kwargs.get(_PLACES)
    if isinstance(places, Tensor):
        places.copy_(torch.linspace(0, tokens, len(places)))
