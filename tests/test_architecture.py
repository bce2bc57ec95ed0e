"""Imports point one way, files stay short, and every module says what is public. Read with ast, nothing is run."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import armour_surgery

PACKAGE = Path(armour_surgery.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]
STAGES = ("discover", "rewrite", "hosts", "measure", "initialize", "recover")
DATA_OF_OTHERS = ("armour_surgery.initialize.synthetic.synthetic_images", "armour_surgery.demo.digits_split")
FOUNDATION = ("sites", "modes", "errors", "meta", "traced", "hosts")


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
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return tuple(_imports(ast.parse(path.read_text(encoding="utf-8")), package))


def roots(path: Path, lazy: bool | None = None) -> set[str]:
    """Top packages that a file imports; with `lazy`, only inside functions, or only outside."""
    return {name.partition(".")[0] for name, later in imports(path) if lazy is None or later is lazy}


def inner(path: Path) -> Iterator[tuple[str, str, bool]]:
    """What a file imports of this package: the part (`discover`, `errors`), the full name, and whether lazily."""
    for name, later in imports(path):
        parts = name.split(".")
        if parts[0] == "armour_surgery":
            # `from armour_surgery import hosts` and `from armour_surgery import convert` look alike.
            known = len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists())
            yield parts[1] if known else "", name, later


def part_of(path: Path) -> str:
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


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_only_the_command_line_imports_typer_and_rich(path: Path) -> None:
    if part_of(path) != "cli":
        assert not roots(path) & {"typer", "rich", "click"}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_only_hosts_imports_the_model_libraries(path: Path) -> None:
    if path == PACKAGE / "recover" / "timm_parts.py":
        assert not roots(path) & {"transformers", "huggingface_hub"}
    elif part_of(path) != "hosts":
        assert not roots(path) & {"timm", "transformers", "torchvision", "huggingface_hub"}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nobody_imports_the_command_line(path: Path) -> None:
    if part_of(path) not in ("cli", "__main__"):
        assert "cli" not in {part for part, _, _ in inner(path)}


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) in STAGES], ids=str)
def test_stages_do_not_import_each_other(path: Path) -> None:
    own = part_of(path)
    for part, name, lazy in inner(path):
        if part in (own, "sites", "modes", "errors", "meta", "traced"):
            continue
        if own in ("discover", "rewrite") and name.startswith("armour_surgery.hosts.attention_interface."):
            continue
        # The model's own preprocessing, and the datasets that a library opens.
        if own == "initialize" and name.startswith("armour_surgery.hosts.preprocessing."):
            continue
        # The trainer asks hosts how a model is fed; drawn images and the demo's digits are data like any other.
        if own == "recover" and (part == "hosts" or (lazy and name in DATA_OF_OTHERS)):
            continue
        if path == PACKAGE / "measure" / "paper.py" and lazy and part in ("conversion", "hosts"):
            continue
        pytest.fail(f"{path.relative_to(PACKAGE)} imports {name}")


@pytest.mark.parametrize("name", ["sites", "modes", "errors", "meta", "traced"])
def test_the_foundation_imports_nothing_above_it(name: str) -> None:
    allowed = {"sites", "modes", "errors", "meta", "traced"}
    assert {part for part, _, _ in inner(PACKAGE / f"{name}.py")} <= allowed


def test_the_spine_does_not_know_the_folder_and_nobody_lower_knows_the_spine() -> None:
    assert "folder" not in {part for part, _, _ in inner(PACKAGE / "conversion.py")}
    for path in FILES:
        if part_of(path) in ("cli", "__init__", "folder", "demo", "conversion", "finetuning", "training_folder"):
            continue
        eager = {part for part, _, lazy in inner(path) if not lazy}
        assert not eager & {"conversion", "folder"}, path


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) == "cli"], ids=lambda path: path.name)
def test_commands_import_the_heavy_things_inside(path: Path) -> None:
    heavy = {"torch", "timm", "transformers", "torchvision", "safetensors", "numpy", "sklearn", "matplotlib"}
    assert not roots(path, lazy=False) & heavy
    light = {"cli", "errors", "sites", ""}
    assert {part for part, _, lazy in inner(path) if not lazy} <= light


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


def _public_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_module_says_what_is_public(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no docstring"
    if path.stem == "__main__":
        return
    names = _public_names(tree)
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if names is None:
        assert not {name for name in defined if not name.startswith("_")}, "no __all__"
        return
    assert names == sorted(names, key=lambda name: (not name.isupper(), name)) or names == sorted(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("_")]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_public_functions_are_in_all_and_used_or_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = _public_names(tree)
    if names is None:
        return
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    assert set(names) <= bound


def test_only_those_who_draw_wait_for_matplotlib() -> None:
    names = ("figures", "report", "redundancy_figure", "speed_figure")
    drawing = tuple(PACKAGE / "measure" / f"{name}.py" for name in names)
    for path in FILES:
        at_once = {name.partition(".")[0] for name, lazy in imports(path) if not lazy}
        assert path in drawing or "matplotlib" not in at_once, path
        eager = {name for _, name, lazy in inner(path) if not lazy}
        wanted = [
            name for name in eager if name.startswith(tuple(f"armour_surgery.measure.{path.stem}." for path in drawing))
        ]
        assert path in drawing or not wanted, path


def test_no_pickle_and_no_unsafe_load_in_the_package() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads", "pickle.dump", "torch.save", "eval"), path
            if called == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", path
