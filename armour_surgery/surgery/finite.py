"""Before any work: the weights that a conversion reads hold numbers to compute with."""

from collections.abc import Iterable

import torch
from torch import nn

from armour_surgery.errors import NotFiniteError
from armour_surgery.rewrite.edits import tensor_named
from armour_surgery.traced import FoundSite

__all__ = ["refuse_not_finite"]

# Products of larger numbers overflow single precision.
_LARGEST = torch.finfo(torch.float32).max ** 0.5


def refuse_not_finite(model: nn.Module, sites: Iterable[FoundSite], *, computing: bool) -> None:
    """Refuse a model in which q, k or v of one of the sites is made with weights that are NaN or infinite.

    With `computing` new weights are worked out from the old ones: then the output projections count too, and so do
    enormous numbers, and all other layers, which may be read (the norms before the sites) or run.

    Raises:
        NotFiniteError: it names the first such tensor, what it holds, and the site.
    """
    for found in sites:
        module = model.get_submodule(found.fqn)
        for name in _tensors_of(found, computing):
            held = _unusable(tensor_named(module, name), _LARGEST if computing else None)
            if held is not None:
                raise NotFiniteError(
                    f"{found.fqn or type(model).__name__} cannot be converted: its {name} holds {held}. Load sound "
                    f"weights, or leave this attention out with exclude={found.fqn!r}"
                )
    if not computing:
        return
    for name, parameter in model.named_parameters():
        # Other parameters may be infinite for a reason, as masks are.
        held = _unusable(parameter) if name.rpartition(".")[2] in ("weight", "bias") else None
        if held is not None:
            raise NotFiniteError(
                f"{name} of {type(model).__name__} holds {held}, and new weights are worked out from what it makes of "
                "its inputs. Load sound weights, or use init 'wq' without a rank, which reads the attentions alone"
            )


def _tensors_of(found: FoundSite, computing: bool) -> list[str]:
    """The parameters and buffers, by name inside the site, that the projections of a site are made of."""
    names: dict[str, None] = {}
    for role in found.traced.roles:
        names.update(dict.fromkeys(role.producer.rows))
        for piece in role.producer.bias:
            if piece.tensor is not None:
                names[piece.tensor] = None
    if computing and found.output is not None:
        for name in (found.output.weight, found.output.bias):
            if name is not None:
                names[name] = None
    return list(names)


def _unusable(tensor: torch.Tensor, largest: float | None = None) -> str | None:
    """The largest number of a tensor, where it is not finite or above `largest`."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return None
    most = float(tensor.detach().abs().max())  # NaN if there is one
    limit = torch.finfo(torch.float64).max if largest is None else largest
    return None if most <= limit else f"{most:g}"
