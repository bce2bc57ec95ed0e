"""Give K and V the channels that the mode says, by views of the projections that are left."""

import operator

import torch
from torch import fx

from armour_surgery.errors import PostconditionError
from armour_surgery.rewrite.relayout import block_layout, relayout, separate
from armour_surgery.rewrite.surgery import Part, Surgery
from armour_surgery.traced import Anchor, Layout

__all__ = ["ShareRolesPass", "is_expressible"]


def wanted_parts(surgery: Surgery, letter: str) -> tuple[Part, ...]:
    """What a role is made of after the rewrite."""
    if letter == "q":
        return (Part("q", 0, surgery.role("q").head_dim),)
    return surgery.key if letter == "k" else surgery.value


def is_expressible(surgery: Surgery) -> bool:
    """Whether views suffice: every role meets its users at anchors whose layout is known."""
    for letter in "qkv":
        role = surgery.role(letter)
        if not _touched(surgery, letter):
            continue
        if not role.whole or any(anchor.layout is None for anchor in role.anchors):
            return False
        for anchor in role.anchors:
            assert anchor.layout is not None
            parts = wanted_parts(surgery, letter)
            target = anchor.layout if len(parts) == 1 else separate(anchor.layout)
            if any(_source(surgery, part, target) is None for part in parts):
                return False
            if len(parts) > 1 and relayout(separate(anchor.layout), anchor.layout, {"h": 1, "j": 1}) is None:
                return False
    return True


def _touched(surgery: Surgery, letter: str) -> bool:
    own = (Part(letter, 0, surgery.role(letter).head_dim),)
    return surgery.role(letter).producer.node in surgery.replaced or wanted_parts(surgery, letter) != own


def _source(surgery: Surgery, part: Part, target: Layout) -> tuple[fx.Node, Layout] | None:
    """A node that holds the part, and its layout, from which views lead to `target`."""
    role = surgery.role(part.letter)
    sizes = {"h": role.num_heads, "j": part.size}
    if part in surgery.blocks:
        block = surgery.blocks[part]
        layout = block_layout(role.producer.node.meta["value"].ndim, block.axis)
        return (block.node, layout) if relayout(layout, target, sizes) is not None else None
    if part.size != role.head_dim or role.producer.node in surgery.replaced:
        return None
    for anchor in _best_first(role.anchors, target):
        if anchor.layout is not None and relayout(anchor.layout, target, sizes) is not None:
            return anchor.node, anchor.layout
    return None


def _best_first(anchors: tuple[Anchor, ...], target: Layout) -> list[Anchor]:
    return sorted(anchors, key=lambda anchor: anchor.layout != target)


class ShareRolesPass:
    """Replace every anchor of a touched role by views of blocks; concatenate only where a mode says so."""

    def requires(self, surgery: Surgery) -> None:
        """A grouped part has its projection by now."""
        for part in surgery.value:
            if part.letter not in "qkv" and part not in surgery.blocks:
                raise PostconditionError(f"{part.letter} was asked for and not made")

    def __call__(self, surgery: Surgery) -> bool:
        """Rewrite the anchors, where views can express it (`RestoreChannelsPass` does the others)."""
        if not is_expressible(surgery):
            return False
        writer = _Writer(surgery)
        modified = False
        for letter in "qkv":
            if _touched(surgery, letter):
                for anchor in surgery.role(letter).anchors:
                    writer.replace(anchor, wanted_parts(surgery, letter))
                    modified = True
        return modified

    def ensures(self, surgery: Surgery) -> None:
        """No anchor of a touched role is read any more, but by views of what is left."""
        if not is_expressible(surgery):
            return
        for letter in "qkv":
            for anchor in surgery.role(letter).anchors if _touched(surgery, letter) else ():
                if anchor.node.op != "call_module" and anchor.node is not surgery.role(letter).producer.node and anchor.node.users:
                    raise PostconditionError(f"{anchor.node.name} still feeds {list(anchor.node.users)}")


class _Writer:
    """Writes views into the graph, each once."""

    def __init__(self, surgery: Surgery) -> None:
        self.surgery = surgery
        self.graph = surgery.graph
        self.created: set[fx.Node] = set()
        self.split: dict[fx.Node, dict[Part, fx.Node]] = {}
        self.written: dict[tuple[Part, Layout], fx.Node] = {}

    def replace(self, anchor: Anchor, parts: tuple[Part, ...]) -> None:
        assert anchor.layout is not None
        if len(parts) == 1:
            new = self.part(parts[0], anchor.layout, anchor.node)
        else:
            open_layout = separate(anchor.layout)
            pieces = tuple(self.part(part, open_layout, anchor.node) for part in parts)
            axis = open_layout.index(("j",)) - len(open_layout)
            new = self.call(anchor.node, "cat", (pieces, axis))
            sizes = {"h": self.surgery.role(parts[0].letter).num_heads, "j": sum(part.size for part in parts)}
            for method, arguments in relayout(open_layout, anchor.layout, sizes) or ():
                new = self.call(anchor.node, method, (new, *arguments))
        if new is not anchor.node:
            anchor.node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self.created)

    def part(self, part: Part, target: Layout, before: fx.Node) -> fx.Node:
        if (part, target) not in self.written:
            found = _source(self.surgery, part, target)
            assert found is not None
            node, layout = found
            if part in self.surgery.blocks:
                node = self.block(part, before)
            sizes = {"h": self.surgery.role(part.letter).num_heads, "j": part.size}
            for method, arguments in relayout(layout, target, sizes) or ():
                node = self.call(before, method, (node, *arguments))
            self.written[part, target] = node
        return self.written[part, target]

    def block(self, part: Part, before: fx.Node) -> fx.Node:
        """The part's own channels: one of the pieces that its projection's output is split into."""
        block = self.surgery.blocks[part]
        if block.node not in self.split:
            siblings = sorted(
                (other for other, place in self.surgery.blocks.items() if place.node is block.node),
                key=lambda other: self.surgery.blocks[other].offset,
            )
            if len(siblings) == 1:
                self.split[block.node] = {part: block.node}
            else:
                widths = [other.size * self.surgery.role(other.letter).num_heads for other in siblings]
                pieces = self.call(before, "split", (block.node, widths, block.axis))
                self.split[block.node] = {
                    other: self.call(before, "getitem", (pieces, index), other.letter)
                    for index, other in enumerate(siblings)
                }
        return self.split[block.node][part]

    def call(self, before: fx.Node, method: str, arguments: tuple[object, ...], name: str | None = None) -> fx.Node:
        functions = {"cat": torch.cat, "getitem": operator.getitem}
        with self.graph.inserting_before(before):
            if method in functions:
                node = self.graph.create_node("call_function", functions[method], arguments, name=name)  # type: ignore
            else:
                node = self.graph.create_node("call_method", method, arguments, name=name)  # type: ignore
        self.created.add(node)
        return node
