"""Find every attention of a model by dataflow: run it once, follow q, k and v back to their projections.

Nothing here knows a class or an attribute of any model.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from armour_surgery.discover.match import result_of
from armour_surgery.discover.output import find_output
from armour_surgery.discover.provenance import understand
from armour_surgery.discover.record import Recording, could_not_run, record
from armour_surgery.discover.results import find_results
from armour_surgery.discover.trace import SELF, guard, trace, value_of
from armour_surgery.errors import NoAttentionError, TraceError
from armour_surgery.modes import MODES, judge
from armour_surgery.records import AttentionSite, Projection
from armour_surgery.traced import Call, FoundSite, Role, Trace, TracedSite

__all__ = [
    "SELF",
    "could_not_run",
    "find_output",
    "find_results",
    "find_sites",
    "guard",
    "result_of",
    "trace_call",
    "value_of",
]


def trace_call(module: nn.Module, call: Call, around: frozenset[str]) -> TracedSite:
    """Follow one call of an attention module in its present state (train or eval).

    Raises:
        TraceError: it cannot be followed; the message says why, in a user's words.
    """
    modules = dict(module.named_modules())

    def trace_inside(name: str, node: fx.Node) -> Trace:
        inner = Call(tuple(value_of(node.args)), dict(value_of(node.kwargs)))
        return trace(modules[name], inner, lambda child, _: not _holds_layers(modules[name].get_submodule(child)))

    def retrace(inlined: set[str]) -> Trace:
        return trace(module, call, lambda name, _: name not in around and name not in inlined)

    return understand(retrace(set()), modules, trace_inside, retrace)


def _holds_layers(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d) for child in module.modules())


def _projection(role: Role, prefix: str) -> Projection:
    name = role.producer.fqn
    return Projection(f"{prefix}.{name}" if prefix else name, role.channels, role.tokens)


def _kind(traced: TracedSite) -> str:
    """How the tokens that ask relate to the tokens that are asked."""
    q, k = traced.q, traced.k
    if q.producer.reads == k.producer.reads:
        return "self-attention"
    asked, asking = _sources(traced, k), _sources(traced, q)
    if q.tokens < k.tokens and asked[0] in asking:
        return "downsampling"
    if q.tokens > k.tokens and asking[0] in asked:
        return "reduced keys"
    return "cross-attention"


def _sources(traced: TracedSite, role: Role) -> list[str]:
    """The tensor that a role is projected from, and all it is computed from, nearest first."""
    name = role.producer.reads.partition(" ")[0]
    nodes = [node for node in traced.trace.graph.nodes if node.name == name]
    for node in nodes:
        nodes += [source for source in node.all_input_nodes if source not in nodes]
    return [node.name for node in nodes]


def _site(fqn: str, traced: TracedSite) -> AttentionSite:
    q, k, v = traced.q, traced.k, traced.v
    site = AttentionSite(
        fqn=fqn,
        kind=_kind(traced),
        num_heads=q.num_heads,
        key_dim=q.head_dim,
        value_dim=v.head_dim,
        q=_projection(q, fqn),
        k=_projection(k, fqn),
        v=_projection(v, fqn),
        reads={"q": q.producer.reads, "k": k.producer.reads, "v": v.producer.reads},
        plain_value_projection=v.producer.plain,
    )
    modes, refused = judge(site)
    return replace(site, modes=modes, refused=refused)


def _unfollowed(fqn: str, reason: str) -> AttentionSite:
    return AttentionSite(fqn, "unknown", 0, 0, 0, None, None, None, refused=dict.fromkeys(MODES, reason))


def _relative(names: set[str], fqn: str) -> frozenset[str]:
    prefix = f"{fqn}." if fqn else ""
    return frozenset(name[len(prefix) :] for name in names if name.startswith(prefix) and name != fqn)


_BOOKKEEPING = set(vars(nn.Module()))


def _fingerprint(module: nn.Module, call: Call, around: frozenset[str]) -> str:
    """All that can make the traces of two modules differ: classes, plain attributes, shapes, and the call."""

    def plain(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{tuple(value.shape)} {value.dtype}"
        if value is None or isinstance(value, bool | int | float | str | tuple | list):
            return repr(value)
        return "" if isinstance(value, dict) else f"{type(value).__qualname__} {id(value)}"

    lines = [f"{sorted(around)}", *(plain(leaf) for leaf in pytree.tree_leaves((call.args, call.kwargs)))]
    for name, child in module.named_modules():
        # Functions are one object for all instances; other objects count by identity.
        own = {key: value for key, value in vars(child).items() if key not in _BOOKKEEPING}
        tensors = {**child._parameters, **child._buffers}
        lines.append(f"{name} {type(child).__module__}.{type(child).__qualname__}")
        lines += [f"{key}={plain(value)}" for key, value in sorted({**own, **tensors}.items())]
    return "\n".join(lines)


def _follow(recording: Recording, fqn: str, known: dict[str, TracedSite | TraceError]) -> FoundSite:
    """Follow the attention seen in module `fqn`, from the module around it where its projections are not inside."""
    modules = dict(recording.model.named_modules())
    first: str | None = None
    place = fqn
    while True:
        call, around = recording.calls[place], _relative(recording.around, place)
        key = _fingerprint(modules[place], call, around)
        if key not in known:
            try:
                known[key] = trace_call(modules[place], call, around)
            except TraceError as error:
                known[key] = error
        traced = known[key]
        if isinstance(traced, TracedSite):
            return FoundSite(_site(place, traced), call, around, traced, key)
        first = first or str(traced)
        if not place or "was found behind" not in first:
            return FoundSite(_unfollowed(fqn, first), recording.calls[fqn], around, None, key)
        place = place.rpartition(".")[0]
        while place not in recording.calls:  # a ModuleList or ModuleDict is never called
            place = place.rpartition(".")[0]


def find_sites(model: nn.Module, example: dict[str, Any]) -> list[FoundSite]:
    """All attention of a model, in the order it runs. The model itself is not run and not changed.

    `example` are keyword arguments for the model's forward; only their shapes and types matter.

    Raises:
        ExampleInputError: the model does not run on the example.
        NoAttentionError: it runs, and no attention happened.
    """
    with torch.no_grad():
        recording = record(model, example)
        if not recording.innermost:
            raise NoAttentionError(
                f"{type(model).__name__} ran and computed no attention (no softmax between two matrix products, no "
                "scaled_dot_product_attention): there is nothing to convert. Name a Vision Transformer"
            )
        found: dict[str, FoundSite] = {}
        known: dict[str, TracedSite | TraceError] = {}
        for fqn in recording.innermost:
            one = _follow(recording, fqn, known)
            found.setdefault(one.site.fqn, one)
    return list(found.values())
