"""The command line: one file per command. Only this folder imports typer and rich.

The commands import torch, timm and transformers inside, so that `--help` answers at once.
"""

import typer

from armour_surgery.cli.bench import bench
from armour_surgery.cli.convert import convert
from armour_surgery.cli.coverage import coverage
from armour_surgery.cli.demo import demo
from armour_surgery.cli.eval import evaluate
from armour_surgery.cli.export import export
from armour_surgery.cli.finetune import finetune
from armour_surgery.cli.inspect import inspect
from armour_surgery.cli.paper import paper
from armour_surgery.cli.push import push
from armour_surgery.cli.recipes import recipes
from armour_surgery.cli.redundancy import redundancy
from armour_surgery.cli.script import as_it_is, run

__all__ = ["app", "main"]

app = typer.Typer(
    name="armour-surgery",
    help="Rewrite a Vision Transformer's attention so that fewer projections do the work.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and stop.", is_eager=True),
) -> None:
    """Rewrite a Vision Transformer's attention so that fewer projections do the work."""
    if version:
        from armour_surgery import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


app.command()(inspect)
app.command()(convert)
app.command()(finetune)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(export)
app.command()(push)
app.add_typer(recipes, name="recipes")
app.command()(redundancy)
app.command()(paper)
app.command(context_settings=as_it_is)(run)
app.command()(coverage)
app.command()(demo)


def main() -> None:
    """Entry point of the console script."""
    app()
