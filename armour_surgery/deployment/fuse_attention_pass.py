"""Bring attention that is written out to torch's fused kernel."""

from typing import Any

import torch.nn.functional as F
from torch import fx

from armour_surgery.deployment.attention import CHANGED, NOTHING_TO_DO, AttentionGraph, Outcome
from armour_surgery.deployment.written_out import WrittenOut, read_written_out
from armour_surgery.discover import value_of
from armour_surgery.traced import Core

__all__ = ["fuse_attention"]

# With fewer keys the logits are small, and writing them out costs no more than the kernel's own overhead: LeViT-128S,
# batch 16, eager, one thread of an EPYC with AVX2, 196 keys 1.45 times as fast, 49 and 16 keys within the noise.
_FEWEST_KEYS = 64


def fuse_attention(state: AttentionGraph) -> Outcome:
    """`softmax(scale q k^T + bias) v` becomes `scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)`.

    The kernel for CPUs takes q, k and v of one width. Where V is wider (LeViT), K gets zeros, which makes it
    indifferent what Q has in these places: Q is read on into the channels beside it, without a copy.
    """
    core = state.traced.core
    if state.fused:
        return NOTHING_TO_DO
    keys = core.k.meta["value"].shape[core.k_axes[0]]
    # torch.compile fuses them itself. To other runtimes torch's exporter hands a fused attention written out, Q and K
    # both multiplied by the root of the scale (benchmarks/results/runtimes.md).
    if state.runtime != "torch" and not state.forced:
        return Outcome(reason=f"in {state.runtime} its products and softmax are faster as they are written")
    if keys < _FEWEST_KEYS and not state.forced:
        return Outcome(reason=f"with {keys} keys its products and softmax are as fast as they are written")
    written = read_written_out(core, state.submodules())
    if isinstance(written, str):
        return Outcome(reason=written)
    q, v = core.q.meta["value"], core.v.meta["value"]
    extra = v.shape[core.v_axes[1]] - q.shape[core.q_axes[1]]
    if q.ndim != 4 or extra < 0:
        shapes = f"queries of shape {tuple(q.shape)} and values of {tuple(v.shape)}"
        return Outcome(reason=f"the fused kernel does not take {shapes}")
    for term in written.terms:
        value = term.node.meta["value"]
        if value.dtype != q.dtype or value.ndim > 4 or value.ndim < 2:
            return Outcome(reason="what it adds to its logits is of another type")
    _replace(state.graph, written, core, extra)
    state.fused = state.changed = True
    return CHANGED


def _replace(graph: fx.Graph, written: WrittenOut, core: Core, extra: int) -> None:
    """Write the fused call where the product with V is; what that read alone dies."""

    def call(method: Any, *args: Any, **kwargs: Any) -> fx.Node:
        # With its value, which later steps and passes ask for, as the tracer would have noted it.
        with graph.inserting_before(written.result):
            kind = "call_method" if isinstance(method, str) else "call_function"
            node = graph.create_node(kind, method, args, kwargs)
        values, options = value_of(args), value_of(kwargs)
        function = getattr(values[0], method) if isinstance(method, str) else method
        node.meta["value"] = function(*(values[1:] if isinstance(method, str) else values), **options)
        return node

    def upright(node: fx.Node, axes: tuple[int, int]) -> fx.Node:
        return node if axes == (-2, -1) else call("transpose", node, -2, -1)

    query, key, value = core.q, upright(core.k, core.k_axes), upright(core.v, core.v_axes)
    if extra:
        # Zeros in K take out of the logits whatever Q has there: its neighbors in memory, or zeros where it has none.
        wide = _widened(graph, core.q, core.q_axes[1], extra)
        key = call(F.pad, key, (0, extra))
        query = call(F.pad, upright(core.q, core.q_axes), (0, extra)) if wide is None else upright(wide, core.q_axes)
    else:
        query = upright(core.q, core.q_axes)
    mask: fx.Node | None = None
    for term in written.terms:
        node = term.node if term.factor == 1.0 else call("mul", term.node, term.factor)
        mask = node if mask is None else call("add", mask, node)
    # The kernel for CPUs takes masks of two or four axes; with three, torch writes the attention out.
    if mask is not None and mask.meta["value"].ndim == 3:
        mask = call("unsqueeze", mask, 0)
    fused = call(F.scaled_dot_product_attention, query, key, value, attn_mask=mask, scale=written.scale)
    result = call("transpose", fused, -2, -1) if written.transposed else fused
    if any(user.target == "view" for user in written.result.users):
        result = call("contiguous", result)  # the kernel lays out its result in another order than a product does
    written.result.replace_all_uses_with(result)


def _widened(graph: fx.Graph, query: fx.Node, axis: int, extra: int) -> fx.Node | None:
    """Q together with the `extra` channels that lie behind it in its projection's output, where some do; a view."""
    rank = query.meta["value"].ndim
    axis %= rank
    size = query.meta["value"].shape[axis]
    moves: list[fx.Node] = []
    node = query
    # Up through the moves of axes, to where Q is cut out of the packed output; then down again by the same moves.
    while node.op == "call_method" and node.target in ("permute", "transpose"):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        moves.insert(0, node)
        axis = _axis_before(node, axis, rank)
        node = source
    place = _place(node, axis, rank)
    if place is None:
        return None
    packed, start = place
    if start + size + extra > packed.meta["value"].shape[axis]:
        return None
    with graph.inserting_before(query):
        wide = graph.call_method("narrow", (packed, axis, start, size + extra))
        wide.meta["value"] = packed.meta["value"].narrow(axis, start, size + extra)
        for move in moves:
            value = getattr(wide.meta["value"], str(move.target))(*value_of(move.args[1:]))
            wide = graph.call_method(str(move.target), (wide, *move.args[1:]))
            wide.meta["value"] = value
    return wide


def _axis_before(move: fx.Node, axis: int, rank: int) -> int:
    """The axis that a permutation or transposition puts at `axis`."""
    axes = value_of(tuple(move.args[1:]))
    if move.target == "permute":
        order = axes[0] if isinstance(axes[0], tuple | list) else axes
        return int(order[axis] % rank)
    first, second = axes[0] % rank, axes[1] % rank
    swapped = {first: second, second: first}
    return int(swapped.get(axis, axis))


def _place(node: fx.Node, axis: int, rank: int) -> tuple[fx.Node, int] | None:
    """The tensor that a node is a slice of along `axis`, and where it starts."""
    if node.op == "call_method" and node.target == "narrow":
        packed, along, start, _ = node.args
        if isinstance(packed, fx.Node) and value_of(along) % rank == axis:
            return packed, value_of(start)
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and source.op == "call_method" and source.target == "split":
        along = value_of(source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0))
        sizes = value_of(source.args[1])
        packed = source.args[0]
        if isinstance(packed, fx.Node) and along % rank == axis and isinstance(sizes, list | tuple):
            return packed, sum(sizes[: value_of(node.args[1])])
    return None
