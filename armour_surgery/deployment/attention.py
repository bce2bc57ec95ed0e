"""Passes on the traced attention of every site; sites that are alike are rewritten once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from armour_surgery.altered import has_hooks, names_below
from armour_surgery.deployment.emit import make_deployed_class
from armour_surgery.deployment.findings import Findings
from armour_surgery.discover import find_sites
from armour_surgery.discover.match import is_call_of
from armour_surgery.errors import NoAttentionError
from armour_surgery.rewrite import render
from armour_surgery.rewrite.remove_dead_nodes_pass import erase_unused, unread_nodes
from armour_surgery.traced import FoundSite, TracedSite

__all__ = ["CHANGED", "NOTHING_TO_DO", "AttentionGraph", "AttentionPass", "Outcome", "deploy_attention"]


@dataclass
class AttentionGraph:
    """The attention of some modules that are alike, being rewritten.

    Passes change `graph`, fill `buffers` (for each module, new tensors by name), and list in `edits` what has to be
    done to each module; `undo` takes back, on a copy, what the host's own forward must not find done. `fused` says that
    the core is one call.
    """

    traced: TracedSite
    graph: fx.Graph
    modules: list[nn.Module]
    runtime: str
    forced: bool
    fused: bool
    changed: bool = False
    buffers: list[dict[str, Tensor]] = field(default_factory=list)
    edits: list[Callable[[nn.Module], None]] = field(default_factory=list)
    undo: list[Callable[[nn.Module], None]] = field(default_factory=list)

    def submodules(self) -> dict[str, nn.Module]:
        """The submodules of the first of them, by name."""
        return dict(self.modules[0].named_modules())


@dataclass(frozen=True)
class Outcome:
    """What a pass did: it changed the attention, or left it alone for a reason, or (neither) found nothing to do."""

    changed: bool = False
    reason: str | None = None


CHANGED = Outcome(changed=True)
NOTHING_TO_DO = Outcome()
AttentionPass = Callable[[AttentionGraph], Outcome]


def deploy_attention(
    model: nn.Module,
    example: dict[str, Tensor],
    passes: Iterable[tuple[AttentionPass, Findings]],
    *,
    runtime: str,
    forced: bool,
) -> None:
    """Run the passes, in order, on every attention of a model, and put in the modules that come out.

    `runtime` is where the model will run (one of `pipeline.RUNTIMES`), `forced` says that passes act also where they do
    not pay.
    """
    try:
        sites = find_sites(model, example)
    except NoAttentionError:
        return
    passes = list(passes)
    groups: dict[str, list[FoundSite]] = {}
    for site in sites:
        reason = _why_left(model, site) if isinstance(site, FoundSite) else site.reason
        if isinstance(site, FoundSite) and reason is None:
            groups.setdefault(site.fingerprint, []).append(site)
            continue
        for _, findings in passes:
            findings.left(site.fqn, str(reason))
    for alike in groups.values():
        _deploy_alike(model, alike, passes, runtime, forced)


def _why_left(model: nn.Module, site: FoundSite) -> str | None:
    """Why an attention stays as it is: passes know one core, and what hooks see may be gone afterwards, or another."""
    if not site.traced.is_single:
        return "it attends in several places, one after the other"
    for name in names_below(model, site.fqn)[1:]:
        if has_hooks(model.get_submodule(name)):
            return f"{name} has a hook"
    return None


def _deploy_alike(
    model: nn.Module, alike: list[FoundSite], passes: list[tuple[AttentionPass, Findings]], runtime: str, forced: bool
) -> None:
    traced = alike[0].traced
    modules = [model.get_submodule(member.fqn) for member in alike]
    graph = traced.trace.graph
    acting = unread_nodes(graph)
    state = AttentionGraph(
        traced, graph, modules, runtime, forced, traced.core.kind != "softmax", buffers=[{} for _ in modules]
    )
    for attention_pass, findings in passes:
        outcome = attention_pass(state)
        # Before the next pass: it asks how often a node is read, and what is dead reads nothing.
        erase_unused(graph, acting)
        for member in alike:
            if outcome.changed:
                findings.did(member.fqn)
            elif outcome.reason is not None:
                findings.left(member.fqn, outcome.reason)
    for module in modules:
        for edit in state.edits:
            edit(module)
    if not state.changed:
        return
    _drop_idle(state)
    erase_unused(graph, acting)
    graph.lint()
    cls = make_deployed_class(type(modules[0]), render(graph, traced.trace.signature), tuple(state.undo))
    for module, buffers in zip(modules, state.buffers, strict=True):
        for name, tensor in buffers.items():
            module.register_buffer(name, tensor, persistent=False)
        # The object stays the same, with its hooks and its place in the model; only the class, and so forward, is new.
        object.__setattr__(module, "__class__", cls)


def _drop_idle(state: AttentionGraph) -> None:
    """Leave out calls of modules that do nothing at rest."""
    modules = state.submodules()
    for node in list(state.graph.nodes):
        if is_call_of(node, modules, nn.Identity, nn.Dropout):
            node.replace_all_uses_with(node.args[0])
