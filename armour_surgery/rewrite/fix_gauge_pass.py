"""Make the channels of one role with a projection of which a block is the identity (`FixedProjection`)."""

from torch import fx

from armour_surgery.errors import PostconditionError, TraceError
from armour_surgery.rewrite.contract import Block, Surgery
from armour_surgery.rewrite.edits import AddFixed

__all__ = ["FixGaugePass"]

_NAME = "fixed_projection"


class FixGaugePass:
    """Add `fixed_projection(x)` in the place of the rows that a projection has for a role; these go afterwards.

    Does nothing where no gauge is to be fixed.
    """

    def requires(self, surgery: Surgery) -> None:
        """The role is all of one plain Linear's channels for it, and has more inputs than a head has channels.

        Raises:
            TraceError: see above.
        """
        if surgery.fixed is None:
            return
        part, producer = surgery.fixed, surgery.role(surgery.fixed.letter).producer
        beside = producer.weight.rpartition(".")[0]
        alone = all(name.rpartition(".")[0] == beside for name in producer.rows)
        if not producer.plain or producer.axis != -1 or producer.first_row or not alone:
            raise TraceError(f"{producer.fqn} is not one plain Linear, whose basis could be fixed; leave out gauge")
        inputs = _inputs(producer.chain).meta["value"].shape[-1]
        if inputs <= part.size:
            raise TraceError(
                f"{producer.fqn} reads {inputs} channels, no more than the {part.size} that a head has, and nothing "
                "would be left of it with a fixed gauge; leave out gauge"
            )

    def __call__(self, surgery: Surgery) -> bool:
        """Add the call and note the new module."""
        if surgery.fixed is None:
            return False
        part = surgery.fixed
        role = surgery.role(part.letter)
        producer = role.producer
        with surgery.graph.inserting_before(producer.node.next):
            node = surgery.graph.call_module(_NAME, (_inputs(producer.chain),))
        node.meta["value"] = producer.node.meta["value"]
        surgery.blocks[part] = Block(node, producer.axis, 0)
        channels = set(surgery.channels(part))
        own = [piece for piece in producer.bias if not channels.isdisjoint(range(piece.start, piece.stop))]
        # Beside the weight, or put together by the host: zeros made on the fly are none to store.
        biases = len(producer.rows) > 1 or any(piece.tensor is not None for piece in own)
        surgery.edits.append(AddFixed(_NAME, producer.weight, role.num_heads, part.size, biases))
        return True

    def ensures(self, surgery: Surgery) -> None:
        """The part is there for the next pass."""
        if surgery.fixed is not None and surgery.fixed not in surgery.blocks:
            raise PostconditionError("the fixed projection was not added")


def _inputs(chain: tuple[fx.Node, ...]) -> fx.Node:
    """The tokens that a projection reads."""
    call = next(node for node in chain if node.op in ("call_module", "call_function"))
    return call.all_input_nodes[0]
