"""Take out what nothing reads any more, and put the rest back in order."""

import itertools
import operator
from typing import Any

import torch
from torch import fx

from armour_surgery.errors import TraceError
from armour_surgery.rewrite.contract import Surgery
from armour_surgery.rewrite.edits import KeepAlong, KeepRows, Remove, edited_names

__all__ = ["RemoveDeadNodesPass", "erase_unused", "unread_nodes"]

_READS = (getattr, operator.getitem)  # reading a size that is not used has no effect
_HARMLESS = ("dtype", "device")  # what stays true of a tensor with fewer rows


class RemoveDeadNodesPass:
    """Remove nodes that lost their last user in this surgery (what never had one may act by side effect: it stays)."""

    def __init__(self, graph: fx.Graph) -> None:
        self.acting = {node for node in unread_nodes(graph) if node.target not in _READS}

    def requires(self, surgery: Surgery) -> None:
        """Nothing: any graph can be cleaned."""

    def __call__(self, surgery: Surgery) -> bool:
        """Remove and reorder."""
        before = str(surgery.graph)
        _write_sizes_down(surgery)
        erase_unused(surgery.graph, self.acting)
        _mend_order(surgery.graph)
        return str(surgery.graph) != before

    def ensures(self, surgery: Surgery) -> None:
        """The graph is sound, and what is to be removed from the module is not read.

        Raises:
            TraceError: the host reads a projection for something else too.
        """
        surgery.graph.lint()
        gone = {edit.name for edit in surgery.edits if isinstance(edit, Remove)}
        for node in surgery.graph.nodes:
            if node.op in ("get_attr", "call_module") and not gone.isdisjoint(_with_owners(str(node.target))):
                raise TraceError(f"its forward also uses {node.target} for something other than attention")
        _refuse_other_readers(surgery)


def unread_nodes(graph: fx.Graph) -> set[fx.Node]:
    """What nothing reads, to be asked before passes run: if a host calls it all the same, it acts by side effect."""
    return {node for node in graph.nodes if not node.users}


def erase_unused(graph: fx.Graph, acting: set[fx.Node]) -> None:
    """Remove what nothing reads, from the end on; `acting` are nodes that stay: nothing ever read them."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node not in acting and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _with_owners(name: str) -> list[str]:
    """A name, and those of the modules that it lies in: `attn.q.weight`, `attn.q`, `attn`."""
    names = []
    while name:
        names.append(name)
        name = name.rpartition(".")[0]
    return names


def _refuse_other_readers(surgery: Surgery) -> None:
    """Rows may only go from tensors that nobody but the projection itself reads."""
    chains: set[fx.Node] = set()
    for producer in surgery.producers():
        chains.update(producer.chain)
    for edit in surgery.edits:
        if not isinstance(edit, KeepRows | KeepAlong):
            continue
        tensors = edited_names(edit)
        owners = set(itertools.chain.from_iterable(map(_with_owners, tensors))).difference(tensors)
        for node in surgery.graph.nodes:
            target = str(node.target)
            if node.op == "get_attr" and target in tensors:
                alone = _readers(node, chains) <= chains
            elif node.op == "call_module" and target in owners:
                alone = node in chains
            else:
                continue
            if not alone:
                raise TraceError(f"its forward also uses {target} for something other than attention")


def _write_sizes_down(surgery: Surgery) -> None:
    """What the host asks of the sizes of a weight that is narrower now, or gone, it gets told as it was."""
    edited: set[str] = set()
    for edit in surgery.edits:
        edited.update(edited_names(edit))
    for node in surgery.graph.nodes:
        if not (node.target is getattr and node.args[1] == "shape") and (node.op, node.target) != (
            "call_method",
            "size",
        ):
            continue
        if edited.isdisjoint(_with_owners(_tensor_behind(node.args[0]))):
            continue
        size: Any = node.meta["value"]
        size = tuple(size) if isinstance(size, tuple) else size

        def told(source: fx.Node, asked: fx.Node = node, size: Any = size) -> Any:
            return size if source is asked else source

        for user in list(node.users):
            user.args = fx.map_arg(user.args, told)


def _tensor_behind(node: Any) -> str:
    """The parameter or buffer that a node is, or is a view of; empty if it is neither."""
    held = node.meta.get("value")  # views that the passes wrote carry none
    while isinstance(node, fx.Node) and node.op != "get_attr":
        node = node.args[0] if node.args else None
    whole = node.meta["value"] if isinstance(node, fx.Node) else None
    if not isinstance(held, torch.Tensor) or not isinstance(whole, torch.Tensor):
        return ""
    is_view = held.untyped_storage()._cdata == whole.untyped_storage()._cdata
    return str(node.target) if is_view else ""


def _readers(tensor: fx.Node, chains: set[fx.Node]) -> set[fx.Node]:
    """What reads a parameter's rows: its users, and those of a concatenation, which a bias may go through first."""
    readers: set[fx.Node] = set()
    for user in tensor.users:
        if user.target is getattr and user.args[1] in _HARMLESS:
            continue
        readers.update([user] if user in chains else user.users)
    return readers


def _mend_order(graph: fx.Graph) -> None:
    """Move every node that is read before it is computed to right before its first reader."""
    # Views stand where K's or V's own were; the projection that they read now, Q's, may come later in the host's code.
    done: set[fx.Node] = set()

    def place_inputs(node: fx.Node, reader: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in done:
                place_inputs(source, reader)
                reader.prepend(source)
                done.add(source)

    for node in list(graph.nodes):
        if node not in done:
            place_inputs(node, node)
            done.add(node)
