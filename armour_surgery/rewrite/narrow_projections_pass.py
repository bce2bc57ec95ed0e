"""Drop the output channels that nothing will read, and order the others by role."""

import operator

import torch
from torch import fx

from armour_surgery.errors import PostconditionError, TraceError
from armour_surgery.rewrite.contract import Block, Part, Surgery, width_of
from armour_surgery.rewrite.edits import KeepAlong, KeepRows, Remove
from armour_surgery.rewrite.slices import Slices
from armour_surgery.traced import BiasPiece, Producer

__all__ = ["NarrowProjectionsPass"]


class NarrowProjectionsPass:
    """Each projection keeps the channels of the parts that are still needed, `[q | k | v | others]`, heads outermost.

    A projection that keeps all of them is left alone; one that keeps none is removed. The nodes themselves stay the
    same calls (of a module with fewer rows), only a concatenated bias is put together anew.
    """

    def requires(self, surgery: Surgery) -> None:
        """Every role's channels are within its projection, and no projection is called twice.

        Raises:
            TraceError: the host calls one projection more than once.
        """
        # Each call would ask for rows of its own, and there is one weight.
        called = [(producer.fqn, producer.first_row) for producer in surgery.producers()]
        if len(set(called)) != len(called):
            raise TraceError(f"its forward calls {surgery.producers()[0].fqn} more than once")
        for letter in "qkv":
            role = surgery.role(letter)
            if max(map(max, role.channels)) >= role.producer.channels:
                raise PostconditionError(f"channels of {letter} exceed those of {role.producer.fqn}")

    def __call__(self, surgery: Surgery) -> bool:
        """Rewrite biases, note blocks and edits."""
        before = str(surgery.graph)
        slices = Slices(surgery.graph, surgery.producers())
        for producer in surgery.producers():
            rows, blocks = _new_rows(surgery, producer)
            whole = list(range(producer.channels))
            if sorted(rows) == whole:
                # What others lose of a tensor that it has a slice of moves its own rows.
                slices.keep(producer, whole)
                for piece in producer.bias:
                    slices.keep_piece(piece, whole[: piece.stop - piece.start])
                continue
            surgery.kept[producer.node] = tuple(rows)
            slices.keep(producer, rows)
            if not rows:
                surgery.edits += _removal(producer, slices)
                continue
            surgery.blocks.update(blocks)
            if producer.weight not in slices:
                surgery.edits.append(_narrowing(producer, tuple(rows)))
            _narrow_bias(surgery, producer, rows, slices)
        surgery.edits += slices.cut_anew()
        return str(surgery.graph) != before

    def ensures(self, surgery: Surgery) -> None:
        """No channel is kept twice."""
        for edit in surgery.edits:
            if isinstance(edit, KeepRows) and len(set(edit.rows)) != len(edit.rows):
                raise PostconditionError(f"{edit.tensors[0]} would keep a row twice")


def _narrowing(producer: Producer, rows: tuple[int, ...]) -> KeepRows | KeepAlong:
    """What leaves a projection these output channels.

    Raises:
        TraceError: they are not all that is at some places along one axis of its weight.
    """
    if not producer.out_axes:
        return KeepRows(producer.rows, producer.sizes, rows)
    value = next(node for node in producer.chain if node.op == "get_attr").meta["value"]
    sizes = [value.shape[axis] for axis in producer.out_axes]
    places = torch.arange(producer.channels).reshape(sizes)
    for index, axis in enumerate(producer.out_axes):
        along = torch.unravel_index(torch.tensor(rows), sizes)[index]
        kept = tuple(dict.fromkeys(along.tolist()))
        if tuple(places.index_select(index, torch.tensor(kept)).flatten().tolist()) == rows:
            return KeepAlong(producer.weight, axis, kept)
    raise TraceError(
        f"{producer.weight} {tuple(value.shape)} would have to lose channels that are not together along one of its "
        "axes; give q, k and v a parameter each, or stack them along an axis of its own"
    )


def _new_rows(surgery: Surgery, producer: Producer) -> tuple[list[int], dict[Part, Block]]:
    """Old output channels in their new order, and where each part is then."""
    letters = [letter for letter in "qkv" if surgery.role(letter).producer is producer]
    # What has its place already is made by a projection of its own.
    parts = [part for part in surgery.parts() if part.letter in letters and part not in surgery.blocks]
    # Channels that belong to none of q, k, v (a gate, say) are not ours to drop.
    others = set(range(producer.channels))
    for letter in letters:
        others.difference_update(*surgery.role(letter).channels)
    if parts and not others and _head_by_head(surgery, producer, letters):
        return _packed_by_head(surgery, producer, _value_together(surgery, parts))
    rows: list[int] = []
    blocks = {}
    for part in parts:
        blocks[part] = Block(producer.node, producer.axis, len(rows))
        rows += surgery.channels(part)
    return rows + sorted(others), blocks


def _packed_by_head(surgery: Surgery, producer: Producer, parts: list[Part]) -> tuple[list[int], dict[Part, Block]]:
    """`[h0: q k v | h1: q k v | ..]`: the parts of a head next to each other."""
    stride = width_of(parts)
    blocks = {}
    offset = 0
    for part in parts:
        blocks[part] = Block(producer.node, producer.axis, offset, stride)
        offset += part.size
    rows: list[int] = []
    for head in range(surgery.role(parts[0].letter).num_heads):
        for part in parts:
            rows += surgery.role(part.letter).channels[head][part.start : part.stop]
    return rows, blocks


def _head_by_head(surgery: Surgery, producer: Producer, letters: list[str]) -> bool:
    """Whether to pack q, k and v of a head next to each other.

    Where the host does, products over heads need no copy of strided operands; where V is put together from parts of
    this projection, neighbors need no concatenation.
    """
    roles = list(map(surgery.role, letters))
    num_heads = roles[0].num_heads
    if any(role.num_heads != num_heads for role in roles):
        return False
    # V is made of several parts of this projection.
    if sum(part.letter in letters for part in surgery.value) > 1:
        return True
    width = producer.channels // num_heads
    for role in roles:
        for head, channels in enumerate(role.channels):
            if min(channels) < head * width or max(channels) >= (head + 1) * width:
                return False
    return True


def _value_together(surgery: Surgery, parts: list[Part]) -> list[Part]:
    """The parts in an order in which those of V are neighbors, in V's own order."""
    value = [part for part in surgery.value if part in parts]
    return [part for part in parts if part not in value] + value


def _removal(producer: Producer, slices: Slices) -> list[KeepRows | Remove]:
    # F.linear on a parameter: the Linear that holds it goes as a whole, where there is one.
    edits: list[KeepRows | Remove] = [] if producer.weight in slices else [Remove(producer.fqn)]
    for piece in producer.bias:
        slices.keep_piece(piece, [])
        # With its module it is gone already.
        inside = Remove(producer.fqn) in edits and str(piece.tensor).startswith(f"{producer.fqn}.")
        if piece.tensor is not None and piece.tensor not in slices and not inside:
            edits.append(Remove(piece.tensor))
    return edits


def _narrow_bias(surgery: Surgery, producer: Producer, rows: list[int], slices: Slices) -> None:
    """Put a concatenated bias together from the rows that stay."""
    if not producer.bias:
        return
    runs = _bias_runs(producer, rows)
    kept, gone = [], []
    for piece, local in runs:
        slices.keep_piece(piece, local)
        whole = local == list(range(piece.stop - piece.start))
        # Zeros that are made on the fly have no rows, and take their number from a parameter that has.
        if piece.tensor is None and piece.node.target is not torch.zeros_like and not whole:
            kept += _runs_of(surgery, producer, piece, local)
            continue
        kept.append(piece.node)
        # A piece that stays whole, and in its order, needs no edit.
        if piece.tensor is not None and piece.tensor not in slices and not whole:
            surgery.edits.append(KeepRows((str(piece.tensor),), (), tuple(local)))
    for piece in producer.bias:
        if piece.node in kept:
            continue
        slices.keep_piece(piece, [])
        if piece.tensor is not None and piece.tensor not in slices:
            surgery.edits.append(Remove(piece.tensor))
            gone.append(piece.node)
    _rebase_zeros(kept, gone)
    old = _bias_argument(producer)
    with surgery.graph.inserting_before(producer.node):
        new = kept[0] if len(kept) == 1 else surgery.graph.call_function(torch.cat, (tuple(kept),))
    producer.node.replace_input_with(old, new)


def _runs_of(surgery: Surgery, producer: Producer, piece: BiasPiece, rows: list[int]) -> list[fx.Node]:
    """Some rows of a bias that is computed at every call, run by run."""
    starts = [index for index, row in enumerate(rows) if index == 0 or row != rows[index - 1] + 1]
    taken = []
    with surgery.graph.inserting_before(producer.node):
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            arguments = (piece.node, slice(rows[start], rows[stop - 1] + 1))
            taken.append(surgery.graph.call_function(operator.getitem, arguments))
    return taken


def _bias_runs(producer: Producer, rows: list[int]) -> list[tuple[BiasPiece, list[int]]]:
    """The pieces of a bias that the rows come from, in their new order, each with its own rows that stay.

    Raises:
        TraceError: a piece would have to be taken apart.
    """
    runs: list[tuple[BiasPiece, list[int]]] = []
    for row in rows:
        piece = _piece_of(producer, row)
        if not runs or runs[-1][0] is not piece:
            runs.append((piece, []))
        runs[-1][1].append(row - piece.start)
    # A piece that comes up twice would have to be cut in two, and is one parameter.
    if len({piece.start for piece, _ in runs}) != len(runs):
        raise TraceError(f"the bias of {producer.fqn} mixes q, k and v in a way that cannot be taken apart")
    return runs


def _piece_of(producer: Producer, row: int) -> BiasPiece:
    """The piece of a concatenated bias that a row comes from."""
    return next(piece for piece in producer.bias if piece.start <= row < piece.stop)


def _rebase_zeros(kept: list[fx.Node], gone: list[fx.Node]) -> None:
    """`zeros_like(v_bias)` for K's missing bias: take the size from a bias that stays."""
    for node in kept:
        for source in node.all_input_nodes:
            if source not in gone:
                continue
            other = _parameter_of_size(kept, source.meta["value"].shape)
            if other is None:
                raise TraceError(f"the bias {source.target} is needed for its size and cannot be dropped")
            node.replace_input_with(source, other)


def _parameter_of_size(nodes: list[fx.Node], size: torch.Size) -> fx.Node | None:
    return next((node for node in nodes if node.op == "get_attr" and node.meta["value"].shape == size), None)


def _bias_argument(producer: Producer) -> fx.Node:
    # The bias itself, or what the host joins the pieces with; another input is the tokens.
    pieces = {piece.node for piece in producer.bias}
    for argument in producer.node.all_input_nodes:
        if argument in pieces or (argument.target is torch.cat and set(argument.all_input_nodes) <= pieces):
            return argument
    raise PostconditionError(f"the bias of {producer.fqn} is not where it was found")
