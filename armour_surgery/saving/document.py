"""`surgery.json`: what is in it, and reading it without believing it."""

import importlib.metadata
import json
import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from armour_surgery.errors import SchemaError
from armour_surgery.examples import rebuilt
from armour_surgery.hosts.untrusted import entries
from armour_surgery.records import SurgeryPlan
from armour_surgery.saving.staging import PLAN, stays_inside

__all__ = [
    "LARGEST",
    "SCHEMA_VERSION",
    "TOOL",
    "Document",
    "check_plan",
    "installed_versions",
    "read_document",
]

SCHEMA_VERSION = 1
TOOL = "armour-surgery"
# Bytes, and values at all depths. The frontier of a budget over a hundred attentions takes half of this.
LARGEST = 64 * 2**20
MOST_VALUES = 4_000_000
# Listing every mistake takes ten times as long as finding them.
MOST_TOLD = 1_000
# An example is images, videos or words.
MOST_DIMENSIONS = 16


@dataclass(frozen=True)
class Document:
    """`surgery.json`: every key is there, and of its type, or the file is refused."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    schema_version: int
    tool: str
    versions: dict[str, str]
    weights: str
    sha256: str
    tied: dict[str, str]
    buffer_dtypes: dict[str, str]
    plan: SurgeryPlan


def installed_versions() -> dict[str, str]:
    """What something is made with here, for whoever has to load it, or believe it, in some years."""
    versions = {}
    for package in ("armour-surgery", "torch", "timm", "transformers", "torchvision", "safetensors"):
        # A library whose models nobody here uses need not be installed.
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def read_document(folder: Path) -> Document:
    """The `surgery.json` of a folder, every key and type checked; its sizes are bounded, and not yet believed.

    Raises:
        SchemaError: there is none, or it is unreadable, too large, of another schema, or wrong in itself.
    """
    path = folder / PLAN
    if not path.is_file():
        raise SchemaError(f"{folder} is not a folder saved by armour-surgery: there is no {PLAN} in it")
    if not stays_inside(folder, path):
        raise SchemaError(f"{path} is a link out of its folder, which is not followed; copy the file itself")
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise SchemaError(
                f"{path} has more than {LARGEST // 2**20} MiB, and no plan is as long; save the model again"
            )
        # Whose file it is and of which schema comes first: only then do its other keys mean anything.
        text = content.decode("utf-8")
        head = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise SchemaError(f"{path} is not readable JSON ({error}); save the model again") from error
    if not isinstance(head, dict) or head.get("tool") != TOOL:
        raise SchemaError(f"{path} was not written by armour-surgery")
    version = head.get("schema_version")
    if version != SCHEMA_VERSION:
        raise SchemaError(
            f"{path} has schema version {version!r}, and this armour-surgery reads {SCHEMA_VERSION}; "
            "use the version that wrote it"
        )
    if sum(1 for _ in islice(entries(head), MOST_VALUES + 1)) > MOST_VALUES:
        raise SchemaError(f"{path} holds more than {MOST_VALUES} values, and no plan is as long; save the model again")
    try:
        document = TypeAdapter(Document).validate_json(text)
        check_plan(document.plan)
    except ValidationError as error:
        if error.error_count() > MOST_TOLD:
            raise SchemaError(f"{path} holds {error.error_count()} wrong values; save the model again") from error
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise SchemaError(
            f"{path}: {where} is {first['input']!r}: {first['msg']}{more}; save the model again"
        ) from error
    except ValueError as error:
        raise SchemaError(f"the plan in {path} is not one: {error}") from error
    return document


def check_plan(surgery: SurgeryPlan) -> None:
    """What types cannot say about the parts that are used before the surgery is done again.

    Raises:
        ValueError: an example that cannot be, or a site that is named twice.
    """
    examples = [*surgery.example]
    for part in surgery.parts:
        examples += part.example
    for name, shape, dtype in examples:
        # The example is run, on the meta device, and torch itself stops at sizes beyond what fits an integer.
        if len(shape) > MOST_DIMENSIONS or min(shape, default=1) <= 0 or math.prod(shape) > 2**31:
            raise ValueError(f"an example {name!r} of shape {shape} is not possible")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"example type {dtype!r} is unknown")
    try:
        rebuilt(surgery.example, surgery.example_values, torch.float32)
        for part in surgery.parts:
            rebuilt(part.example, part.example_values, torch.float32)
    except (AttributeError, RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"the numbers of its example do not fit their shapes ({error})") from error
    for name, times in Counter([*(site.fqn for site in surgery.sites), *(mlp.fqn for mlp in surgery.mlps)]).items():
        if times > 1:
            raise ValueError(f"site {name!r} is named twice")
