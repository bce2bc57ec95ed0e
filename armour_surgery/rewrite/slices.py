"""Tensors that a host applies in slices: what the slices keep of their rows, and where they are then.

`nn.MultiheadAttention` is the common case: where queries are not keys, it cuts its `in_proj_weight` into pieces.
"""

from dataclasses import dataclass

import torch
from torch import fx

from armour_surgery.errors import PostconditionError, TraceError
from armour_surgery.rewrite.edits import Edit, KeepRows, Remove
from armour_surgery.traced import BiasPiece, Producer

__all__ = ["Slices", "weight_argument"]


@dataclass(frozen=True)
class _Slice:
    """Rows `start` to `stop` of a tensor, which `node` holds; of these `kept` stay, counted from its first."""

    node: fx.Node
    start: int
    stop: int
    kept: tuple[int, ...]
    sizes: tuple[tuple[str, str], ...]


class Slices:
    """All slices of the tensors that some projections of a site are made of slices of."""

    def __init__(self, graph: fx.Graph, producers: list[Producer]) -> None:
        self._graph = graph
        self._chains: set[fx.Node] = set()
        self._tensors: dict[str, list[_Slice]] = {}
        for producer in producers:
            self._chains.update(producer.chain)
            weight = weight_argument(producer)
            # A weight that is turned around is all of its parameter.
            if weight is not None and weight.op != "get_attr" and not producer.out_axes:
                self._tensors[producer.weight] = []
            for piece in producer.bias:
                if piece.tensor is not None and piece.node.op != "get_attr":
                    self._tensors[piece.tensor] = []

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._tensors

    def keep(self, producer: Producer, rows: list[int]) -> None:
        """Note which of its channels a projection keeps, in their new order, where its weight is a slice."""
        if producer.weight in self:
            node = weight_argument(producer) or producer.node
            start = producer.first_row
            self._tensors[producer.weight].append(
                _Slice(node, start, start + producer.channels, tuple(rows), producer.sizes)
            )

    def keep_piece(self, piece: BiasPiece, rows: list[int]) -> None:
        """The same for a piece of a bias, with rows counted from its own first."""
        if piece.tensor is not None and piece.tensor in self:
            stop = piece.first_row + piece.stop - piece.start
            self._tensors[piece.tensor].append(_Slice(piece.node, piece.first_row, stop, tuple(rows), ()))

    def cut_anew(self) -> list[Edit]:
        """Let the projections read what is left of their slices; the edits that this takes.

        Raises:
            TraceError: two projections have rows in common.
        """
        edits: list[Edit] = []
        for name, slices in self._tensors.items():
            edits += self._cut_tensor(name, sorted(slices, key=lambda one: one.start))
        return edits

    def _cut_tensor(self, name: str, slices: list[_Slice]) -> list[Edit]:
        source = self._parameter(name)
        total = source.meta["value"].shape[0]
        rows: list[int] = []
        places: list[int] = []
        done = 0
        for one in slices:
            if one.start < done:
                raise TraceError(f"its forward uses the same rows of {name} in more than one projection")
            # Rows that none of q, k and v is made of are not ours to drop.
            rows += range(done, one.start)
            places.append(len(rows))
            rows += [one.start + row for row in one.kept]
            done = one.stop
        rows += range(done, total)
        if rows == list(range(total)):
            return []
        after = source.next
        for one, place in zip(slices, places, strict=True):
            if one.kept:
                new = source
                if len(one.kept) < len(rows):
                    with self._graph.inserting_before(after):
                        new = self._graph.call_method("narrow", (source, 0, place, len(one.kept)))
                    new.meta["value"] = source.meta["value"][: len(one.kept)]
                self._read(one.node, new)
        return [KeepRows((name,), slices[0].sizes, tuple(rows))] if rows else [Remove(name)]

    def _parameter(self, name: str) -> fx.Node:
        for node in self._graph.nodes:
            if node.op == "get_attr" and node.target == name:
                found: fx.Node = node
                return found
        raise PostconditionError(f"{name} is not in the graph")

    def _read(self, old: fx.Node, new: fx.Node) -> None:
        """Let projections, and biases that are joined for them, read these rows; other readers are told apart later."""
        for user in list(old.users):
            if user in self._chains or (user.target in (torch.cat, torch.concat) and set(user.users) <= self._chains):
                user.replace_input_with(old, new)


def weight_argument(producer: Producer) -> fx.Node | None:
    """The node that a projection written as a function gets for its weight; None for a module's."""
    for node in producer.chain:
        if node.op == "call_function":
            weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
            return weight if isinstance(weight, fx.Node) else None
    return None
