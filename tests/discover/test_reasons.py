"""Every reason that discovery, modes and refusals give stands in docs/refusals.md, word for word."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import armour_surgery

PACKAGE = Path(armour_surgery.__file__).parent
PAGE = " ".join((Path(__file__).parents[2] / "docs" / "refusals.md").read_text(encoding="utf-8").split())
FILES = [*sorted((PACKAGE / "discover").glob("*.py")), PACKAGE / "surgery" / "refusals.py"]
# Where every text that a function returns is a reason, or the end of one.
RETURNING = [PACKAGE / "modes.py", PACKAGE / "altered.py"]
# What is called with a reason: by which of its arguments.
CALLS = {"TraceError": 0, "Gate": 0, "MadeOutside": 0, "RefusedSite": 1, "self.seen": 0, "refused.setdefault": 1}


def text(node: ast.AST) -> str | None:
    """A text as the page has it: what is put in is `…`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def reasons(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        given: list[ast.AST] = []
        if isinstance(node, ast.Call):
            place = CALLS.get(ast.unparse(node.func))
            given = node.args[place : place + 1] if place is not None else []  # type: ignore[assignment]
        elif path in RETURNING and isinstance(node, ast.Return | ast.Yield) and node.value is not None:
            given = [*node.value.elts] if isinstance(node.value, ast.Tuple) else [node.value]
        for one in given:
            found = text(one)
            if found is not None and len(found.strip("… :")) > 10 and " " in found:
                yield found


@pytest.mark.parametrize("path", [*FILES, *RETURNING], ids=lambda path: path.name)
def test_reasons_are_documented(path: Path) -> None:
    for reason in reasons(path):
        assert " ".join(reason.split()) in PAGE, reason


def test_the_reader_finds_them() -> None:
    found = {path.name: len(list(reasons(path))) for path in [*FILES, *RETURNING]}
    assert found["match.py"] >= 4
    assert found["modes.py"] >= 6
    assert found["altered.py"] >= 5
    assert found["gates.py"] >= 5
