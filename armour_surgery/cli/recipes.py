"""`armour-surgery recipes ls|show|cp`: the shipped recipes."""

from pathlib import Path
from typing import Annotated

import typer

from armour_surgery.cli.options import AsJson
from armour_surgery.cli.run import command, console_for, print_json

__all__ = ["recipes"]

recipes = typer.Typer(help="List, show or copy the shipped recipes for finetune.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe, or a YAML file.", show_default=False)]


@recipes.command("ls")
@command
def _list(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from armour_surgery.cli.tables import Shown
    from armour_surgery.recover.recipe_files import load_recipe, recipe_names
    from armour_surgery.tabular import Table

    descriptions = {name: load_recipe(name).description for name in recipe_names()}
    if as_json:
        print_json({"recipes": [{"name": name, "description": text} for name, text in descriptions.items()]})
        return
    # A name is copied, and so is not broken.
    table = Table("", ("recipe", "what it does"), list(descriptions.items()), whole=frozenset((0,)))
    console_for(False).print(Shown(table))


@recipes.command("show")
@command
def _show(name: Name) -> None:
    """Print a recipe as it is written, with its header: command, hardware, cost, expected result."""
    from armour_surgery.recover.recipe_files import load_recipe, recipe_path

    # Read first: a file that is no recipe is told, not printed.
    load_recipe(name)
    typer.echo(recipe_path(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("cp")
@command
def _copy(
    name: Name,
    target: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Where to. Default: NAME.yaml here.", show_default=False)
    ] = None,
) -> None:
    """Copy a recipe to a file of your own, to change it and name it with --recipe FILE."""
    from armour_surgery.errors import UsageError
    from armour_surgery.recover.recipe_files import recipe_path

    source = recipe_path(name)
    wanted = target if target is not None else Path(source.name)
    path = wanted / source.name if wanted.is_dir() else wanted
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{path} does not end in .yaml, and --recipe would take it for a name; name it {path}.yaml")
    if path.exists():
        raise UsageError(f"{path} exists, and nothing was overwritten; name another file")
    path.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    console_for(False).print(f"Copied to {path}; use it with --recipe {path}", markup=False, soft_wrap=True)
