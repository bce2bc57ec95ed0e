"""Keep a token from attending to itself, unless there is nothing else it may attend to."""

from typing import Any

import torch
from torch import fx

from armour_surgery.errors import PostconditionError, TraceError
from armour_surgery.hosts.attention_interface import attention_of_chunks, is_interface
from armour_surgery.rewrite.contract import Surgery

__all__ = ["MaskDiagonalPass", "diagonal_mask", "mask_diagonal_of"]


def diagonal_mask(q: torch.Tensor, mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
    """An additive mask `[.., N, N]` that takes the diagonal out, on top of `mask` (additive or boolean) or causality.

    The diagonal gets half of the type's lowest number: below every logit, above a forbidden place (-inf or the lowest
    number), so a token that may attend to nothing else still attends to itself.
    Source: Armour paper, Table 1, "diag", after Reformer.
    """
    diagonal = mask_diagonal_of(q, -2)
    if is_causal:
        diagonal = diagonal + torch.full_like(diagonal, float("-inf")).triu(1)
    if mask is None:
        return diagonal
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf")) + diagonal
    return mask + diagonal


def mask_diagonal_of(like: torch.Tensor, axis: int) -> torch.Tensor:
    """`[N, N]`: half of the type's lowest number on the diagonal, 0 elsewhere; N is the size of `like` along `axis`."""
    return like.new_full((like.shape[axis],), torch.finfo(like.dtype).min / 2).diag()


class MaskDiagonalPass:
    """Add the mask where the core takes one: as an argument, or to the logits before a written-out softmax."""

    def requires(self, surgery: Surgery) -> None:
        """Q and K are made from the same tokens."""
        if surgery.mode.mask_diagonal and surgery.traced.q.tokens != surgery.traced.k.tokens:
            raise PostconditionError("there is no diagonal between different tokens")

    def __call__(self, surgery: Surgery) -> bool:
        """Add the mask; does nothing for modes without it."""
        if not surgery.mode.mask_diagonal:
            return False
        for core in surgery.traced.cores:
            with surgery.graph.inserting_before(core.node):
                if core.kind == "softmax":
                    logits = core.node.args[0]
                    diagonal = surgery.graph.call_function(mask_diagonal_of, (logits, -2))
                    masked = surgery.graph.call_method("add", (logits, diagonal))
                    core.node.update_arg(0, masked)
                else:
                    _mask_argument(surgery.graph, core.node)
        return True

    def ensures(self, surgery: Surgery) -> None:
        """Every core of the attention has the mask once."""
        for core in surgery.traced.cores:
            inputs = [source for node in (core.node, *core.node.all_input_nodes) for source in node.all_input_nodes]
            masks = {node for node in inputs if node.target in (diagonal_mask, mask_diagonal_of)}
            if len(masks) != int(surgery.mode.mask_diagonal):
                raise PostconditionError(f"{len(masks)} diagonal masks before {core.node}")


def _mask_argument(graph: fx.Graph, node: fx.Node) -> None:
    """Combine the diagonal with the mask that an attention call already has."""
    if node.target is attention_of_chunks:
        raise TraceError("its attention takes images packed into one sequence, and no mask of what they attend to")
    interface = is_interface(node.target)
    # The interface takes (default, module, q, k, v, mask), torch's own function (q, k, v, mask, dropout_p, is_causal).
    index, name = (5, "attention_mask") if interface else (3, "attn_mask")
    q = node.args[2 if interface else 0]
    old: Any = node.args[index] if len(node.args) > index else node.kwargs.get(name)
    causal: Any = node.kwargs.get("is_causal", node.args[5] if not interface and len(node.args) > 5 else None)
    # Without an argument and without a mask, transformers' attention functions ask the module whether it is causal.
    if interface and causal is None and old is None:
        causal = bool(getattr(node.args[1].meta["value"], "is_causal", False))  # type: ignore[union-attr]
    if isinstance(causal, fx.Node):
        raise TraceError("whether its attention is causal is decided while it runs")
    mask = graph.call_function(diagonal_mask, (q, old, bool(causal)))
    if len(node.args) > index:
        node.update_arg(index, mask)
    else:
        node.update_kwarg(name, mask)
    # torch refuses a mask together with is_causal; causality is in the mask now.
    if causal and "is_causal" in node.kwargs:
        node.update_kwarg("is_causal", False)
    elif causal and not interface:
        node.update_arg(5, False)
