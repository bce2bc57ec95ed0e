"""Reading recipes: shipped ones by name, files, and `--set a.b=c`; each mistake becomes one line with a suggestion."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from armour_surgery.errors import UsageError
from armour_surgery.recover.recipe import Recipe, known_keys

__all__ = ["load_recipe", "recipe_names", "recipe_path", "to_yaml"]


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a shipped name or a YAML file, with `a.b=c` overrides.

    Raises:
        UsageError: there is no such recipe, it is not YAML, or a key, type or combination is wrong.
    """
    path = recipe_path(name)
    where = f"recipe {path.name}"
    values = _parse(path.read_text(encoding="utf-8"), where)
    for override in overrides:
        _set(values, override)
    return _validated(values, where)


def recipe_names() -> list[str]:
    """The names of the shipped recipes, sorted."""
    return sorted(path.stem for path in _shipped().glob("*.yaml"))


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe.

    Raises:
        UsageError: it is neither a shipped name nor a file; the message suggests names.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UsageError(f"recipe {name} does not exist; check the path, or see `armour-surgery recipes ls`")
        return path
    shipped = _shipped() / f"{name}.yaml"
    if str(name) not in recipe_names():
        raise UsageError(f"no recipe is called {str(name)!r}{_meant(str(name), recipe_names())}; see `recipes ls`")
    return shipped


def to_yaml(recipe: Recipe, header: Iterable[str] = ()) -> str:
    """The resolved recipe, every default spelled out; `load_recipe` reads it again."""
    text = "".join(f"# {line}\n" for line in header)
    dumped: str = yaml.safe_dump(recipe.model_dump(), sort_keys=False, width=120)
    return text + dumped


def _shipped() -> Path:
    """In a wheel the recipes lie inside the package, in a checkout beside it."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 takes `1e-3` for a word, and the last of two equal keys for both; here it is a number, and an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} is given twice")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


# Copies, since the table is the class's, and every reader of YAML in this process shares it.
_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{where} holds {type(values).__name__} and not sections like `optimizer:`; see `recipes ls`")
    return values


def _set(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {override!r} is not KEY=VALUE; write for example --set optimizer.lr=1e-4")
    # As in a file, so that 1e-4, null and [0.9, 0.95] mean the same here.
    value = _parse(f"value: {text.strip() or 'null'}", f"--set {override!r}").get("value")
    place = values
    for key in keys[:-1]:
        inner = place.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {override!r}: {key} is a value and no section; see `recipes show`")
        place = inner
    place[keys[-1]] = value


def _validated(values: Mapping[str, Any], where: str) -> Recipe:
    try:
        # As JSON, in which strictness still takes an integer where a number is asked for.
        return Recipe.model_validate_json(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise UsageError(f"{where} holds what a recipe cannot: {error}") from error
        raise UsageError(f"{where}: {_explained(error)}") from error


def _explained(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(map(str, first["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {path}{_meant(path, known_keys())}{more}; see `recipes show recover`"
    if first["type"] == "value_error":
        return f"{first['msg'].removeprefix('Value error, ')}{more}"
    return f"{path} is {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}{more}"


def _meant(name: str, known: list[str]) -> str:
    """A suggestion of up to two known names, as the end of a sentence; empty without one that is close."""
    last = name.rpartition(".")[2]
    # The right key in another section first, then what is written alike, then a key alike in another section.
    close = [key for key in known if key.rpartition(".")[2] == last]
    close += difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    close += [key for key in known if difflib.SequenceMatcher(None, key.rpartition(".")[2], last).ratio() > 0.75]
    chosen = list(dict.fromkeys(close))[:2]
    return f"; did you mean {' or '.join(chosen)}?" if chosen else ""
