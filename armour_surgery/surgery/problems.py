"""The operations as the initializers see them: one problem a site."""

from torch import nn

from armour_surgery.initialize.freedom import Freedom, probe
from armour_surgery.initialize.problem import Parts, Problem
from armour_surgery.rewrite import AddGrouped, Edit, KeepRows
from armour_surgery.rewrite.contract import Part
from armour_surgery.surgery.operation import Operation
from armour_surgery.traced import FoundSite

__all__ = ["kept_rows", "problems_of"]


def problems_of(model: nn.Module, operations: list[Operation]) -> list[Problem]:
    """The operations as the initializers see them. `model` is the one that is not converted, with its weights."""
    # What a basis may be is tried out with numbers, and holds for all sites that are alike.
    freedoms: dict[str, Freedom] = {}
    problems = []
    for operation in operations:
        found = operation.found
        if found.fingerprint not in freedoms:
            freedoms[found.fingerprint] = _freedom(model.get_submodule(found.fqn), found)
        problems.append(_problem(operation, freedoms[found.fingerprint]))
    return problems


def _freedom(module: nn.Module, found: FoundSite) -> Freedom:
    traced = found.traced
    return probe(module, found.call, traced.q, traced.k, traced.v, found.output)


def _problem(operation: Operation, freedom: Freedom) -> Problem:
    found, traced, rewritten = operation.found, operation.found.traced, operation.rewritten
    return Problem(
        fqn=operation.fqn,
        q=traced.q,
        k=traced.k,
        v=traced.v,
        out=found.output,
        freedom=freedom,
        key=_spans(rewritten.key),
        value=_spans(rewritten.value),
        kept=kept_rows(rewritten.edits),
        grouped=next((edit.name for edit in rewritten.edits if isinstance(edit, AddGrouped)), None),
        same_tokens=found.site.reads["q"] == found.site.reads["k"],
        rank=operation.rank,
    )


def _spans(parts: tuple[Part, ...]) -> Parts:
    return tuple((part.letter, part.start, part.stop) for part in parts)


def kept_rows(edits: list[Edit]) -> dict[str, tuple[int, ...]]:
    """For each tensor that gets narrower, by name, the old rows that it keeps."""
    kept: dict[str, tuple[int, ...]] = {}
    for edit in edits:
        if isinstance(edit, KeepRows):
            kept.update(dict.fromkeys(edit.tensors, edit.rows))
    return kept
