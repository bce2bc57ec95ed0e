"""Arguments of a library's builders, as users write them, and what of them may be asked for."""

import ast
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from armour_surgery.errors import SchemaError, UsageError
from armour_surgery.hosts.untrusted import refuse_reaching

__all__ = ["OPTIONS", "check_arguments", "read_arguments", "refuse_forbidden", "spelled"]

# Arguments that have an option of their own.
OPTIONS = ("img_size", "num_classes", "in_chans")


def read_arguments(written: Iterable[str]) -> dict[str, Any]:
    """What `--model-kwargs KEY=VALUE` say: a value is a literal of Python, or else the text that it is.

    Values are as JSON has them, so that what a folder says later on builds the same model: tuples are lists.

    Raises:
        UsageError: there is no `=` or no name before it, a key is there twice, or JSON cannot hold its value.
    """
    arguments: dict[str, Any] = {}
    for text in written:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--model-kwargs {text!r} is not KEY=VALUE; write for example embed_dim=192")
        if key in arguments:
            raise UsageError(f"--model-kwargs names {key!r} twice; leave one out")
        try:
            parsed = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            parsed = value
        try:
            arguments[key] = json.loads(json.dumps(parsed, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"--model-kwargs {text!r}: a saved folder holds numbers, text and lists of these, and not this value "
                f"({error})"
            ) from error
    return arguments


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that a model could not be built with again, without its files and without the network.

    Raises:
        UsageError: see above.
    """
    try:
        refuse_reaching(name, arguments)
    except SchemaError as error:
        raise UsageError(
            f"--model-kwargs: {error}: {name} could not be built again without files or the network; weights come with "
            "--checkpoint FILE"
        ) from error


def refuse_forbidden(name: str, arguments: Mapping[str, Any], forbidden: Collection[str]) -> None:
    """Refuse those arguments of a builder that this tool has other ways for.

    Raises:
        UsageError: see above.
    """
    for key in arguments:
        if key in forbidden:
            raise UsageError(
                f"--model-kwargs {key} of {name} is about weights or where they lie, and not about how the model is "
                "built; use --pretrained, --no-pretrained or --checkpoint FILE"
            )


def spelled(argument: str) -> str:
    """How a builder's argument was asked for on the command line."""
    return f"--{argument.replace('_', '-')}" if argument in OPTIONS else f"--model-kwargs {argument}=..."
