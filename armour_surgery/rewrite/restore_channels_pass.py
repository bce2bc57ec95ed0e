"""The way out where views cannot express a sharing: lay the projection's old output out again, by copying.

Correct for whatever the host does with the packed tensor, at the price of one concatenation.
"""

from collections.abc import Sequence

import torch
from torch import fx

from armour_surgery.errors import PostconditionError
from armour_surgery.rewrite.contract import Surgery
from armour_surgery.rewrite.share_roles_pass import is_expressible, wanted_parts
from armour_surgery.traced import Producer

__all__ = ["RestoreChannelsPass"]

Place = tuple[fx.Node, int]


class RestoreChannelsPass:
    """Rebuild each narrowed projection's output with every channel where the host expects it."""

    def requires(self, surgery: Surgery) -> None:
        """All that is put together has its channels on the same axis."""
        axes = {producer.axis for producer in surgery.producers()}
        if not is_expressible(surgery) and len(axes) > 1:
            raise PostconditionError("its projections have their channels on different axes")

    def __call__(self, surgery: Surgery) -> bool:
        """Rewrite; does nothing where `ShareRolesPass` did the work."""
        if is_expressible(surgery):
            return False
        places = _new_places(surgery)
        modified = False
        created: set[fx.Node] = set()
        for producer in surgery.producers():
            wanted = _old_places(surgery, producer, places)
            if wanted == _identity(producer):
                continue
            whole = _lay_out(surgery, producer, wanted, created)
            # The new nodes read the projection itself, or they would read their own result.
            producer.node.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in created)
            modified = True
        return modified

    def ensures(self, surgery: Surgery) -> None:
        """Every place that was read exists."""
        if is_expressible(surgery):
            return
        for producer in surgery.producers():
            places = _new_places(surgery)
            if len(_old_places(surgery, producer, places)) != producer.channels:
                raise PostconditionError(f"{producer.fqn} was not restored whole")


def _lay_out(surgery: Surgery, producer: Producer, places: list[Place], created: set[fx.Node]) -> fx.Node:
    """Concatenate the runs of channels that `places` consists of; new nodes are noted in `created`."""
    # Neighbors are taken together: a slice for each channel would be thousands of nodes.
    runs: list[tuple[fx.Node, int, int]] = []
    for node, channel in places:
        if runs and runs[-1][0] is node and runs[-1][2] == channel:
            runs[-1] = (node, runs[-1][1], channel + 1)
        else:
            runs.append((node, channel, channel + 1))
    pieces = []
    with surgery.graph.inserting_before(producer.node.next):
        for node, start, stop in runs:
            pieces.append(surgery.graph.call_method("narrow", (node, producer.axis, start, stop - start)))
        whole = surgery.graph.call_function(torch.cat, (tuple(pieces), producer.axis))
    created.update([*pieces, whole])
    return whole


def _identity(producer: Producer) -> list[Place]:
    return [(producer.node, channel) for channel in range(producer.channels)]


def _new_places(surgery: Surgery) -> dict[tuple[str, int, int], Place]:
    """(letter, head, dimension) -> where these channels are now, for all that is kept."""
    places: dict[tuple[str, int, int], Place] = {}
    for part in surgery.parts():
        role = surgery.role(part.letter)
        block = surgery.blocks.get(part)
        for head in range(role.num_heads):
            for dimension in range(part.start, part.stop):
                # A part without a block is where it always was: its projection keeps all channels.
                place = (role.producer.node, role.channels[head][dimension])
                if block is not None:
                    place = (block.node, block.channel(head, dimension - part.start, part.size))
                places[part.letter, head, dimension] = place
    return places


def _old_places(surgery: Surgery, producer: Producer, places: dict[tuple[str, int, int], Place]) -> list[Place]:
    """For each old output channel of a projection: where what the host should find there is now."""
    wanted: dict[int, Place] = {}
    for letter in "qkv":
        role = surgery.role(letter)
        if role.producer is not producer:
            continue
        for head, channels in enumerate(role.channels):
            filled = 0
            for part in wanted_parts(surgery, letter):
                for offset in range(part.size):
                    wanted[channels[filled + offset]] = places[part.letter, head, part.start + offset]
                filled += part.size
    others = [channel for channel in range(producer.channels) if channel not in wanted]
    now: Sequence[int] = others
    if producer.node in surgery.kept:  # a narrowed projection keeps them behind q, k and v
        kept = len(surgery.kept[producer.node])
        now = range(kept - len(others), kept)
    for channel, place in zip(others, now, strict=True):
        wanted[channel] = (producer.node, place)
    return [wanted[channel] for channel in range(producer.channels)]
