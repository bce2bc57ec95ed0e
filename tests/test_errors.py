"""The exception tree: as documented, used, and one line each."""

import ast
import functools
import re
from pathlib import Path

import pytest

from armour_surgery import ArmourError, errors

PACKAGE = Path(errors.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
CLASSES: dict[str, type[ArmourError]] = {name: getattr(errors, name) for name in errors.__all__}
# Caught as a group, never raised as themselves.
GROUPS = {"ModelError", "DiscoveryError", "ConversionError", "FolderError", "ArmourError"}


def documented_tree() -> dict[str, tuple[str | None, str]]:
    """Class to (parent, explanation), read from the drawing in the docstring."""
    drawing = re.search(r"```\n(.*?)```", errors.__doc__ or "", re.DOTALL)
    assert drawing
    tree: dict[str, tuple[str | None, str]] = {}
    above: list[str] = []
    for line in drawing[1].splitlines():
        found = re.fullmatch(r"(?P<lines>[│├└─ ]*)(?P<name>\w+) +(?P<text>.+)", line)
        assert found, line
        depth = len(found["lines"]) // 4
        above[depth:] = [found["name"]]
        tree[found["name"]] = (above[depth - 1] if depth else None, found["text"])
    return tree


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    real = {
        name: (None if cls is ArmourError else next(base.__name__ for base in cls.__bases__))
        for name, cls in CLASSES.items()
    }
    assert {name: parent for name, (parent, _) in documented_tree().items()} == real
    assert all(len(cls.__bases__) == 1 for cls in CLASSES.values())


def test_every_class_of_the_module_is_public_and_ours() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(errors.__all__)
    assert all(issubclass(cls, ArmourError) for cls in CLASSES.values())
    assert errors.__all__ == sorted(errors.__all__)


def test_exit_codes() -> None:
    assert {name: cls.exit_code for name, cls in CLASSES.items() if cls.exit_code != 1} == {"UsageError": 2}
    told = {name: re.search(r"exit code (\d)", text) for name, (_, text) in documented_tree().items()}
    assert {name: int(found[1]) for name, found in told.items() if found} == {"ArmourError": 1, "UsageError": 2}


def test_every_class_is_explained() -> None:
    for name, cls in CLASSES.items():
        assert cls.__doc__
        assert cls.__doc__.strip().splitlines()[0].endswith("."), name
        assert cls.__doc__ != (cls.__bases__[0].__doc__ or "")


@functools.cache
def _trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


@functools.cache
def _raised() -> dict[str, list[str]]:
    """Where the package makes an instance of each class."""
    found: dict[str, list[str]] = {name: [] for name in CLASSES}
    for path, tree in _trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found:
                found[node.func.id].append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    return found


@pytest.mark.parametrize("name", sorted(set(CLASSES) - GROUPS))
def test_every_class_is_raised_somewhere(name: str) -> None:
    assert _raised()[name]


@functools.cache
def _tested() -> str:
    here = Path(__file__)
    return "\n".join(path.read_text(encoding="utf-8") for path in here.parent.rglob("test_*.py") if path != here)


# A bug of ours, by definition: a test that could raise it would be a bug report.
@pytest.mark.parametrize("name", sorted(set(CLASSES) - GROUPS - {"PostconditionError"}))
def test_every_class_is_expected_by_some_test(name: str) -> None:
    # Once where it is imported, and once where it is used.
    assert len(re.findall(rf"\b{name}\b", _tested())) > 1


def test_only_our_own_errors_are_raised_on_purpose() -> None:
    """Besides what Python asks for: AttributeError in `__getattr__`, and what a caller turns into ours."""
    allowed = {*CLASSES, "AttributeError", "typer.Exit", "TypeError", "ValueError", "AssertionError"}
    for path, tree in _trees().items():
        if path.name == "train_digits.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                called = ast.unparse(node.exc.func)
                if called[:1].isupper() or "." in called:
                    assert called in allowed, f"{path.name}:{node.lineno} raises {called}"


def test_no_message_is_written_with_a_newline() -> None:
    for path, tree in _trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                assert not any("\n" in text for text in texts), f"{path.name}:{node.lineno}"


def test_every_error_says_something() -> None:
    for path, tree in _trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
                assert len(node.args) == 1, f"{path.name}:{node.lineno}"
                assert not node.keywords
