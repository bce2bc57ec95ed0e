"""A user's own model, `FILE.py:CALLABLE`: the file is imported, and what it names is called with no arguments."""

import ast
import difflib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from armour_surgery.errors import ModelError, UsageError
from armour_surgery.hosts.libraries import OWN
from armour_surgery.records import Source

__all__ = ["is_own", "load_own", "source_of_own"]

# Folders that were imported from, whose modules give way to others of the same name.
_FOLDERS: set[Path] = set()


def is_own(name: str) -> bool:
    """Whether MODEL names a file of Python, with or without what to call in it."""
    return name.endswith(".py") or ".py:" in name


def load_own(name: str) -> tuple[nn.Module, Source]:
    """The model that FILE.py:CALLABLE makes, in eval mode, and what a folder says about where it came from.

    What the file prints goes to stderr.

    Raises:
        UsageError: there is no such file or callable, it needs arguments, or it gives no module.
        ModelError: the file, or what is called in it, raises an error; the message says in which line.
    """
    file, _, callable_name = name.rpartition(".py:") if ".py:" in name else (name[:-3], "", "")
    path = Path(f"{file}.py").expanduser()
    if not path.is_file():
        raise UsageError(f"MODEL {name!r}: there is no file {path}; check the path")
    path = path.resolve()
    if not callable_name:
        raise UsageError(f"MODEL {name!r} does not say what to call in the file; write {_written(name, path)}")
    with _importing(path), redirect_stdout(sys.stderr):
        module = _guarded(path, f"{path.name} could not be imported", lambda: _module_of(path))
        make = _find(module, name, callable_name, path)
        model = _guarded(path, f"{callable_name}() of {path.name} failed", make)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"MODEL {name!r}: {callable_name}() returned {_kind(model)}, which is no torch.nn.Module; name a class of "
            "modules, or a function that returns one"
        )
    return model.eval(), source_of_own(model, f"{path.name}:{callable_name}")


def source_of_own(model: nn.Module, name: str = "") -> Source:
    """What a folder says about a model that no library makes: the name of its class, and where it is called so."""
    kind = type(model).__name__
    return Source(OWN, kind, name=name or kind)


def _find(module: ModuleType, name: str, callable_name: str, path: Path) -> Callable[[], Any]:
    """What is to be called.

    Raises:
        UsageError: there is none of that name, or it cannot be called without arguments.
    """
    found: Any = module
    for part in callable_name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"MODEL {name!r}: {path.name} has no {callable_name!r}; write {_written(name, path)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        raise UsageError(
            f"MODEL {name!r}: {callable_name} is a model and not what makes one; name its class, or a function that "
            "returns a new one"
        )
    if not callable(found):
        raise UsageError(f"MODEL {name!r}: {callable_name} is {_kind(found)}; write {_written(name, path)}")
    needed = _needed(found)
    if needed:
        raise UsageError(
            f"MODEL {name!r}: {callable_name} needs {', '.join(needed)}, and is called with no arguments; write a "
            f"function in {path.name} that takes none and returns the model"
        )
    make: Callable[[], Any] = found
    return make


def _needed(function: Callable[..., Any]) -> list[str]:
    """The arguments without which it cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []  # some that are written in C do not tell; calling them will
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one.name for one in parameters if one.default is one.empty and one.kind not in optional]


def _written(name: str, path: Path) -> str:
    """How to name what the file has to call, or that it has nothing."""
    file, wanted = (name, "") if name.endswith(".py") else name.rsplit(":", 1)
    try:
        tree = ast.parse(path.read_bytes(), path.name)
    except (SyntaxError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as Python: {error}") from error
    defined = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"]
    if not defined:
        return f"a class of modules, or a function that returns one, in {path.name}, which has none"
    fitting = [node.name for node in defined if _may_be_a_model(node)]
    close = difflib.get_close_matches(wanted, fitting, n=3) or fitting[:8] or [node.name for node in defined[:8]]
    return " or ".join(f"{file}:{known}" for known in close)


def _may_be_a_model(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """Whether a function needs no arguments, or a class that derives from another does not."""
    if isinstance(node, ast.FunctionDef):
        return not _arguments_needed(node)
    makers = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    return bool(node.bases) and all(_arguments_needed(maker) <= 1 for maker in makers)  # self is one


def _arguments_needed(function: ast.FunctionDef) -> int:
    given = function.args
    by_order = len(given.posonlyargs) + len(given.args) - len(given.defaults)
    return by_order + sum(default is None for default in given.kw_defaults)


def _guarded(path: Path, what: str, act: Callable[[], Any]) -> Any:
    """What the user's own code gives.

    Raises:
        ModelError: it raised an error, or ended the program.
    """
    try:
        return act()
    except (Exception, SystemExit) as error:
        where = f"line {error.lineno}" if isinstance(error, SyntaxError) else _line_in(path.parent, error)
        hint = ""
        if isinstance(error, ImportError) and "no known parent package" in str(error):
            hint = f"; write it without the dot, or put an empty __init__.py into {path.parent}"
        raise ModelError(f"{what} ({where}): {type(error).__name__}: {error}{hint}") from error


def _line_in(folder: Path, error: BaseException) -> str:
    """The last line of the user's own that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if Path(frame.filename).is_relative_to(folder)]
    if not theirs:
        return "nowhere in its folder"
    return f"{Path(theirs[-1].filename).relative_to(folder)}, line {theirs[-1].lineno}"


@contextmanager
def _importing(path: Path) -> Iterator[None]:
    """While open, the file finds its neighbors first, as one does that Python is started with."""
    folder = path.parent
    # As text: a Path for each of thousands of modules takes a second.
    known = tuple(os.path.join(other, "") for other in _FOLDERS)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.startswith(known) and _is_brought_by(folder, name, Path(file)):
            del sys.modules[name]
    _FOLDERS.add(folder)
    before = list(sys.path)
    sys.path[:0] = [str(folder), str(_root_of(folder))]
    try:
        yield
    finally:
        sys.path[:] = before


def _is_brought_by(folder: Path, name: str, file: Path) -> bool:
    """Whether this folder has a module of the name that one from another place, `file`, has now."""
    for home in (folder, _root_of(folder)):
        top = home / name.partition(".")[0]
        brought = top.with_suffix(".py").is_file() or top.is_dir()
        if brought and file != top.with_suffix(".py") and not file.is_relative_to(top):
            return True
    return False


def _root_of(folder: Path) -> Path:
    """The folder in which the package lies that a folder is of; itself where it is of none."""
    while (folder / "__init__.py").is_file() and folder.parent != folder:
        folder = folder.parent
    return folder


def _module_of(path: Path) -> ModuleType:
    """The file as a module; of a package, where it lies in one, so that it may import relatively."""
    packages = path.parent.relative_to(_root_of(path.parent)).parts
    name = ".".join([*packages, path.stem])
    known = sys.modules.get(name)
    if getattr(known, "__file__", None) == str(path):
        return known  # type: ignore[return-value]
    if packages:
        importlib.import_module(".".join(packages))
    elif known is not None or _is_of_a_library(name, path):
        name = f"own_{path.stem}"  # the name stays the library's, for all who import it later on
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"Python cannot import {path}; check that it is a file of Python")
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses, and what is pickled, look their module up there.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_of_a_library(name: str, path: Path) -> bool:
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != path.parent]
    return name in sys.stdlib_module_names or importlib.machinery.PathFinder.find_spec(name, others) is not None


def _kind(value: object) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
