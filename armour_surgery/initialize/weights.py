"""Read and write the linear maps of an attention as matrices, wherever and however the host stores them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from armour_surgery.traced import OutputProjection, Producer, Role, rows_of

__all__ = [
    "Stored",
    "applied_weight",
    "batch_norm_affine",
    "has_bias",
    "locate",
    "normalize",
    "read",
    "read_output",
    "write",
    "write_output",
]


@dataclass(frozen=True)
class Stored:
    """Where the channels of q, k or v are: row `rows[h, j]` of `weight` makes dimension j of head h.

    `biases[h][j]` is a parameter and an index into it, or None where the host has no bias. `norm` names the BatchNorm
    that follows, whose channels are those of `weight`. `out_axes` are those of its producer. Names are inside the site.
    """

    weight: str
    rows: Tensor
    biases: tuple[tuple[tuple[str, int] | None, ...], ...]
    norm: str | None
    out_axes: tuple[int, ...] = ()


def locate(
    module: nn.Module, role: Role, kept: Mapping[str, tuple[int, ...]], start: int = 0, stop: int | None = None
) -> Stored:
    """Where dimensions `start` to `stop` (None: all that follow) of a role are stored.

    `kept` tells, by tensor name, which old rows a tensor still has, in their new order; others have all.
    """
    producer = role.producer
    owner = producer.weight.rpartition(".")[0]
    # Of the tensors with a row per channel, those beside the weight are its bias, those elsewhere a BatchNorm's.
    parameters = dict(module.named_parameters())
    own_bias = None
    others = set()
    for name in producer.rows:
        holder = name.rpartition(".")[0]
        if holder != owner:
            others.add(holder)
        elif name != producer.weight and own_bias is None and name in parameters:
            own_bias = name
    norms = [name for name in sorted(others) if isinstance(module.get_submodule(name), _BatchNorm)]

    def now(name: str, row: int) -> int:
        return kept[name].index(row) if name in kept else row

    def bias(channel: int) -> tuple[str, int] | None:
        # A host may add its bias from pieces (BEiT: that of Q, zeros for K, that of V); only parameters can be written.
        for piece in producer.bias:
            if piece.start <= channel < piece.stop:
                name = piece.tensor
                if name is None or name not in parameters:
                    return None
                return name, now(name, piece.first_row + channel - piece.start)
        return (own_bias, now(own_bias, channel)) if own_bias else None

    rows, biases = [], []
    for head in role.channels:
        channels = head[start:stop]
        rows.append([now(producer.weight, producer.first_row + channel) for channel in channels])
        biases.append(tuple(map(bias, channels)))
    return Stored(producer.weight, torch.tensor(rows), tuple(biases), norms[0] if norms else None, producer.out_axes)


def applied_weight(module: nn.Module, producer: Producer, kept: Mapping[str, tuple[int, ...]]) -> Tensor:
    """The rows of a weight that a projection applies, as it gets them; `kept` as for `locate`."""
    weight = module.get_parameter(producer.weight)
    first, stop = producer.first_row, producer.first_row + producer.channels
    rows: Sequence[int] = kept.get(producer.weight, range(len(weight)))
    own = [place for place, row in enumerate(rows) if first <= row < stop]
    return weight.detach()[own[0] : own[-1] + 1]


def has_bias(stored: Stored) -> bool:
    """Whether every channel can be given a constant."""
    # A BatchNorm that follows has one for every channel.
    return stored.norm is not None or not any(None in head for head in stored.biases)


def read(module: nn.Module, stored: Stored) -> Tensor:
    """The map as `[H, D + 1, d]` in float64, biases in the last row, a following BatchNorm (in eval mode) folded in."""
    rows = stored.rows
    stored_weight = module.get_parameter(stored.weight).detach().double().cpu()
    weight = rows_of(stored_weight, stored.out_axes).flatten(1)[rows]
    offset = torch.zeros(rows.shape, dtype=torch.float64)
    for head, entries in enumerate(stored.biases):
        for place, entry in enumerate(entries):
            if entry is not None:
                offset[head, place] = module.get_parameter(entry[0]).detach()[entry[1]].double()
    if stored.norm is not None:
        scale, shift = batch_norm_affine(module, stored.norm)
        weight, offset = weight * scale[rows][..., None], offset * scale[rows] + shift[rows]
    return torch.cat([weight, offset[..., None]], dim=-1).mT


def write(module: nn.Module, stored: Stored, matrix: Tensor, moment: Tensor) -> None:
    """Store `matrix [H, D + 1, d]`; `read` then returns it (the last row only where the host has a bias).

    A BatchNorm that follows gets the statistics that tokens with second moment `moment [D + 1, D + 1]` produce, so
    that train mode sees what eval mode computes.
    """
    flat = matrix.mT.reshape(-1, matrix.shape[-2])
    rows = stored.rows.flatten()
    offset = flat[:, -1]
    with torch.no_grad():
        if stored.norm is not None:
            offset = normalize(_batch_norm(module, stored.norm), rows, flat, moment)
        parameter = module.get_parameter(stored.weight)
        shaped = flat[:, :-1].reshape(len(rows), *parameter.shape[1:])
        parameter[rows.to(parameter.device)] = shaped.to(parameter)
        for value, entry in zip(offset, itertools.chain(*stored.biases), strict=True):
            if entry is not None:
                module.get_parameter(entry[0])[entry[1]] = value


def read_output(module: nn.Module, out: OutputProjection) -> tuple[Tensor, Tensor]:
    """The output projection as `[H, e, E]` and its constant `[E]`, in float64, a following BatchNorm folded in."""
    weight = module.get_parameter(out.weight).detach().double().cpu().flatten(1)
    offset = torch.zeros(len(weight), dtype=torch.float64)
    if out.bias is not None:
        offset = module.get_parameter(out.bias).detach().double().cpu()
    if out.norm is not None:
        scale, shift = batch_norm_affine(module, out.norm)
        weight, offset = weight * scale[:, None], offset * scale + shift
    return weight.T[torch.tensor(out.channels)], offset


def write_output(module: nn.Module, out: OutputProjection, matrix: Tensor, offset: Tensor, moment: Tensor) -> None:
    """Store `matrix [H, e, E]` and `offset [E]` (where there is a bias or a BatchNorm).

    `moment [H * e + 1, H * e + 1]` is that of the heads' results, heads outermost, with a last entry 1.
    """
    flat = matrix.flatten(0, 1)
    order = torch.tensor(out.channels).flatten()
    with torch.no_grad():
        if out.norm is not None:
            norm = _batch_norm(module, out.norm)
            augmented = torch.cat([flat, offset[None]]).T
            offset = normalize(norm, torch.arange(len(offset)), augmented, moment)
        parameter = module.get_parameter(out.weight)
        weight = torch.empty(flat.shape[1], flat.shape[0], dtype=torch.float64)
        weight[:, order] = flat.T
        parameter.copy_(weight.reshape(parameter.shape))
        if out.bias is not None:
            module.get_parameter(out.bias).copy_(offset)


def _batch_norm(module: nn.Module, name: str) -> _BatchNorm:
    norm = module.get_submodule(name)
    assert isinstance(norm, _BatchNorm)
    return norm


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance, the tensors themselves."""
    mean, variance = norm.running_mean, norm.running_var
    # A norm that keeps none is no affine map in eval mode.
    assert mean is not None
    assert variance is not None
    return mean, variance


def batch_norm_affine(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """What the BatchNorm of that name does in eval mode: `scale * y + shift`, both `[C]`, in float64."""
    norm = _batch_norm(module, name)
    mean, variance = _statistics(norm)
    scale = (variance.double() + norm.eps).rsqrt().cpu()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double().cpu()
    shift = -mean.double().cpu() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double().cpu()
    return scale, shift


def normalize(norm: _BatchNorm, rows: Tensor, flat: Tensor, moment: Tensor) -> Tensor:
    """Set statistics and affine parameters so that rows of `flat [n, D + 1]` come out as they are; returns zeros.

    With `u` a row and `m`, `V` mean and covariance of the tokens: mean `u m`, variance `u V u`, weight its root.
    """
    running_mean, running_variance = _statistics(norm)
    total = moment[-1, -1]
    mean = moment[-1, :-1] / total
    covariance = moment[:-1, :-1] / total - mean[:, None] * mean
    weight = flat[:, :-1]
    center = weight @ mean
    variance = ((weight @ covariance) * weight).sum(-1).clamp(min=0)
    for tensor, value in (
        (running_mean, center),
        (running_variance, variance),
        (norm.weight, (variance + norm.eps).sqrt()),
        (norm.bias, flat[:, -1] + center),
    ):
        tensor[rows.to(tensor.device)] = value.to(tensor)
    return torch.zeros(len(flat), dtype=torch.float64)
