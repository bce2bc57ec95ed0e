"""Imports point one way, files stay short, and every module says what is public. Read with ast, nothing is run."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import armour_surgery

PACKAGE = Path(armour_surgery.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"
BESIDE = [*sorted(TESTS.rglob("*.py")), *sorted(BENCHMARKS.rglob("*.py"))]
# From the top down: whoever stands on a floor imports from the floors below it, and from nobody else.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("paper",),
    ("recover", "benchmarking", "sharing"),
    ("exporting", "plugins"),
    ("saving", "likeness", "deployment", "coverage"),
    ("surgery", "demo"),
    ("images", "initialize", "rewrite", "discover"),
    ("hosts", "measure", "report", "modes", "traced", "progress", "devices"),
    ("errors", "notes", "records", "calls", "copies", "shapes", "altered"),
    ("patching", "examples", "views", "freed"),
    ("tabular",),
    ("spelled",),
)
# What commands import at once, since it imports nothing heavy.
LIGHT = ("errors.py", "notes.py", "records.py", "report/wording.py", "spelled.py", "tabular.py", "views.py")
LEVELS = {room: level for level, floor in enumerate(FLOORS) for room in floor}


def module_name(path: Path) -> str:
    parts = ["armour_surgery", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _imports(tree: ast.AST, package: str, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Full names of what is imported, and whether only when a function runs. Without those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join([*package.split(".")[: 1 - node.level or None], module]).rstrip(".")
            yield from ((f"{module}.{alias.name}", lazy) for alias in node.names)
        elif _is_type_checking(node):
            assert isinstance(node, ast.If)
            yield from _imports(ast.Module(node.orelse, []), package, lazy)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(node, package, lazy or inside)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return tuple(_imports(parsed(path), package))


def roots(path: Path, lazy: bool | None = None) -> set[str]:
    """Top packages that a file imports; with `lazy`, only inside functions, or only outside."""
    return {name.partition(".")[0] for name, later in imports(path) if lazy is None or later is lazy}


def inner(path: Path) -> Iterator[tuple[str, str, bool]]:
    """What a file imports of this package: the room (`discover`, `errors`), the full name, and whether lazily."""
    for name, later in imports(path):
        parts = name.split(".")
        if parts[0] != "armour_surgery" or name == "armour_surgery.__version__":
            continue
        if parts[1] in armour_surgery._HOME:  # `from armour_surgery import hosts, convert`: a room, and a public name
            home = armour_surgery._HOME[parts[1]]
            yield home.partition(".")[0], f"armour_surgery.{home}.{parts[1]}", later
        else:
            yield parts[1], name, later


def file_of(name: str) -> Path:
    """The file that the import of a full name reads: `armour_surgery.hosts.hub.quiet` is in `hosts/hub.py`."""
    path = PACKAGE
    for part in name.split(".")[1:]:
        if not (path / part).is_dir():
            return path / f"{part}.py" if (path / f"{part}.py").exists() else path / "__init__.py"
        path = path / part
    return path / "__init__.py"


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def test_the_reader_of_imports_sees_them() -> None:
    source = (
        "from typing import TYPE_CHECKING\nimport a.b\nif TYPE_CHECKING:\n    import c\n"
        "def f():\n    from d import e\nfrom . import g\nfrom ..h import i\n"
        "try:\n    import j\nexcept ImportError: ...\n"
    )
    found = dict(_imports(ast.parse(source), "armour_surgery.cli"))
    assert found == {
        "typing.TYPE_CHECKING": False,
        "a.b": False,
        "d.e": True,
        "armour_surgery.cli.g": False,
        "armour_surgery.h.i": False,
        "j": False,
    }
    assert len(FILES) > 40


def test_only_the_command_line_imports_typer_and_rich() -> None:
    for path in FILES:
        assert room_of(path) == "cli" or not roots(path) & {"typer", "rich", "click"}, path


def test_only_hosts_imports_the_model_libraries() -> None:
    for path in FILES:
        if path in (PACKAGE / "recover" / "timm_parts.py", PACKAGE / "images" / "timm_datasets.py"):
            assert not roots(path) & {"transformers", "huggingface_hub"}, path
        elif room_of(path) not in ("hosts", "plugins"):
            assert not roots(path) & {"timm", "transformers", "torchvision", "huggingface_hub"}, path


def test_nobody_imports_the_command_line() -> None:
    for path in FILES:
        assert room_of(path) in ("cli", "__main__") or "cli" not in {part for part, _, _ in inner(path)}, path


def test_imports_point_down() -> None:
    for path in FILES:
        own = room_of(path)
        for room, name, _ in inner(path):
            if room != own and path != PACKAGE / "__init__.py":
                assert LEVELS[room] > LEVELS[own], f"{path}: {own} stands beside or below {room}, and imports {name}"


def test_only_the_command_line_asks_the_package_for_its_public_names() -> None:
    own = "armour_surgery."
    for path in FILES:
        asked = {name.removeprefix(own) for name, _ in imports(path) if name.startswith(own)}
        allowed = room_of(path) == "cli" or path == PACKAGE / "__init__.py"
        assert allowed or not asked & set(armour_surgery._HOME), path


def test_every_room_stands_on_one_floor() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert len(rooms) == len(set(rooms))
    assert set(rooms) == {room_of(path) for path in FILES} - {"__init__"}


def test_no_file_imports_its_way_back_to_itself() -> None:
    below = {path: {file_of(name) for _, name, _ in inner(path)} - {path} for path in FILES}
    del below[PACKAGE / "__init__.py"]  # it hands on names of all rooms, and asks for them when they are asked for
    left = dict(below)
    while left:
        leaves = [path for path, imported in left.items() if not imported & left.keys()]
        assert leaves, f"a circle is among {sorted(str(path.relative_to(PACKAGE)) for path in left)}"
        for path in leaves:
            del left[path]


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=str)
def test_faces_hand_names_on_and_define_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        if isinstance(node, ast.ImportFrom) or _is_type_checking(node):
            continue
        name = getattr(node, "name", None) or ast.unparse(getattr(node, "targets", [node])[0])
        # The package tells the libraries of itself; nothing is imported for that.
        own = ("__version__", "_HOME", "__getattr__", "register_with_libraries()")
        lazy = path == PACKAGE / "__init__.py" and name in own
        assert name == "__all__" or lazy, f"{path} defines {name}"


@pytest.mark.parametrize(
    "room",
    ["recover", "images", "report", "measure", "benchmarking", "coverage", "exporting", "paper", "demo"],
)
def test_faces_that_light_commands_meet_are_empty(room: str) -> None:
    assert len(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")).body) == 1


def test_commands_import_the_heavy_things_inside() -> None:
    heavy = {"torch", "timm", "transformers", "torchvision", "safetensors", "numpy", "sklearn", "matplotlib"}
    light = {PACKAGE / name for name in LIGHT}
    for path in FILES:
        if room_of(path) == "cli":
            assert not roots(path, lazy=False) & heavy, path
            assert {file_of(name) for room, name, lazy in inner(path) if not lazy and room != "cli"} <= light, path


def test_what_commands_import_at_once_is_light() -> None:
    heavy = {"torch", "timm", "transformers", "torchvision", "safetensors", "numpy", "sklearn", "matplotlib"}
    for name in LIGHT:
        assert not roots(PACKAGE / name) & heavy


def test_files_stay_readable() -> None:
    for path in (*FILES, *BESIDE):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 400, path


def test_folders_of_tests_are_rooms_of_the_package() -> None:
    """Besides what no room promises alone, and what is tested of benchmarks/."""
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("*.py") if path.parent != TESTS}
    assert folders - {"promises", "benchmarks"} <= {room for room in LEVELS if (PACKAGE / room).is_dir()}


def _public_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


def test_every_module_says_what_is_public() -> None:
    for path in FILES:
        tree = parsed(path)
        assert ast.get_docstring(tree), f"{path}: no docstring"
        if path.stem == "__main__":
            continue
        names = _public_names(tree)
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        if names is None:
            assert not {name for name in defined if not name.startswith("_")}, f"{path}: no __all__"
            continue
        assert names in (sorted(names, key=lambda name: (not name.isupper(), name)), sorted(names)), path
        assert len(names) == len(set(names)), path
        assert not [name for name in names if name.startswith("_")], path


def test_public_functions_are_in_all_and_used_or_documented() -> None:
    for path in FILES:
        tree = parsed(path)
        bound = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                bound |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
        assert set(_public_names(tree) or ()) <= bound, path


def test_only_those_who_draw_wait_for_matplotlib() -> None:
    figures = ("likeness/figure", "benchmarking/figure", "recover/curves")
    names = ("report/style", "report/figures", "report/page", *figures)
    drawing = tuple(PACKAGE / f"{name}.py" for name in names)
    for path in FILES:
        at_once = {name.partition(".")[0] for name, lazy in imports(path) if not lazy}
        assert path in drawing or "matplotlib" not in at_once, path
        eager = {file_of(name) for _, name, lazy in inner(path) if not lazy}
        assert path in drawing or not eager & set(drawing), path


def test_no_pickle_and_no_unsafe_load_in_the_package() -> None:
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads", "pickle.dump", "torch.save", "eval"), path
            if called == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", path
