"""Reading the files of a saved folder, which may come from anywhere: all of one version, and as they were written."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from armour_surgery.errors import CorruptFileError, FolderError, SchemaError
from armour_surgery.hosts.weights_file import digest_of
from armour_surgery.saving.document import Document, read_document
from armour_surgery.saving.staging import (
    PATIENCE,
    PLAN,
    STAGE,
    WEIGHTS,
    check_stage,
    state_of,
    stays_inside,
)

__all__ = ["MOST_TENSORS", "check_whole", "read_whole"]

Read = TypeVar("Read")
# Each takes a moment to read, however small it is.
MOST_TENSORS = 50_000


def read_whole(folder: Path) -> tuple[Document, dict[str, torch.Tensor]]:
    """A plan and its weights; all of one version, also while somebody writes a new one.

    Raises:
        SchemaError, CorruptFileError, FolderError: see `load`.
    """
    return _of_one_version(folder, lambda path, document: _read_weights(path, document.sha256))


def check_whole(folder: Path) -> tuple[Document, Path]:
    """The plan of a folder, and where its weights are, which are whole and those that were saved; no model is built.

    Raises:
        SchemaError, CorruptFileError, FolderError: see `load`.
    """
    return _of_one_version(folder, _checked)


def _of_one_version(folder: Path, read: Callable[[Path, Document], Read]) -> tuple[Document, Read]:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        before = state_of(folder)
        try:
            document = read_document(folder)
            found = read(_weights_path(folder, document), document)
        except CorruptFileError:
            if state_of(folder) == before:
                raise
        else:
            if state_of(folder) == before:
                return document, found
        time.sleep(0.01)
    raise FolderError(f"{folder} was written again and again for {PATIENCE:.0f} s; load it when nobody writes to it")


def _weights_path(folder: Path, document: Document) -> Path:
    path = folder / WEIGHTS
    if document.weights != WEIGHTS or not stays_inside(folder, path):
        raise SchemaError(
            f"{folder / PLAN} takes its weights from {document.weights!r}, and only {WEIGHTS} in its own folder is "
            "read, nothing outside"
        )
    check_stage(folder)
    staged = folder / STAGE / WEIGHTS
    with suppress(OSError):  # a writer moves it away, or takes it back
        if staged.is_file() and digest_of(staged) == document.sha256:
            return staged  # saving was cut short after the new surgery.json had been put in place
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing; copy the whole folder again")
    return path


def _read_weights(path: Path, digest: str) -> dict[str, torch.Tensor]:
    tensors = {}
    with _opened(path, digest) as (stream, names):
        for name in names:
            # Cloned: in the file, which is mapped, tensors begin where their neighbors end, and for memory that is
            # not aligned torch takes other kernels, whose sums round differently.
            tensors[name] = stream.get_tensor(name).clone()
    return tensors


def _checked(path: Path, document: Document) -> Path:
    with _opened(path, document.sha256) as (_, names):
        absent = [name for name in document.tied.values() if name not in names]
    if absent:
        raise CorruptFileError(f"{path} lacks {absent[0]}, to which {PLAN} ties another; save the model again")
    return path


@contextmanager
def _opened(path: Path, digest: str) -> Iterator[tuple[Any, list[str]]]:
    """A weights file whose header is whole, and the names in it; afterwards its sha256 is checked."""
    try:
        with safe_open(path, framework="pt") as stream:
            names = list(stream.keys())
            if len(names) > MOST_TENSORS:
                raise CorruptFileError(f"{path} holds {len(names)} tensors, and no model has more than {MOST_TENSORS}")
            yield stream, names
        found = digest_of(path)
    except (SafetensorError, OSError, RuntimeError) as error:  # torch opens the file too, with errors of its own
        raise CorruptFileError(f"{path} is truncated or damaged ({error}); copy it again") from error
    if found != digest:
        raise CorruptFileError(f"{path} is not the file that was saved (its sha256 differs); copy it again")
