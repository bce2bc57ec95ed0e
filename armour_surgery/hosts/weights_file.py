"""Reading a file of weights, safely: nothing in it runs, and it takes no more memory than its size allows."""

import argparse
import hashlib
import json
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from armour_surgery.errors import CheckpointError
from armour_surgery.hosts.hub import quiet

__all__ = ["Kind", "Tables", "digest_of", "kind_of", "kind_of_type", "kinds_in_folder", "read_weights"]

# The tensors of each dictionary in a file that holds any, under its name: "" for the outermost, else "model", "a.b".
Tables = dict[str, dict[str, torch.Tensor]]
# Whether a tensor holds floats, integers or what else, and its type as messages show it.
Kind = tuple[str, str]

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# What the libraries look for in a folder, in this order; weights too large for one file are split.
LIBRARY_FILES = (
    "model.safetensors",
    "model-*.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
)
# How many times its size a file may hold. Weights hardly compress, and torch.save does not compress them.
MOST_UNPACKED = 8
# Small files may: a few zeros compress to nothing.
ALWAYS_ALLOWED = 64 << 20
# The largest models have a few thousand tensors; every one in a header costs kilobytes once it is read.
LONGEST_HEADER = 16 << 20
MOST_TENSORS = 50_000
# Weights lie a few dictionaries deep (those of a callback that averages them, three); optimizers' states are no place.
DEEPEST = 4


def read_weights(path: str | Path) -> Tables:
    """The tensors of a weights file on the CPU, by the dictionary that holds them.

    Raises:
        CheckpointError: the file is missing, truncated, of an unknown kind, would run code on loading, or claims more
            than its size can hold.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise CheckpointError(
            f"checkpoint {path} is a folder; name the weights file in it, "
            f"or pass the folder as local-dir:{path} or hf:{path}"
        )
    if not os.path.isfile(path):
        # A pipe or a device is there, but would have to be read to its end, if it has one.
        problem = "is no regular file; copy it to one" if os.path.exists(path) else "does not exist; check the path"
        raise CheckpointError(f"checkpoint {path} {problem}")
    if path.suffix not in (".safetensors", *PICKLED):
        raise CheckpointError(
            f"checkpoint {path} has the ending {path.suffix!r}; known are .safetensors, {', '.join(PICKLED)}"
        )
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    tables = _tables(content, path)
    _require_size(path, sum(_claimed_bytes(tensor) for table in tables.values() for tensor in table.values()))
    return tables


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def kind_of(tensor: torch.Tensor) -> Kind:
    """What a tensor holds: `float`, `integer`, `complex`, or what keeps it from being plain numbers."""
    shown = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return "meta", f"a meta tensor ({shown}) without values"
    if tensor.is_quantized:
        return "quantized", shown
    if tensor.layout is not torch.strided:
        return "sparse", f"a sparse tensor ({str(tensor.layout).removeprefix('torch.')})"
    return kind_of_type(tensor.dtype), shown


def kind_of_type(dtype: torch.dtype) -> str:
    """`float`, `integer`, `complex`, or `quantized` for floats of 8 bits, which need scales."""
    if dtype.is_floating_point:
        return "float" if dtype.itemsize > 1 else "quantized"
    return "complex" if dtype.is_complex else "integer"


def kinds_in_folder(folder: Path) -> dict[str, Kind]:
    """The kinds of the tensors in the weights files of a folder that timm or transformers wrote.

    Raises:
        CheckpointError: as `read_weights` does.
    """
    kinds: dict[str, Kind] = {}
    for pattern in LIBRARY_FILES:
        for path in sorted(folder.glob(pattern)):
            if path.suffix == ".safetensors":
                kinds |= {key: _kind_of_entry(entry["dtype"]) for key, entry in _header(path).items()}
                continue
            for table in read_weights(path).values():
                kinds |= {key: kind_of(tensor) for key, tensor in table.items()}
        if kinds:
            break
    return kinds


def _kind_of_entry(dtype: str) -> Kind:
    if dtype in ("F64", "F32", "F16", "BF16"):
        return "float", dtype
    if dtype.startswith("F"):
        return "quantized", dtype
    return "complex" if dtype.startswith("C") else "integer", dtype


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of its tensors, read without them."""
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > min(LONGEST_HEADER, os.path.getsize(path)):
            _damaged_safetensors(path, f"its header would be {length} bytes long")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            _damaged_safetensors(path, f"its header is no JSON: {error}", error)
    if not isinstance(header, dict):
        _damaged_safetensors(path, "its header is no JSON object")
    entries: dict[str, dict[str, Any]] = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            _damaged_safetensors(path, f"its header has no type for {key!r}")
        entries[key] = entry
    if len(entries) > MOST_TENSORS:
        raise CheckpointError(
            f"checkpoint {path} claims {len(entries)} tensors, and no model has more than {MOST_TENSORS}; "
            "save the weights alone"
        )
    return entries


def _damaged_safetensors(path: Path, reason: object, cause: Exception | None = None) -> NoReturn:
    raise CheckpointError(
        f"checkpoint {path} is truncated or damaged, and not a whole safetensors file ({reason}); "
        "copy or download it again"
    ) from cause


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for key, entry in _header(path).items():
        # Types below 8 bits a number, for which neither torch nor safetensors has a tensor.
        if entry["dtype"].startswith(("F4_", "F6_")):
            raise CheckpointError(
                f"checkpoint {path} holds {entry['dtype']} in {key}: quantized weights, which are not numbers without "
                "their scales; save it with float weights"
            )
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        _damaged_safetensors(path, error, error)


def _read_pickled(path: Path) -> Any:
    _require_harmless(path)
    try:
        # Training checkpoints (DeiT's, timm's) keep their options in a Namespace, which is data and nothing else.
        with torch.serialization.safe_globals([argparse.Namespace]), quiet():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is not plain weights: loading it could run code, or it is damaged, so it was not "
            "loaded. Convert it to .safetensors where you trust it, with safetensors.torch.save_file(state_dict, FILE)"
        ) from error
    except Exception as error:
        # Damage shows itself in many ways; a LookupError's text is a stray byte.
        said = str(error).split(". ")[0].splitlines()
        # torch's first sentence says what is wrong; the rest guesses why.
        _damaged(path, said[0] if said and not isinstance(error, LookupError) else "not a torch file", error)


def _damaged(path: Path, reason: object, cause: Exception) -> NoReturn:
    raise CheckpointError(f"checkpoint {path} is truncated or damaged ({reason}); copy or download it again") from cause


def _require_harmless(path: Path) -> None:
    """Refuse, before anything is unpacked, a file that would fill the memory, and one that is a program."""
    with path.open("rb") as stream:
        # torch.load tells its formats apart like this.
        zipped = stream.read(4) == b"PK\x03\x04"
    if not zipped:
        if os.path.getsize(path):
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as pickled:
                _require_no_bytearray(path, pickled)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _require_size(path, sum(entry.file_size for entry in entries))
            # All of them lie in one folder, which is called as the file was.
            names = {entry.filename.partition("/")[2] for entry in entries}
            _require_weights(path, names)
        # Not read by zipfile, which insists on checksums; torch can be told to save none.
        _require_no_bytearray(path, torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
    except CheckpointError:
        raise
    except Exception as error:
        # zipfile, and what it unpacks with, fail in their own ways.
        _damaged(path, error, error)


def _require_weights(path: Path, names: Collection[str]) -> None:
    if "constants.pkl" in names:
        raise CheckpointError(
            f"checkpoint {path} is a TorchScript program (torch.jit.save) and not a file of weights; where you trust "
            f"it, save its weights: torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth')"
        )
    if "data.pkl" not in names:
        raise CheckpointError(
            f"checkpoint {path} is a zip file that torch.save did not write (it has no data.pkl); save the weights "
            "with torch.save(model.state_dict(), FILE)"
        )


def _require_no_bytearray(path: Path, pickled: "bytes | mmap.mmap") -> None:
    # The only builtin which torch's reader of plain weights calls with a size of the file's choice, and which is then
    # filled. No weights hold one. (Tensors of a size of the file's choice cost nothing until they are read.)
    if pickled.find(b"\nbytearray\n") >= 0:
        raise CheckpointError(
            f"checkpoint {path} holds a bytearray, which may be of any size, so it was not loaded; "
            "save model.state_dict() alone"
        )


def _require_size(path: Path, claimed: int) -> None:
    size = os.path.getsize(path)
    if claimed > MOST_UNPACKED * size + ALWAYS_ALLOWED:
        raise CheckpointError(
            f"checkpoint {path} has {size:,} bytes and claims to hold {claimed:,}, so it was not unpacked; "
            "save model.state_dict() with torch.save or safetensors, uncompressed"
        )


def _claimed_bytes(tensor: torch.Tensor) -> int:
    # An expanded tensor repeats a few numbers, and any copy of it is as large as it claims to be.
    plain = tensor.layout is torch.strided and not tensor.is_meta
    return tensor.numel() * tensor.element_size() if plain else 0


def _tables(content: Any, path: Path) -> Tables:
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"checkpoint {path} holds {type(content).__name__} and not a dictionary of tensors; save model.state_dict()"
        )
    tables: Tables = {}
    for name, table in _dictionaries(content, "", set()):
        tensors = {key: value for key, value in table.items() if _is_named_tensor(key, value)}
        if tensors:
            tables[name] = tensors
    if tables:
        return tables
    inner = next((value for value in content.values() if isinstance(value, dict) and value), content)
    key, value = next(iter(inner.items()))
    raise CheckpointError(
        f"checkpoint {path} holds {type(value).__name__} under {key!r}, where a tensor with a name is expected; "
        "save model.state_dict() alone, or under 'model' or 'state_dict'"
    )


def _is_named_tensor(key: object, value: object) -> bool:
    # Subclasses (a quantizer's, a parallelizer's) keep their numbers elsewhere.
    return isinstance(key, str) and type(value) in (torch.Tensor, torch.nn.Parameter)


def _dictionaries(
    table: Mapping[Any, Any], name: str, seen: set[int], depth: int = 0
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """A dictionary and those in it, each once: a file may hold one in many places, or in itself."""
    if id(table) in seen or depth > DEEPEST:
        return
    seen.add(id(table))
    yield name, table
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(key, str):
            yield from _dictionaries(value, f"{name}.{key}" if name else key, seen, depth + 1)
