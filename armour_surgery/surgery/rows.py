"""Where the rows of an attention's projections are stored, and copying those of one over those of another."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armour_surgery.altered import innermost
from armour_surgery.discover.match import all_above
from armour_surgery.modes import get_mode
from armour_surgery.rewrite.contract import Part, parts_of
from armour_surgery.traced import Producer, Role, TracedSite

__all__ = ["Place", "copy_shared", "merge", "places_of"]


def merge(module: nn.Module, traced: TracedSite, mode: str) -> None:
    """Make a module's projections such that `mode` takes nothing from it, in each of its attentions.

    The rows of the role that stays are copied over those of the role that goes, and a bias that only one of the two has
    becomes zero.
    """
    for member in traced.members:
        _merge(module, {"q": member.q, "k": member.k, "v": member.v}, mode, both=True)


def copy_shared(module: nn.Module, traced: TracedSite, mode: str) -> None:
    """Copy the rows of the role that stays over those of the role that goes, and change no others.

    What `mode` shares is then there twice, as an unconverted module has it. V's channels from a grouped projection
    (modes `grouped`, `grouped-shuffled`) stay as they are.
    """
    for member in traced.members:
        _merge(module, {"q": member.q, "k": member.k, "v": member.v}, mode, both=False)


def _merge(module: nn.Module, roles: dict[str, Role], mode: str, *, both: bool) -> None:
    sizes = {letter: role.head_dim for letter, role in roles.items()}
    for letter, names in (("k", get_mode(mode).key), ("v", get_mode(mode).value)):
        role, filled = roles[letter], 0
        for part in parts_of(names, letter, sizes):
            rows = _rows(role, Part(letter, filled, filled + part.size))
            filled += part.size
            if part.letter.startswith("grouped"):
                if both:
                    _keep_own_groups(module, role, rows, shuffled=part.letter.endswith("shuffled"))
            elif part.letter != letter:
                source = roles[part.letter]
                from_rows = _rows(source, part)
                _copy_rows(module, source.producer, from_rows, role.producer, rows, both=both)
                if both and "k" in (letter, part.letter):
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


def _copy_rows(
    module: nn.Module, source: Producer, from_rows: list[int], target: Producer, to_rows: list[int], *, both: bool
) -> None:
    in_pieces = bool(source.bias and target.bias)
    with torch.no_grad():
        own = {name: _place(module, source, full, from_rows) for name, full in _names_inside(source).items()}
        for name, full in _names_inside(target).items():
            # Separate modules: tensors correspond by their names inside; a bias that only one has counts as zero.
            values = own.pop(name, None)
            _place(module, target, full, to_rows).write(0.0 if values is None else values.read())
        for left in own.values() if both else ():
            left.write(0.0)
        for from_row, to_row in zip(from_rows, to_rows, strict=True) if in_pieces else ():
            _bias_place(module, target, to_row).write(_bias_place(module, source, from_row).read())
    if not in_pieces:
        if both:
            _clear_bias(module, source, from_rows, computed=False)
        _clear_bias(module, target, to_rows, computed=False)


def _names_inside(producer: Producer) -> dict[str, str]:
    """The tensors of a projection by their names inside it, which may be a convolution and a norm in one container."""
    around = innermost(name.rpartition(".")[0] for name in producer.rows)
    inside = {name.removeprefix(f"{around}."): name for name in producer.rows if name != producer.weight}
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
