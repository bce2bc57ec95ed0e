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
        # A group for each head, or the most that divide the input's and the output's channels.
        groups = _largest_divisor(math.gcd(inputs, outputs), role.num_heads)
        with surgery.graph.inserting_before(producer.node.next):
            node = surgery.graph.call_module(_NAME, (source,))
        node.meta["value"] = producer.node.meta["value"]
        surgery.blocks[part] = Block(node, producer.axis, 0)
        tensors = tuple(name for name in producer.rows if name != producer.weight)
        # It starts from the rows that it stands in for, so that a group's own share of them is kept.
        rows = surgery.rows(part)
        shuffle = part.letter.endswith("shuffled")
        surgery.edits.append(AddGrouped(_NAME, producer.weight, tensors, rows, groups, shuffle, producer.axis))
        return True

    def ensures(self, surgery: Surgery) -> None:
        """The part is there for the next pass."""
        part = _part(surgery)
        if part is not None and part not in surgery.blocks:
            raise PostconditionError("the grouped projection was not added")


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is at most `limit`."""
    return next(divisor for divisor in range(limit, 0, -1) if number % divisor == 0)


def _part(surgery: Surgery) -> Part | None:
    return next((part for part in surgery.value if part.letter.startswith("grouped")), None)


def _call(chain: tuple[fx.Node, ...]) -> fx.Node:
    """The node of a producer that is applied to tokens."""
    return next(node for node in chain if node.op in ("call_module", "call_function"))
