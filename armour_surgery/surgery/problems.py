"""The operations as the initializers see them: one problem a site."""

from torch import nn

from armour_surgery.discover.output import output_of
from armour_surgery.errors import ConversionError
from armour_surgery.initialize.freedom import Freedom, probe
from armour_surgery.initialize.problem import Problem
from armour_surgery.rewrite import AddGrouped, KeepRows
from armour_surgery.surgery.operation import Operation
from armour_surgery.traced import OutputProjection

__all__ = ["problems_of"]


def problems_of(model: nn.Module, operations: list[Operation]) -> list[Problem]:
    """The operations as the initializers see them. `model` is the one that is not converted, with its weights.

    Raises:
        ConversionError: several heads of Q share one of K, and closed forms take them head by head.
    """
    for operation in operations:
        q, k = operation.found.site.q, operation.found.site.k
        if q is not None and k is not None and q.num_heads != k.num_heads:
            raise ConversionError(
                f"{operation.fqn} has {q.num_heads} heads of Q for {k.num_heads} of K, and only init 'wq' is there for "
                f"that; use it and train, or leave the site out with exclude={operation.fqn!r}"
            )
    done: dict[str, tuple[OutputProjection | None, Freedom]] = {}
    return [_problem(model, operation, done) for operation in operations]


def _problem(
    model: nn.Module, operation: Operation, done: dict[str, tuple[OutputProjection | None, Freedom]]
) -> Problem:
    found, traced = operation.found, operation.found.traced
    assert traced is not None
    module = model.get_submodule(operation.fqn)
    if found.fingerprint not in done:
        out = output_of(module, found)
        done[found.fingerprint] = out, probe(module, found.call, traced.q, traced.k, traced.v, out)
    edits = operation.rewritten.edits
    key, value = (
        tuple((part.letter, part.start, part.stop) for part in parts)
        for parts in (operation.rewritten.key, operation.rewritten.value)
    )
    return Problem(
        operation.fqn,
        traced.q,
        traced.k,
        traced.v,
        *done[found.fingerprint],
        key,
        value,
        {name: edit.rows for edit in edits if isinstance(edit, KeepRows) for name in edit.tensors},
        next((edit.name for edit in edits if isinstance(edit, AddGrouped)), None),
        found.site.reads["q"] == found.site.reads["k"],
        operation.rank,
    )
