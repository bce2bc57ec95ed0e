"""A folder that is too large in some way is refused in a moment, by name."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import PLAN, WEIGHTS, edit, put
from small_models import refused
from torch import nn

from armour_surgery import load, save
from armour_surgery.errors import CorruptFileError, FolderError, KeyMismatchError, SchemaError
from armour_surgery.hosts.weights_file import digest_of
from armour_surgery.saving import document as plans
from armour_surgery.saving import folder
from armour_surgery.saving.document import LARGEST
from armour_surgery.saving.reading import MOST_TENSORS


def renewed(path: Path) -> None:
    """A checksum that says that the weights are right."""
    edit(path, lambda document: document.update(sha256=digest_of(path / WEIGHTS)))


def test_a_plan_of_many_megabytes_is_not_read(broken: Path) -> None:
    with (broken / PLAN).open("ab") as stream:
        stream.truncate(300 * 2**20)  # a hole, which takes no room on the disk
    message = refused(SchemaError, lambda: load(broken))
    assert str(broken / PLAN) in message
    assert f"{LARGEST // 2**20} MiB" in message


def _many_wrong_sites(document: Any) -> None:
    document["plan"]["sites"] = [0] * 20_000


def _many_values(document: Any) -> None:
    document["plan"]["source"]["arguments"]["more"] = [0] * 50_000


def _many_dimensions(document: Any) -> None:
    document["plan"]["example"][0][1] = [10**15] * 200_000


def _many_sites(document: Any) -> None:
    one = document["plan"]["sites"][0]
    document["plan"]["sites"] = [{**one, "fqn": f"blocks.{index}"} for index in range(20_000)]


LONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "wrong-sites": (_many_wrong_sites, "wrong values"),
    "values": (_many_values, "more than 40000 values"),
    "dimensions": (_many_dimensions, "not possible"),
    "sites": (_many_sites, "blocks.0"),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_plan_with_too_much_in_it_is_refused_in_a_moment(
    kind: str, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, word = LONG[kind]
    if kind == "values":
        monkeypatch.setattr(plans, "MOST_VALUES", 40_000)
    edit(broken, change)
    before = time.process_time()
    message = refused(SchemaError, lambda: load(broken))
    assert time.process_time() - before < 10
    assert str(broken / PLAN) in message
    assert word in message


def test_a_plan_that_would_not_be_read_is_not_written(
    vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "LARGEST", 1000)
    assert "budget" in refused(FolderError, lambda: save(vit, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


SOURCE = ("plan", "source", "arguments")
HUNGRY: dict[str, tuple[str, Any]] = {"depth": ("depth", 20_000), "width": ("embed_dim", 1_000_000)}


@pytest.mark.parametrize("kind", HUNGRY)
def test_a_host_that_is_far_larger_than_its_weights_is_not_built(kind: str, broken: Path) -> None:
    key, value = HUNGRY[kind]
    edit(broken, lambda document: put(document, (*SOURCE, key), value))
    before = time.process_time()
    message = refused(SchemaError, lambda: load(broken))
    assert time.process_time() - before < 10
    assert str(broken / PLAN) in message
    assert "weights" in message


def test_more_tensors_than_any_model_has(broken: Path) -> None:
    header = {}
    for index in range(MOST_TENSORS + 1):
        header[f"{index}"] = {"dtype": "U8", "shape": [], "data_offsets": [index, index + 1]}
    text = json.dumps(header).encode()
    (broken / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(len(header)))
    renewed(broken)
    message = refused(CorruptFileError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert str(MOST_TENSORS + 1) in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_other_kinds_of_numbers_are_refused_by_name(dtype: torch.dtype, broken: Path) -> None:
    tensors = load_file(broken / WEIGHTS)
    save_file({**tensors, "head.bias": tensors["head.bias"].to(dtype)}, broken / WEIGHTS)
    renewed(broken)
    message = refused(KeyMismatchError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert f"head.bias {dtype} instead of torch.float32" in message


def test_a_tie_does_not_hide_other_kinds_of_numbers(broken: Path) -> None:
    tensors = load_file(broken / WEIGHTS)
    del tensors["blocks.0.norm1.bias"]
    tensors["blocks.0.norm1.weight"] = tensors["blocks.0.norm1.weight"].to(torch.int32)
    save_file(tensors, broken / WEIGHTS)
    edit(broken, lambda document: document.update(tied={"blocks.0.norm1.bias": "blocks.0.norm1.weight"}))
    renewed(broken)
    message = refused(FolderError, lambda: load(broken))
    assert "blocks.0.norm1.bias, tied to blocks.0.norm1.weight: torch.int32" in message
