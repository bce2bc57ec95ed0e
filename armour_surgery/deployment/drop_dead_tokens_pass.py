"""After the last attention only the tokens that the head reads matter: the others are not computed any further."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from armour_surgery.altered import has_hooks
from armour_surgery.deployment.emit import make_deployed_class
from armour_surgery.deployment.findings import Findings
from armour_surgery.discover.dataflow import Dataflow, follow_model
from armour_surgery.discover.match import find_core, is_call_of
from armour_surgery.discover.nodes import value_of
from armour_surgery.discover.record import record
from armour_surgery.discover.trace import trace
from armour_surgery.errors import TraceError
from armour_surgery.rewrite import render
from armour_surgery.rewrite.remove_dead_nodes_pass import erase_unused, unread_nodes

__all__ = ["drop_dead_tokens"]

# They act on every number for itself.
_ELEMENTWISE = {"add", "mul", "sub", "gelu", "relu", "silu", "hardswish", "sigmoid", "tanh", "quick_gelu", "div"}
_SUMS = {operator.add, torch.add, operator.mul, torch.mul, "add", "mul"}


_NO_SELECTION = "nothing after it reads only its first tokens"


def drop_dead_tokens(model: nn.Module, example: dict[str, Tensor], findings: Findings) -> None:
    """Narrow the last attention's queries, and all that follows, to the first tokens, where a head reads no others.

    Keys and values are still those of all tokens, so the tokens that are left come out the same. Only the model's own
    `forward` changes, by a subclass: `forward_features` and whatever else returns tokens gives all of them. Hooks on
    the last block would no longer fire, so with them it stays as it is.
    """
    recording = record(model, example)
    if not recording.innermost:
        return
    last = list(recording.innermost)[-1]
    running = set().union(*recording.innermost.values())
    inside = {name for name in running if name.startswith(f"{last}.")}

    def is_opaque(name: str, _: nn.Module) -> bool:
        """Looked into are the modules around the last attention, and those inside it that computed part of it."""
        leads_to_it = f"{last}.".startswith(f"{name}.")
        return not leads_to_it and name not in inside

    # These are written out, so that neither a hook on them nor a forward of their own would run.
    around = [name for name in running if not is_opaque(name, model)]
    for name in ("", *around):
        module = model.get_submodule(name)
        if (name and has_hooks(module)) or "forward" in vars(module):
            findings.left(last, f"{name or 'the model'} has a hook, or a forward that was put on it")
            return
    flow = follow_model(model, example)
    # Following the whole of a model may take minutes, where all sizes are computed from other ones (Swin of
    # transformers).
    if not _may_select(flow):
        findings.left(last, _NO_SELECTION)
        return
    try:
        traced = trace(model, recording.calls[""][0], is_opaque)
        acting = unread_nodes(traced.graph)
        reason = _narrow(traced.graph, flow, dict(model.named_modules()))
    except TraceError as error:
        reason = f"the whole model cannot be followed: {error}"
    if reason is not None:
        findings.left(last, reason)
        return
    erase_unused(traced.graph, acting)
    traced.graph.lint()
    cls = make_deployed_class(type(model), render(traced.graph, traced.signature))
    object.__setattr__(model, "__class__", cls)
    findings.did(last)


def _may_select(flow: Dataflow) -> bool:
    """Whether something takes some of the last attention's tokens after it, as a head does."""
    fused = [index for index, call in enumerate(flow.calls) if call.name == "scaled_dot_product_attention"]
    if not fused:
        return False
    query = flow.calls[fused[-1]].argument(0, "query")
    later = flow.calls[fused[-1] + 1 :]
    selections = [call for call in later if call.name == "__getitem__" and len(call.args) > 1]
    return any(_selected(call.source, call.args[1], query.shape[-2]) is not None for call in selections)


def _narrow(graph: fx.Graph, flow: Dataflow, modules: dict[str, nn.Module]) -> str | None:
    """Rewrite the graph; or say why all tokens are needed."""
    core = find_core(graph, modules)
    if core is None or core.kind != "sdpa" or core.q.meta["value"].ndim != 4:
        return "its last attention is not one call of scaled_dot_product_attention"
    tokens = core.q.meta["value"].shape[-2]
    selections: dict[fx.Node, int] = {}
    ours: list[fx.Node] = [core.node]
    # Everything after the core has all tokens on axis 1, up to where a head selects some; those stay where they are.
    for node in graph.nodes:
        if not any(source in ours for source in node.all_input_nodes):
            continue
        taken = None
        if node.target is operator.getitem:
            taken = _selected(value_of(node.args[0]), value_of(node.args[1]), tokens)
        if taken is not None:
            selections[node] = taken
        elif node.op == "output" or not _keeps_tokens(node, tokens, flow, modules):
            what = "the model's output" if node.op == "output" else getattr(node.target, "__name__", node.target)
            return f"{what} needs all its tokens"
        else:
            ours.append(node)
    if not selections:
        return _NO_SELECTION
    kept = max(selections.values()) + 1
    if kept >= tokens:
        return "its head reads all tokens"
    _apply(graph, core.node, core.q, ours, kept, tokens)
    return None


def _selected(source: Any, index: Any, tokens: int) -> int | None:
    """The last token that `x[:, i]` or `x[:, :i]` takes; None for anything else."""
    if not isinstance(source, Tensor) or source.ndim != 3 or source.shape[1] != tokens:
        return None
    if not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None):
        return None
    if isinstance(index[1], int) and index[1] >= 0:
        return index[1]
    stop = index[1].stop if isinstance(index[1], slice) else None
    return stop - 1 if isinstance(stop, int) and 0 < stop < tokens else None


def _keeps_tokens(node: fx.Node, tokens: int, flow: Dataflow, modules: dict[str, nn.Module]) -> bool:
    """Whether a node treats every token for itself, or is one of the views from heads back to tokens."""
    value = node.meta.get("value")
    if not isinstance(value, Tensor):
        return False
    if node.op == "call_module":
        name = str(node.target)
        if flow.is_hooked(name):
            return False  # a hook may look at all tokens
        if is_call_of(node, modules, nn.Identity, nn.Dropout):
            return True
        return value.ndim == 3 and value.shape[1] == tokens and _treats_tokens_alone(flow, name)
    if node.target in _SUMS:
        return all(_fits(value_of(argument), tokens) for argument in node.args)
    if node.op == "call_method" and node.target == "transpose":
        return value_of(tuple(node.args[1:])) in ((1, 2), (2, 1))
    if node.op == "call_method" and node.target in ("reshape", "view"):
        return value.ndim == 3 and len(node.args) == 4 and value.shape[1] == tokens
    return node.op == "call_method" and node.target in ("contiguous", "flatten") and value.ndim >= 3


def _fits(value: Any, tokens: int) -> bool:
    """Whether an operand has its tokens on axis 1, or none at all."""
    if not isinstance(value, Tensor):
        return isinstance(value, int | float)
    return value.ndim <= 1 or (value.ndim == 3 and value.shape[1] in (1, tokens))


def _treats_tokens_alone(flow: Dataflow, name: str) -> bool:
    """Whether a module does nothing but projections, norms over channels and element-wise operations."""
    for call in flow.calls:
        if call.module != name and not call.module.startswith(f"{name}."):
            continue
        source = call.source
        whole = isinstance(source, Tensor) and source.ndim == 3
        normed = call.name == "layer_norm" and len(call.args[1]) == 1
        if not whole or not (call.name == "linear" or normed or call.name in _ELEMENTWISE):
            return False
        # With four axes, say, nothing tells which one the tokens are on.
        if call.name in _ELEMENTWISE and any(t.ndim not in (0, 1, 3) for t in call.reads()):
            return False
    return True


def _apply(graph: fx.Graph, core: fx.Node, query: fx.Node, ours: list[fx.Node], kept: int, tokens: int) -> None:
    """Narrow what flows into the nodes from outside, and the sizes that they state."""
    narrowed: dict[fx.Node, fx.Node] = {}

    def few(node: fx.Node, axis: int, before: fx.Node) -> fx.Node:
        # Once for each tensor: a residual and a bias may be added in several places.
        if node not in narrowed:
            with graph.inserting_before(before):
                narrowed[node] = graph.call_method("narrow", (node, axis, 0, kept))
        return narrowed[node]

    def narrow_argument(index: int, name: str, argument: fx.Node) -> None:
        with graph.inserting_before(core):
            rows = graph.call_method("narrow", (argument, -2, 0, kept))
        if len(core.args) > index:
            core.update_arg(index, rows)
        else:
            core.update_kwarg(name, rows)

    narrow_argument(0, "query", query)
    mask = core.args[3] if len(core.args) > 3 else core.kwargs.get("attn_mask")
    # A mask with one row serves all queries.
    if isinstance(mask, fx.Node) and mask.meta["value"].shape[-2] != 1:
        narrow_argument(3, "attn_mask", mask)
    # The core is first, and was narrowed above.
    for node in ours[1:]:
        if node.op == "call_method" and node.target in ("reshape", "view"):
            node.update_arg(2, kept)
        elif node.target in _SUMS:
            for place, argument in enumerate(node.args):
                if not isinstance(argument, fx.Node) or argument in ours:
                    continue
                value = argument.meta["value"]
                if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == tokens:
                    node.update_arg(place, few(argument, 1, node))
