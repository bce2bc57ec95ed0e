"""How far the weights that a site has now are from those it had: zero where the sharing changes nothing."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from armour_surgery.rewrite.grouped import group_of_output
from armour_surgery.traced import rows_of

__all__ = ["Share", "residual"]


@dataclass(frozen=True)
class Share:
    """Rows `old_rows` of tensor `old` are replaced by rows `new_rows` of tensor `new`.

    `old_axes` and `new_axes` are their `Producer.out_axes`. With `groups`, by the slices of their own rows that a
    grouped projection reads.
    """

    old: str
    old_rows: tuple[int, ...]
    new: str
    new_rows: tuple[int, ...]
    groups: int = 1
    shuffle: bool = False
    old_axes: tuple[int, ...] = ()
    new_axes: tuple[int, ...] = ()


def residual(module: nn.Module, shares: list[Share]) -> float | None:
    """`||W_old - W_new||_F / ||W_old||_F` over all shared roles of a site, before its surgery; None without weights."""
    lost: list[float] = []
    total: list[float] = []
    for share in shares:
        old, new = module.get_parameter(share.old).detach(), module.get_parameter(share.new).detach()
        if old.is_meta:
            return None
        first = rows_of(old, share.old_axes)[list(share.old_rows)].double()
        second = rows_of(new, share.new_axes)[list(share.new_rows)].double()
        # A grouped projection reads a slice of the input in each row: outside of it, its weight counts as zero.
        if share.groups > 1:
            group = group_of_output(len(share.new_rows), share.groups, share.shuffle)
            slices = torch.nn.functional.one_hot(group, share.groups).double().to(second.device)
            second = (second.reshape(len(group), share.groups, -1) * slices[..., None]).reshape(second.shape)
        lost.append(_norm(first - second))
        total.append(_norm(first))
    size = math.hypot(*total)
    return math.hypot(*lost) / size if size else 0.0


def _norm(matrix: torch.Tensor) -> float:
    """The Frobenius norm, also where squares of the entries overflow, or come to nothing."""
    largest = float(matrix.abs().max())
    return largest * float((matrix / largest).norm()) if largest else 0.0
