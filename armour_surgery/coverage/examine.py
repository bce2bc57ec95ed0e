"""Examine one architecture: its attention, what converts, and whether that is exact."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from armour_surgery.coverage.oracle import Oracle
from armour_surgery.coverage.outcome import Outcome, SiteKind
from armour_surgery.coverage.softmax import attention_cores
from armour_surgery.discover import find_sites
from armour_surgery.errors import NoAttentionError
from armour_surgery.modes import AUTO, choose
from armour_surgery.records import RefusedSite
from armour_surgery.surgery.operation import prepare
from armour_surgery.traced import FoundSite, SeenSite

__all__ = ["Examiner", "plain_reason"]

# Its output differs from the original's also where projections are equal: it masks the diagonal.
_NOT_COMPARABLE = "qk-diag"
# What a fingerprint tells by the place in memory of an object, which another model's object may have later.
_OBJECT = re.compile(r"=(?!function |builtin_function_or_method |type )\w+ \d+$", re.MULTILINE)
_UNSEEN = "softmax(QK)V happens here, and discovery does not see it"


@dataclass
class Examiner:
    """Examines one architecture after the other; what was found out of one kind of site is not found out again.

    Architectures of a family have many in common: equal classes, attributes and shapes, called alike.
    """

    _known: dict[str, SiteKind] = field(default_factory=dict)
    _programs: set[tuple[str, ...]] = field(default_factory=set)
    _measured: dict[tuple[Any, ...], float | None] = field(default_factory=dict)
    _without: set[tuple[Any, ...]] = field(default_factory=set)

    def examine(self, library: str, name: str, model: nn.Module, example: dict[str, Tensor]) -> Outcome:
        """What comes of a model, which may be on the meta device. It is neither run nor changed.

        Raises:
            ExampleInputError, DiscoveryError: the model does not run.
        """
        started = time.perf_counter()
        behaviors = set(map(_behavior, model.modules()))
        if behaviors <= self._without:
            return Outcome(library, name, False, (), None, round(time.perf_counter() - started, 2))
        try:
            sites = find_sites(model, example)
        except NoAttentionError:
            sites = []
        found = [site for site in sites if isinstance(site, FoundSite)]
        refused = [site for site in sites if isinstance(site, RefusedSite)]
        kinds = self._found_kinds(model, found)
        if refused or not found:
            # Discovery is not its own judge. A run with numbers takes long, and is made where it saw a softmax.
            cores = attention_cores(model, example, numbers=bool(refused))
            kinds += _refused_kinds(model, sites, refused, cores)
            if not kinds and cores is not None:
                self._without |= behaviors  # nor have other models that consist of such modules
        return Outcome(library, name, bool(kinds), tuple(kinds), None, round(time.perf_counter() - started, 2))

    def _found_kinds(self, model: nn.Module, found: Sequence[FoundSite]) -> list[SiteKind]:
        alike: dict[str, list[FoundSite]] = {}
        for site in found:
            alike.setdefault(site.fingerprint, []).append(site)
        kinds = []
        for fingerprint, sites in alike.items():
            known = self._known.get(fingerprint) or self._kind(model, sites[0])
            if not _OBJECT.search(fingerprint):
                self._known[fingerprint] = known
            kinds.append(replace(known, fqn=sites[0].fqn, count=len(sites)))
        return kinds

    def _kind(self, model: nn.Module, first: FoundSite) -> SiteKind:
        auto, reason = choose(first.site, AUTO)
        module = model.get_submodule(first.fqn)
        # Of sites that differ in their sizes alone, one is tried in every mode; the others in the one that matters.
        program = _program(module, first)
        tried = first.site.modes if auto is None or program not in self._programs else (auto,)
        self._programs.add(program)
        modes: dict[str, float | None] = {}
        refused = dict(first.site.refused)
        broken = []
        failed: dict[str, str] = {}
        oracle = cache(partial(Oracle, module, first))  # made where numbers are needed, for all modes
        for mode in tried:
            try:
                prepared = prepare(model, [first], mode)
                if prepared.operations:
                    modes[mode] = None
                    # Numbers take long. Sites that differ in how many tokens they see alone are not run again.
                    alike = mode, program, _channels(module, first)
                    if alike not in self._measured:
                        comparable = mode != _NOT_COMPARABLE
                        self._measured[alike] = oracle().difference(prepared.operations[0]) if comparable else None
                    modes[mode] = self._measured[alike]
                else:
                    refused[mode] = prepared.refused[0].reason
                    broken.append(mode)
            except Exception as error:
                # Whatever the rewriting, the generated code, or the host's code runs into: it is what is looked for.
                failed[mode] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if auto is not None and auto not in modes:
            reason = refused.get(auto) or failed[auto]
        if auto not in modes:
            auto, refused[AUTO] = None, reason
        return SiteKind(type(module).__name__, first.fqn, 1, auto, modes, refused, tuple(broken), failed)


def _behavior(module: nn.Module) -> tuple[Any, ...]:
    """What decides which way a forward goes: the class, and its attributes; of a number, whether it is zero."""
    told: list[tuple[str, Any]] = []
    for name, value in vars(module).items():
        if isinstance(value, int | float):
            told.append((name, bool(value)))
        elif isinstance(value, str | None):
            told.append((name, value))
    return type(module), *sorted(told, key=lambda pair: pair[0])


def _channels(module: nn.Module, found: FoundSite) -> tuple[Any, ...]:
    """The sizes of a site that its tokens have no part in: of its heads, and of its layers' weights."""
    heads = [(role.num_heads, role.head_dim) for role in found.traced.roles]
    layers = [child for child in module.modules() if isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    return *heads, *(tuple(layer.weight.shape) for layer in layers)


def _program(module: nn.Module, found: FoundSite) -> tuple[str, ...]:
    """What a site computes, without its sizes: its class, and the operations of its graph."""
    cls = type(module)
    nodes = [f"{node.op} {node.target}" for node in found.traced.trace.graph.nodes]
    return f"{cls.__module__}.{cls.__qualname__}", *nodes


def _refused_kinds(
    model: nn.Module,
    sites: Sequence[SeenSite],
    refused: Sequence[RefusedSite],
    cores: list[frozenset[str]] | None,
) -> list[SiteKind]:
    """The attention that could not be followed, by class and reason; without softmaxes that are no attention."""
    hosts = dict(model.named_modules())
    places: dict[tuple[str, str], list[str]] = {}
    for site in refused:
        if cores is None or any(site.fqn in core for core in cores):
            alike = type(hosts[site.fqn]).__name__, plain_reason(site.reason)
            places.setdefault(alike, []).append(site.fqn)
    followed = {site.fqn for site in sites}
    for core in cores or ():
        if not followed & core:
            innermost = max(core, key=len)
            places.setdefault((type(hosts[innermost]).__name__, _UNSEEN), []).append(innermost)
    return [
        SiteKind(host, names[0], len(set(names)), None, {}, {AUTO: reason}) for (host, reason), names in places.items()
    ]


def plain_reason(reason: str) -> str:
    """A reason without what differs from site to site, so that equal ones can be counted: numbers and names."""
    plain = re.sub(r"\b[\w-]+(?:\.[\w-]+)+\b", "NAME", reason)
    plain = re.sub(r"0x[0-9a-f]+|(?<![A-Za-z])\d+(?:\.\d+)?", "N", plain)
    return re.sub(r"\bN(?:, N)+\b", "N, ...", plain)
