"""What every command shares: where output goes, and how failures end."""

import functools
import json
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, ParamSpec, TextIO

import typer
from rich.console import Console

from armour_surgery.errors import ArmourError, ExampleInputError
from armour_surgery.notes import ArmourWarning
from armour_surgery.spelled import names_only

__all__ = ["command", "command_line", "console_for", "console_of_first_rank", "print_json"]

P = ParamSpec("P")
# As shells have it: 128 and the number of the signal.
_INTERRUPTED = 128 + signal.SIGINT
# Where the JSON document goes while everything else goes to stderr.
_json_stream: ContextVar[TextIO | None] = ContextVar("_json_stream", default=None)


def console_for(as_json: bool) -> Console:
    """The console for people: stderr while stdout belongs to JSON."""
    return Console(stderr=as_json, highlight=False)


def console_of_first_rank(as_json: bool) -> Console:
    """The console for people, quiet in every process of torchrun but the first: they all run the same command."""
    console = console_for(as_json)
    console.quiet = os.environ.get("RANK", "0") != "0"
    return console


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout, and nothing else."""
    typer.echo(json.dumps(document, indent=1, allow_nan=False), file=_json_stream.get())


@contextmanager
def _stdout_for_json(as_json: bool) -> Iterator[None]:
    """While open, whatever else prints to stdout (a user's own model does) prints to stderr."""
    if not as_json:
        yield
        return
    token = _json_stream.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _json_stream.reset(token)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn errors into one line on stderr and an exit code: 1 it failed, 2 wrong usage, 130 it was interrupted.

    `ARMOUR_DEBUG=1` adds the traceback.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        debug = os.environ.get("ARMOUR_DEBUG") == "1"
        try:
            with warnings.catch_warnings():
                if not debug:
                    # Libraries warn about their own affairs; what a user has to know, we say.
                    warnings.simplefilter("ignore")
                warnings.simplefilter("always", ArmourWarning)
                warnings.showwarning = _show
                with _stdout_for_json(bool(kwargs.get("as_json"))):
                    function(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except ArmourError as error:
            hint = ""
            if isinstance(error, ExampleInputError) and "example" in kwargs and "--example" not in str(error):
                hint = " (on the command line: --example 1,3,224,224)"
            raise _failed(f"{error}{hint}", error.exit_code, debug) from error
        except KeyboardInterrupt as error:
            raise _failed("interrupted; nothing was left half-written", _INTERRUPTED, debug) from error
        except MemoryError as error:
            raise _failed("out of memory; use a smaller model or a machine with more", 1, debug) from error
        except Exception as error:
            hint = "" if debug else " (this is a bug; ARMOUR_DEBUG=1 shows where)"
            raise _failed(f"{type(error).__name__}: {error}{hint}", 1, debug) from error

    return run


def command_line(context: typer.Context) -> str:
    """What was typed, with names in the place of paths, since it is written into what is handed on."""
    words = ["armour-surgery", context.info_name or ""]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        # By name: which package the class is of depends on the version of typer.
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
            continue
        for given in value if isinstance(value, list | tuple) else [value]:
            option = [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
            words += [*option, shlex.quote(names_only(str(given)))]
    return " ".join(words)


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of ours in one line. Of torchrun's processes, which run the same command, the first speaks."""
    if not issubclass(category, ArmourWarning):
        typer.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True)
    elif os.environ.get("RANK", "0") == "0":
        typer.echo(f"note: {' '.join(str(message).split())}", err=True)


def _failed(message: str, code: int, debug: bool) -> typer.Exit:
    if debug:
        traceback.print_exc()
    # One line, whatever line breaks the message of a library has.
    typer.secho(f"error: {' '.join(message.split())}", err=True, fg=typer.colors.RED)
    return typer.Exit(code)
