"""Drop the output channels that nothing will read, and order the others by role."""

import torch
from torch import fx

from armour_surgery.errors import PostconditionError, TraceError
from armour_surgery.rewrite.contract import Block, Part, Surgery
from armour_surgery.rewrite.edits import KeepRows, Remove
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
        called = [producer.fqn for producer in surgery.producers()]
        if len(set(called)) != len(called):
            raise TraceError(f"its forward calls {called[0]} more than once")
        for letter in "qkv":
            role = surgery.role(letter)
            if max(max(head) for head in role.channels) >= role.producer.channels:
                raise PostconditionError(f"channels of {letter} exceed those of {role.producer.fqn}")

    def __call__(self, surgery: Surgery) -> bool:
        """Rewrite biases, note blocks and edits."""
        modified = False
        for producer in surgery.producers():
            parts = [p for p in surgery.parts() if p.letter in "qkv" and surgery.role(p.letter).producer is producer]
            rows, blocks = _new_rows(surgery, producer, parts)
            if sorted(rows) == list(range(producer.channels)):
                continue
            surgery.replaced.add(producer.node)
            if not rows:
                surgery.edits += _removal(producer)
                continue
            surgery.blocks.update(blocks)
            tensors = tuple(name for name in producer.rows)
            surgery.edits.append(KeepRows(tensors, producer.sizes, tuple(rows)))
            modified = _narrow_bias(surgery, producer, rows) or modified
        return modified

    def ensures(self, surgery: Surgery) -> None:
        """No channel is kept twice."""
        for edit in surgery.edits:
            if isinstance(edit, KeepRows) and len(set(edit.rows)) != len(edit.rows):
                raise PostconditionError(f"{edit.tensors[0]} would keep a row twice")


def _new_rows(surgery: Surgery, producer: Producer, parts: list[Part]) -> tuple[list[int], dict[Part, Block]]:
    """Old output channels in their new order, and where each part is then."""
    letters = [letter for letter in "qkv" if surgery.role(letter).producer is producer]
    ours = [channel for letter in letters for head in surgery.role(letter).channels for channel in head]
    # Channels that belong to none of q, k, v (a gate, say) are not ours to drop.
    others = sorted(set(range(producer.channels)) - set(ours))
    rows: list[int] = []
    blocks = {}
    if parts and not others and _head_by_head(surgery, producer, letters):
        parts = _value_together(surgery, parts)
        stride = sum(part.size for part in parts)
        heads = surgery.role(parts[0].letter).num_heads
        offset = 0
        for part in parts:
            blocks[part] = Block(producer.node, producer.axis, offset, stride)
            offset += part.size
        for head in range(heads):
            for part in parts:
                rows += surgery.role(part.letter).channels[head][part.start : part.stop]
        return rows, blocks
    for part in parts:
        blocks[part] = Block(producer.node, producer.axis, len(rows))
        rows += surgery.channels(part)
    return rows + others, blocks


def _head_by_head(surgery: Surgery, producer: Producer, letters: list[str]) -> bool:
    """Whether to pack q, k and v of a head next to each other.

    Where the host does, products over heads need no copy of strided operands; where V is put together from parts of
    this projection, neighbors need no concatenation.
    """
    roles = [surgery.role(letter) for letter in letters]
    if len({role.num_heads for role in roles}) != 1:
        return False
    if sum(part.letter in letters for part in surgery.value) > 1:
        return True
    width = producer.channels // roles[0].num_heads
    return all(
        {channel // width for role in roles for channel in role.channels[head]} == {head}
        for head in range(roles[0].num_heads)
    )


def _value_together(surgery: Surgery, parts: list[Part]) -> list[Part]:
    """The parts in an order in which those of V are neighbors, in V's own order."""
    value = [part for part in surgery.value if part in parts]
    return [part for part in parts if part not in value] + value


def _removal(producer: Producer) -> list[KeepRows | Remove]:
    node = producer.chain[-1] if producer.bias else producer.node
    edits: list[KeepRows | Remove] = []
    if node.op == "call_module" or producer.chain[0].op == "call_module":
        edits.append(Remove(producer.fqn))
    else:
        edits.append(Remove(producer.weight.rpartition(".")[0] or producer.weight))
    return edits + [Remove(str(piece.node.target)) for piece in producer.bias if piece.node.op == "get_attr"]


def _narrow_bias(surgery: Surgery, producer: Producer, rows: list[int]) -> bool:
    """Put a concatenated bias together from the rows that stay."""
    if not producer.bias:
        return False
    runs: list[tuple[BiasPiece, list[int]]] = []
    for row in rows:
        piece = next(piece for piece in producer.bias if piece.start <= row < piece.stop)
        if not runs or runs[-1][0] is not piece:
            runs.append((piece, []))
        runs[-1][1].append(row - piece.start)
    if len({id(piece) for piece, _ in runs}) != len(runs):
        raise TraceError(f"the bias of {producer.fqn} mixes q, k and v in a way that cannot be taken apart")
    kept = [piece.node for piece, _ in runs]
    for piece, local in runs:
        if piece.node.op == "get_attr" and local != list(range(piece.stop - piece.start)):
            surgery.edits.append(KeepRows((str(piece.node.target),), (), tuple(local)))
    gone = [piece.node for piece in producer.bias if piece.node not in kept and piece.node.op == "get_attr"]
    surgery.edits += [Remove(str(node.target)) for node in gone]
    _rebase_zeros(kept, gone)
    old = _bias_argument(producer)
    with surgery.graph.inserting_before(producer.node):
        new = kept[0] if len(kept) == 1 else surgery.graph.call_function(torch.cat, (tuple(kept),))
    if new is old:
        return False
    producer.node.replace_input_with(old, new)
    return True


def _rebase_zeros(kept: list[fx.Node], gone: list[fx.Node]) -> None:
    """`zeros_like(v_bias)` for K's missing bias: take the size from a bias that stays."""
    for node in kept:
        sources = [source for source in node.all_input_nodes if source in gone]
        for source in sources:
            size = source.meta["value"].shape
            other = next((n for n in kept if n.op == "get_attr" and n.meta["value"].shape == size), None)
            if other is None:
                raise TraceError(f"the bias {source.target} is needed for its size and cannot be dropped")
            node.replace_input_with(source, other)


def _bias_argument(producer: Producer) -> fx.Node:
    pieces = {piece.node for piece in producer.bias}
    for argument in producer.node.all_input_nodes:
        if argument in pieces or (argument.target is torch.cat and set(argument.all_input_nodes) <= pieces):
            return argument
    raise PostconditionError(f"the bias of {producer.fqn} is not where it was found")
