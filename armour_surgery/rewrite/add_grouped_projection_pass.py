"""Make the channels of V that Q does not provide with a grouped 1x1 convolution."""

import math

from torch import fx

from armour_surgery.errors import PostconditionError
from armour_surgery.rewrite.contract import Block, Part, Surgery
from armour_surgery.rewrite.edits import AddGrouped

__all__ = ["AddGroupedProjectionPass"]

_NAME = "grouped_value"


class AddGroupedProjectionPass:
    """Add `grouped_value(x)` beside V's projection, for modes that name a grouped part."""

    def requires(self, surgery: Surgery) -> None:
        """V comes from one Linear or 1x1 convolution."""
        if _part(surgery) is not None and not surgery.role("v").producer.plain:
            raise PostconditionError(f"{surgery.role('v').producer.fqn} has no grouped form")

    def __call__(self, surgery: Surgery) -> bool:
        """Add the call and note the new module."""
        part = _part(surgery)
        if part is None:
            return False
        role = surgery.role("v")
        producer = role.producer
        source = next(argument for argument in _call(producer.chain).args if isinstance(argument, fx.Node))
        inputs = source.meta["value"].shape[producer.axis]
        outputs = part.size * role.num_heads
        common = math.gcd(inputs, outputs)
        groups = max(number for number in range(1, role.num_heads + 1) if common % number == 0)
        with surgery.graph.inserting_before(producer.node.next):
            node = surgery.graph.call_module(_NAME, (source,))
        node.meta["value"] = producer.node.meta["value"]
        surgery.blocks[part] = Block(node, producer.axis, 0)
        tensors = tuple(name for name in producer.rows if name != producer.weight)
        rows = tuple(surgery.channels(part))
        shuffle = part.letter.endswith("shuffled")
        surgery.edits.append(AddGrouped(_NAME, producer.weight, tensors, rows, groups, shuffle, producer.axis))
        return True

    def ensures(self, surgery: Surgery) -> None:
        """The part is there for the next pass."""
        part = _part(surgery)
        if part is not None and part not in surgery.blocks:
            raise PostconditionError("the grouped projection was not added")


def _part(surgery: Surgery) -> Part | None:
    return next((part for part in surgery.value if part.letter.startswith("grouped")), None)


def _call(chain: tuple[fx.Node, ...]) -> fx.Node:
    """The node of a producer that is applied to tokens."""
    return next(node for node in chain if node.op in ("call_module", "call_function"))
