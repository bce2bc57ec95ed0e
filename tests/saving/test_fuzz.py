"""Whatever is done to the files of a folder, it is refused with an error of ours, or a model comes out that is right.

`make fuzz` draws other examples each time, and many more of them.
"""

import copy
import json
import math
import os
import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from saved_models import PLAN, WEIGHTS, edit, outputs, put
from torch import nn

from armour_surgery import ArmourError, convert, load, save
from armour_surgery.hosts.weights_file import digest_of

EXAMPLES = os.environ.get("ARMOUR_TEST_EXAMPLES")


def fuzzed(examples: int) -> Any:
    return settings(
        max_examples=int(EXAMPLES or examples),
        deadline=None,
        derandomize=EXAMPLES is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def load_quietly(path: Path) -> nn.Module | None:
    """The model, or None where the folder is refused; any other error is the test's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load(path)
    except ArmourError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return None


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is loaded in no time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes).eval()
    return save(convert(model), tmp_path_factory.mktemp("saved") / "small")


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_of(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from paths_of(inner, (*path, index))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.sampled_from([10**30, -(10**9), 0.5, -1e300, math.inf, math.nan, 3_000, 20_000, 10**6])
    | st.sampled_from(["", "qv", "kv", "x", "blocks.0.attn", "float16", "int8", "nn", "\ud800", "a\0b", "..", "timm"])
    | st.text(max_size=6)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def at(document: Any, where: tuple[str | int, ...]) -> Any:
    for step in where:
        document = document[step]
    return document


def edited(original: Any, places: list[tuple[str | int, ...]], data: st.DataObject) -> Any:
    """The document with one place or two replaced, dropped, added to, or swapped for another."""
    document = copy.deepcopy(original)
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from(places))
        what = data.draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "swap"]))
        try:
            if what == "replace":
                put(document, where, data.draw(VALUES))
            elif what == "add":
                put(document, (*where[:-1], data.draw(st.text(max_size=4))), data.draw(VALUES))
            elif what == "drop":
                del at(document, where[:-1])[where[-1]]
            else:
                put(document, where, copy.deepcopy(at(document, data.draw(st.sampled_from(places)))))
        except (KeyError, IndexError, TypeError):
            continue
    return document


# What of a plan decides what is computed; the rest is told to people.
DECIDES = (("plan", "source"), ("plan", "sites"), ("buffer_dtypes",), ("tied",))


@pytest.mark.parametrize(("kind", "examples"), [("small", 60), ("saved_hf", 15)])
def test_no_edit_of_the_plan_raises_anything_but_our_own_errors(
    kind: str, examples: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(kind)
    original = json.loads((source / PLAN).read_text())
    wanted = outputs(load(source))
    places = [path for path in paths_of(original) if path[0] != "versions"]
    path = Path(shutil.copytree(source, tmp_path / "model"))

    @fuzzed(examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        document = edited(original, places, data)
        (path / PLAN).write_text(json.dumps(document))
        model = load_quietly(path)
        if model is not None and all(at(document, where) == at(original, where) for where in DECIDES):
            assert all(map(torch.equal, outputs(model), wanted))

    check()


def test_no_damage_to_the_bytes_of_the_plan_raises_anything_but_our_own_errors(small: Path, tmp_path: Path) -> None:
    whole = (small / PLAN).read_bytes()
    path = Path(shutil.copytree(small, tmp_path / "model"))

    @fuzzed(40)
    @given(st.integers(0, len(whole) - 1), st.integers(0, 3), st.binary(min_size=1, max_size=3))
    def check(place: int, cut: int, put_in: bytes) -> None:
        (path / PLAN).write_bytes(whole[:place] + put_in + whole[place + cut :])
        load_quietly(path)

    check()


def with_header(whole: bytes, header: bytes) -> bytes:
    """The file with another header before the same numbers."""
    (length,) = struct.unpack("<Q", whole[:8])
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]


def test_no_edit_of_the_weights_header_is_loaded_as_something_else(small: Path, tmp_path: Path) -> None:
    """With a checksum that was made anew, so that nothing but the header itself is wrong."""
    whole = (small / WEIGHTS).read_bytes()
    header = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
    places = list(paths_of(header))
    path = Path(shutil.copytree(small, tmp_path / "model"))
    types = st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X"])

    @fuzzed(70)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        changed = edited(header, places, data)
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
            put(changed, (name,), {**header[name], "dtype": data.draw(types)})
        (path / WEIGHTS).write_bytes(with_header(whole, json.dumps(changed).encode()))
        edit(path, lambda document: document.update(sha256=digest_of(path / WEIGHTS)))
        model = load_quietly(path)
        if model is not None:
            read = load_file(path / WEIGHTS)
            assert model.state_dict().keys() == read.keys()
            assert all(torch.equal(tensor, read[name]) for name, tensor in model.state_dict().items())

    check()


def test_no_damage_to_the_bytes_of_the_weights_goes_unnoticed(small: Path, tmp_path: Path) -> None:
    whole = (small / WEIGHTS).read_bytes()
    path = Path(shutil.copytree(small, tmp_path / "model"))

    @fuzzed(60)
    @given(st.integers(0, 1200), st.integers(0, 3), st.binary(min_size=1, max_size=3))
    def check(place: int, cut: int, put_in: bytes) -> None:
        damaged = whole[:place] + put_in + whole[place + cut :]
        (path / WEIGHTS).write_bytes(damaged)
        assert (load_quietly(path) is None) == (damaged != whole)

    check()
