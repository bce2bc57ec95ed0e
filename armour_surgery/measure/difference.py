"""How far two lists of outputs are from each other."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["largest_difference"]


def largest_difference(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest difference over all floating outputs, each in parts of its largest value: max|a - b| / max|a|.

    Infinite where shapes differ, where a value is finite in one of them alone (what is masked comes out as minus
    infinity in both), and where no value is finite.
    """
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in got]:
        return math.inf
    worst = 0.0
    for before, after in zip(wanted, got, strict=True):
        if not before.is_floating_point() or not before.numel():
            continue
        finite = before.isfinite()
        if not finite.any() or not after[finite].isfinite().all() or not torch.equal(before[~finite], after[~finite]):
            return math.inf
        largest = before[finite].abs().max().clamp_min(torch.finfo(before.dtype).tiny)
        worst = max(worst, float((before - after)[finite].abs().max() / largest))
    return worst
