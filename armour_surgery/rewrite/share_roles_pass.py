"""Give K and V the channels that the mode says, by views of the projections that are left."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from armour_surgery.errors import PostconditionError, TraceError
from armour_surgery.rewrite.contract import Block, Part, Surgery, width_of
from armour_surgery.rewrite.relayout import Step, block_layout, relayout, separate
from armour_surgery.traced import Anchor, Atom, Layout, Producer

__all__ = ["ShareRolesPass", "is_expressible", "wanted_parts"]

Run = tuple[Part, ...]  # parts that one view holds


def wanted_parts(surgery: Surgery, letter: str) -> tuple[Part, ...]:
    """What a role is made of after the rewrite."""
    if letter == "q":
        return (surgery.query,)
    return surgery.key if letter == "k" else surgery.value


def is_expressible(surgery: Surgery) -> bool:
    """Whether views suffice: every role meets its users at anchors whose layout is known."""
    if any(_holds_others(surgery, producer) for producer in surgery.producers()):
        return False
    for letter in "qkv":
        if not _touched(surgery, letter):
            continue
        role = surgery.role(letter)
        runs = _runs(surgery, wanted_parts(surgery, letter))
        if not role.whole or not all(_can_be_written(surgery, anchor.layout, runs) for anchor in role.anchors):
            return False
    return True


def _can_be_written(surgery: Surgery, layout: Layout | None, runs: list[Run]) -> bool:
    """Whether views lead to an anchor's layout; several runs meet with heads and dimensions on axes of their own."""
    if layout is None:
        return False
    target = layout if len(runs) == 1 else separate(layout)
    if any(_source(surgery, run, target) is None for run in runs):
        return False
    # Whether it works does not depend on the sizes; those of a concatenation are known when it is written.
    return len(runs) == 1 or relayout(target, layout, {"h": 1, "j": 1}) is not None


def _holds_others(surgery: Surgery, producer: Producer) -> bool:
    """Whether a narrowed projection also makes channels that are none of q, k and v, such as a gate."""
    parts = list(surgery.parts_in(producer.node))
    return bool(parts) and sum(_widths(surgery, parts)) != len(surgery.kept[producer.node])


def _widths(surgery: Surgery, parts: Iterable[Part]) -> list[int]:
    """How many channels each part has in all heads together."""
    return [part.size * surgery.role(part.letter).num_heads for part in parts]


def _touched(surgery: Surgery, letter: str) -> bool:
    # A role that is made of its own channels is touched too where its projection lost others: they are elsewhere now.
    own = (Part(letter, 0, surgery.role(letter).head_dim),)
    return surgery.role(letter).producer.node in surgery.kept or wanted_parts(surgery, letter) != own


def _runs(surgery: Surgery, parts: tuple[Part, ...]) -> list[Run]:
    """The parts of a role, neighbors in one projection taken together: one view holds them all."""
    runs: list[Run] = []
    for part in parts:
        if runs and _are_neighbors(surgery, runs[-1][-1], part):
            runs[-1] = (*runs[-1], part)
        else:
            runs.append((part,))
    return runs


def _are_neighbors(surgery: Surgery, first: Part, second: Part) -> bool:
    """Whether the second part of a head starts where the first one ends, in a projection packed head by head."""
    before, after = surgery.blocks.get(first), surgery.blocks.get(second)
    if before is None or after is None or not after.stride:
        return False
    return after.node is before.node and after.offset == before.offset + first.size


def _sizes(surgery: Surgery, run: Run) -> dict[Atom, int]:
    return {"h": surgery.role(run[0].letter).num_heads, "j": width_of(run)}


def _source(surgery: Surgery, run: Run, target: Layout) -> tuple[fx.Node, Layout] | None:
    """A node that holds the run, and its layout, from which views lead to `target`."""
    part, sizes = run[0], _sizes(surgery, run)
    role = surgery.role(part.letter)
    if part in surgery.blocks:
        block = surgery.blocks[part]
        layout = block_layout(role.producer.node.meta["value"].ndim, block.axis)
        layout = separate(layout) if block.stride else layout
        return (block.node, layout) if relayout(layout, target, sizes) is not None else None
    if part.size != role.head_dim or role.producer.node in surgery.kept:
        return None
    # Of several anchors, one that has the layout already: it takes no further view.
    for anchor in sorted(role.anchors, key=lambda anchor: anchor.layout != target):
        if anchor.layout is not None and relayout(anchor.layout, target, sizes) is not None:
            return anchor.node, anchor.layout
    return None


def _read_in(surgery: Surgery) -> dict[Part, set[Layout]]:
    """The layouts in which each part is read."""
    layouts: dict[Part, set[Layout]] = {}
    for letter in "qkv":
        if not _touched(surgery, letter):
            continue
        runs = _runs(surgery, wanted_parts(surgery, letter))
        for anchor in surgery.role(letter).anchors:
            if anchor.layout is None:
                continue
            for run in runs:
                target = anchor.layout if len(runs) == 1 else separate(anchor.layout)
                layouts.setdefault(run[0], set()).add(target)
    return layouts


def _together(surgery: Surgery, block: Block) -> tuple[Layout, list[Step]] | None:
    """The layout in which all parts of a packed projection are read, and views of all of it that lead there.

    The parts lie on the first axis then. None where they differ in size, in heads, or in how they are read, or where
    what reads them takes heads apart itself.
    """
    places = surgery.parts_in(block.node)
    shapes = {(part.size, surgery.role(part.letter).num_heads) for part in places}
    read_in = _read_in(surgery)
    layouts = [read_in.get(part, set()) for part in places]
    if len(places) == 1 or len(shapes) > 1 or any(len(each) != 1 or each != layouts[0] for each in layouts):
        return None
    (target,) = layouts[0]
    if any(len(atoms) > 1 for atoms in target):
        return None
    packed = block_layout(block.node.meta["value"].ndim, block.axis)
    packed = tuple(("part", *atoms) if "h" in atoms else atoms for atoms in packed)
    ((size, heads),) = shapes
    steps = relayout(packed, (("part",), *target), {"part": len(places), "h": heads, "j": size})
    return None if steps is None else (target, steps)


class ShareRolesPass:
    """Replace every anchor of a touched role by views of blocks; concatenate only where a mode says so."""

    def requires(self, surgery: Surgery) -> None:
        """A grouped part has its projection by now, and nothing writes into what roles are going to share.

        Raises:
            TraceError: the host changes q, k or v in place.
        """
        _refuse_writes(surgery)
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
                    if anchor.layout is not None:  # as `is_expressible` made sure
                        writer.replace(anchor, anchor.layout, wanted_parts(surgery, letter))
                        modified = True
        return modified

    def ensures(self, surgery: Surgery) -> None:
        """No anchor of a touched role is read any more, but by views of what is left."""
        if not is_expressible(surgery):
            return
        for letter in "qkv":
            if not _touched(surgery, letter):
                continue
            role = surgery.role(letter)
            for anchor in role.anchors:
                # An anchor may be the projection itself, and is what the views read.
                is_producer = anchor.node.op == "call_module" or anchor.node is role.producer.node
                if anchor.node.users and not is_producer:
                    raise PostconditionError(f"{anchor.node.name} still feeds {list(anchor.node.users)}")


def _refuse_writes(surgery: Surgery) -> None:
    """Views of one projection must not be written to: another role would see it."""
    # Values are on meta and have no addresses; the storage object is what views of one tensor have in common.
    storages: set[int] = set()
    for letter in "qkv":
        for anchor in surgery.role(letter).anchors:
            storages.add(anchor.node.meta["value"].untyped_storage()._cdata)
    for node in surgery.graph.nodes:
        target = str(node.target)
        method = node.op == "call_method" and target.endswith("_") and not target.endswith("__")
        if not (method or node.target is operator.setitem or node.kwargs.get("inplace") is True):
            continue
        value = node.args[0].meta.get("value") if isinstance(node.args[0], fx.Node) else None
        if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in storages:
            raise TraceError(f"its forward changes q, k or v in place ({target}), and they are going to share memory")


class _Writer:
    """Writes views into the graph, each once."""

    def __init__(self, surgery: Surgery) -> None:
        self.surgery = surgery
        self.graph = surgery.graph
        self.created: set[fx.Node] = set()
        self.contiguous: dict[fx.Node, fx.Node] = {}
        # What each node would hold, strides included: they tell where the host's own copies have to be kept.
        self.values = _narrowed_values(surgery)
        self.apart: dict[fx.Node, tuple[dict[Part, fx.Node], Layout]] = {}
        self.heads: dict[fx.Node, fx.Node] = {}
        self.written: dict[tuple[Run, Layout], fx.Node] = {}

    def replace(self, anchor: Anchor, layout: Layout, parts: tuple[Part, ...]) -> None:
        """Let whatever reads an anchor read these parts, in the anchor's layout."""
        runs = _runs(self.surgery, parts)
        if len(runs) == 1:
            new = self.run(runs[0], layout, anchor.node)
        else:
            open_layout = separate(layout)
            pieces = tuple(self.run(run, open_layout, anchor.node) for run in runs)
            # Counted from the end, so that it reads as in the host's code: channels are last there as a rule.
            axis = open_layout.index(("j",)) - len(open_layout)
            new = self.call(anchor.node, "cat", (pieces, axis))
            for method, arguments in relayout(open_layout, layout, _sizes(self.surgery, parts)) or ():
                new = self.call(anchor.node, method, (new, *arguments))
        if anchor.node.meta["value"].is_contiguous() and not self.values[new].is_contiguous():
            # The host made a copy here and may rely on it with a view; so does the replacement.
            if new not in self.contiguous:
                self.contiguous[new] = self.call(anchor.node, "contiguous", (new,))
            new = self.contiguous[new]
        if new is not anchor.node:
            anchor.node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self.created)

    def run(self, run: Run, target: Layout, before: fx.Node) -> fx.Node:
        """One view that holds a run, in the layout that is wanted."""
        if (run, target) not in self.written:
            source = _source(self.surgery, run, target)
            if source is None:
                raise PostconditionError(f"no views lead to {target} for {run}")
            node, layout = source
            block = self.surgery.blocks.get(run[0])
            if block is not None and not block.stride:
                node, layout = self.piece(run[0], block, before)
            elif block is not None:
                node = self.neighbors(run, block, before)
            for method, arguments in relayout(layout, target, _sizes(self.surgery, run)) or ():
                node = self.call(before, method, (node, *arguments))
            self.written[run, target] = node
        return self.written[run, target]

    def neighbors(self, run: Run, block: Block, before: fx.Node) -> fx.Node:
        """A slice of every head, where a projection is packed head by head."""
        if block.node not in self.heads:
            count = self.surgery.role(run[0].letter).num_heads
            self.heads[block.node] = self.call(before, "unflatten", (block.node, block.axis, (count, block.stride)))
        size = width_of(run)
        if size == block.stride:
            return self.heads[block.node]
        name = run[0].letter if len(run) == 1 else "v"  # only V is ever made of several parts
        return self.call(before, "narrow", (self.heads[block.node], block.axis, block.offset, size), name)

    def piece(self, part: Part, block: Block, before: fx.Node) -> tuple[fx.Node, Layout]:
        """The part's own channels, one of the pieces that its projection's output is taken apart into; their layout."""
        if block.node not in self.apart:
            self.apart[block.node] = self.take_apart(block, before)
        pieces, layout = self.apart[block.node]
        return pieces[part], layout

    def take_apart(self, block: Block, before: fx.Node) -> tuple[dict[Part, fx.Node], Layout]:
        """All parts of the projection that a block is in, and their layout; a single part is all of it."""
        places = self.surgery.parts_in(block.node)
        siblings = sorted(places, key=lambda part: places[part].offset)
        layout = block_layout(block.node.meta["value"].ndim, block.axis)
        if len(siblings) == 1:
            return {siblings[0]: block.node}, layout
        together = _together(self.surgery, block)
        if together is None:
            pieces = self.call(before, "split", (block.node, _widths(self.surgery, siblings), block.axis))
        else:
            # As hosts write it, in one move of all parts: OpenVINO copies every piece of a split.
            layout, steps = together
            moved = block.node
            for method, arguments in steps:
                moved = self.call(before, method, (moved, *arguments))
            pieces = self.call(before, "unbind", (moved, 0))
        nodes: dict[Part, fx.Node] = {}
        for index, part in enumerate(siblings):
            nodes[part] = self.call(before, "getitem", (pieces, index), part.letter)
        return nodes, layout

    def call(self, before: fx.Node, method: str, arguments: tuple[object, ...], name: str | None = None) -> fx.Node:
        """Write one call; `name` is what generated code calls its result, where nothing else has that name yet."""
        functions = {"cat": torch.cat, "getitem": operator.getitem}
        with self.graph.inserting_before(before):
            if method in functions:
                node = self.graph.create_node("call_function", functions[method], arguments, name=name)  # type: ignore
            else:
                node = self.graph.create_node("call_method", method, arguments, name=name)  # type: ignore
        self.created.add(node)
        first: Any = arguments[0]
        if method == "cat":
            self.values[node] = torch.cat([self.values[piece] for piece in first], *arguments[1:])  # type: ignore
        elif method == "getitem":
            self.values[node] = self.values[first][arguments[1]]
        else:
            self.values[node] = getattr(self.values[first], method)(*arguments[1:])
        return node


def _narrowed_values(surgery: Surgery) -> dict[fx.Node, Any]:
    """What every node held in the recorded call, narrowed projections with the channels that they have now."""
    values = {node: node.meta.get("value") for node in surgery.graph.nodes}
    widths: dict[fx.Node, int] = {}
    for node, channels in surgery.kept.items():
        widths[node] = len(channels)
    for part, block in surgery.blocks.items():
        # What is no old projection is a grouped one, which makes one part.
        width = widths.setdefault(block.node, part.size * surgery.role(part.letter).num_heads)
        old = block.node.meta["value"]
        shape = list(old.shape)
        shape[block.axis] = width
        values[block.node] = old.new_empty(shape)
    return values
