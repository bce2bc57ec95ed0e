"""The exactness oracle for one module: where the merged projections are equal already, surgery must change nothing.

Only the module has real weights, in float64, and only while it is looked at.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from armour_surgery.copies import copy_with
from armour_surgery.coverage.smaller import mapped, outputs_of, smaller
from armour_surgery.discover.match import all_above
from armour_surgery.measure.difference import largest_difference
from armour_surgery.modes import get_mode
from armour_surgery.rewrite import become
from armour_surgery.rewrite.contract import Part, parts_of
from armour_surgery.surgery.operation import Operation
from armour_surgery.traced import Call, FoundSite, Producer, Role, TracedSite

__all__ = ["Oracle", "Place", "merge", "places_of", "real_copy"]

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


def merge(module: nn.Module, traced: TracedSite, mode: str) -> None:
    """Make a module's projections such that `mode` takes nothing from it.

    The rows of the role that stays are copied over those of the role that goes, in each attention of the module.
    """
    for member in traced.members:
        _merge(module, {"q": member.q, "k": member.k, "v": member.v}, mode)


def _merge(module: nn.Module, roles: dict[str, Role], mode: str) -> None:
    sizes = {letter: role.head_dim for letter, role in roles.items()}
    for letter, names in (("k", get_mode(mode).key), ("v", get_mode(mode).value)):
        role, filled = roles[letter], 0
        for part in parts_of(names, letter, sizes):
            rows = _rows(role, Part(letter, filled, filled + part.size))
            filled += part.size
            if part.letter.startswith("grouped"):
                _keep_own_groups(module, role, rows, shuffled=part.letter.endswith("shuffled"))
            elif part.letter != letter:
                source = roles[part.letter]
                from_rows = _rows(source, part)
                _copy_rows(module, source.producer, from_rows, role.producer, rows)
                if "k" in (letter, part.letter):
                    # What is computed for a bias of K (zeros, mostly) is computed for K alone.
                    _clear_bias(module, source.producer, from_rows, computed=True)
                    _clear_bias(module, role.producer, rows, computed=True)


def _rows(role: Role, part: Part) -> list[int]:
    rows: list[int] = []
    for head in role.channels:
        rows += head[part.start : part.stop]
    return rows


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), attribute)
    return tensor


@dataclass(frozen=True)
class Place:
    """Rows of a tensor, of which `tensor` is a view with the axes in front that run over a projection's channels."""

    tensor: Tensor
    rows: tuple[Tensor, ...]

    def read(self) -> Tensor:
        """What is there now."""
        return self.tensor[self.rows].clone()

    def write(self, values: Tensor | float) -> None:
        """Put values there."""
        self.tensor[self.rows] = values


def _place(module: nn.Module, producer: Producer, name: str, rows: list[int]) -> Place:
    axes = producer.out_axes or (0,)
    front = _tensor(module, name).movedim(axes, tuple(range(len(axes))))
    places = torch.tensor(rows, dtype=torch.long) + producer.first_row
    return Place(front, torch.unravel_index(places, front.shape[: len(axes)]))


def _bias_place(module: nn.Module, producer: Producer, row: int) -> Place:
    piece = next(piece for piece in producer.bias if piece.start <= row < piece.stop)
    # A bias that is computed has its rows where the parameter that it is computed from has them.
    name = piece.tensor or next(str(node.target) for node in all_above(piece.node) if node.op == "get_attr")
    return Place(_tensor(module, name), (torch.tensor([piece.first_row + row - piece.start]),))


def places_of(module: nn.Module, producer: Producer, rows: list[int]) -> list[Place]:
    """Where those rows of a projection's tensors are stored, tensor by tensor, and those of a bias in pieces."""
    places = [_place(module, producer, name, rows) for name in producer.rows]
    return places + [_bias_place(module, producer, row) for row in rows if producer.bias]


def _clear_bias(module: nn.Module, producer: Producer, rows: list[int], *, computed: bool) -> None:
    """Zeros for the bias of some rows that is added in pieces; with `computed` only where one of them is computed."""
    if computed and all(piece.tensor is not None for piece in producer.bias):
        return
    with torch.no_grad():
        for row in rows if producer.bias else ():
            _bias_place(module, producer, row).write(0.0)


def _copy_rows(module: nn.Module, source: Producer, from_rows: list[int], target: Producer, to_rows: list[int]) -> None:
    in_pieces = bool(source.bias and target.bias)
    with torch.no_grad():
        own = {name: _place(module, source, full, from_rows) for name, full in _names_inside(source).items()}
        for name, full in _names_inside(target).items():
            # Separate modules: tensors correspond by their names inside; a bias that only one has counts as zero.
            values = own.pop(name, None)
            _place(module, target, full, to_rows).write(0.0 if values is None else values.read())
        for left in own.values():
            left.write(0.0)
        for from_row, to_row in zip(from_rows, to_rows, strict=True) if in_pieces else ():
            _bias_place(module, target, to_row).write(_bias_place(module, source, from_row).read())
    if not in_pieces:
        _clear_bias(module, source, from_rows, computed=False)
        _clear_bias(module, target, to_rows, computed=False)


def _names_inside(producer: Producer) -> dict[str, str]:
    """The tensors of a projection by their names inside it, which may be a convolution and a norm in one container."""
    owners = [name.split(".")[:-1] for name in producer.rows]
    depth = 0
    while all(len(owner) > depth and owner[depth] == owners[0][depth] for owner in owners):
        depth += 1
    inside = {".".join(name.split(".")[depth:]): name for name in producer.rows if name != producer.weight}
    # The weight may be a parameter of the attention itself, with whatever name.
    return {"weight": producer.weight, **inside}


def _keep_own_groups(module: nn.Module, role: Role, rows: list[int], *, shuffled: bool) -> None:
    """Leave of V's rows the part of its input that a grouped projection reads."""
    weight = _tensor(module, role.producer.weight)
    channels, inputs = len(rows), weight.shape[1]
    common = math.gcd(channels, inputs)
    groups = max(number for number in range(1, role.num_heads + 1) if common % number == 0)
    with torch.no_grad():
        for index, row in enumerate(rows):
            group = index % groups if shuffled else index * groups // channels
            others = torch.ones(inputs, dtype=torch.bool)
            others[group * inputs // groups : (group + 1) * inputs // groups] = False
            weight[row, others] = 0.0
