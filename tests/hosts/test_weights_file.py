"""A file of weights is bounded and told by what it is before it is unpacked; types that are no floats are refused."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from armour_surgery.errors import CheckpointError
from armour_surgery.hosts.weights_file import kind_of, kinds_in_folder, read_weights


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def rezipped(path: Path, compression: int = zipfile.ZIP_STORED, **replaced: bytes) -> None:
    """Write a file of torch.save anew, with other contents for some of its entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for name, content in entries.items():
            archive.writestr(name, replaced.get(name.rpartition("/")[2].replace(".", "_"), content))


def test_a_zip_that_would_unpack_to_much_more_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"a": torch.zeros(72 << 20, dtype=torch.uint8)}, path)
    rezipped(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert "claims to hold 75,49" in refusal(path)


def test_files_that_are_zipped_again_are_weights_still(tmp_path: Path) -> None:
    weights = {"a": torch.randn(50, 30), "b": torch.zeros(500, 300)}
    torch.save(weights, tmp_path / "again.pth")
    rezipped(tmp_path / "again.pth", zipfile.ZIP_DEFLATED)
    read = read_weights(tmp_path / "again.pth")[""]
    assert all(torch.equal(read[key], value) for key, value in weights.items())


@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth"])
def test_tensors_that_repeat_few_numbers_endlessly_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"endless{suffix}"
    torch.save({"a": torch.ones(1).expand(10**13)}, path, _use_new_zipfile_serialization=suffix == ".pth")
    assert "claims to hold 40,000,000,000,000" in refusal(path)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "unchecked.pth")
    finally:
        torch.serialization.set_crc32_options(computed)
    assert torch.equal(read_weights(tmp_path / "unchecked.pth")[""]["a"], torch.ones(3))


class Sized:
    def __reduce__(self) -> Any:
        return bytearray, (10**13,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bytearray_of_any_size_is_never_made(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "sized.pth"
    torch.save({"a": torch.zeros(3)}, path)
    pickled = pickle.dumps({"a": Sized()}, protocol=2)
    if zipped:
        rezipped(path, data_pkl=pickled)
    else:
        path.write_bytes(pickled)
    assert "holds a bytearray" in refusal(path)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_torchscript_is_told_by_name_and_the_way_out_works(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    layer = nn.Linear(2, 3)
    torch.jit.trace(layer, torch.zeros(1, 2)).save(path)
    message = refusal(path)
    assert "is a TorchScript program" in message
    command = message[message.index("torch.save(") :]
    exec(command.replace("'weights.pth'", repr(str(tmp_path / "weights.pth"))), {"torch": torch})
    assert torch.equal(read_weights(tmp_path / "weights.pth")[""]["weight"], layer.weight)


def test_another_zip_is_not_called_damaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("other/models/model.json", "{}")
    assert "a zip file that torch.save did not write" in refusal(tmp_path / "other.pt")


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is no regular file" in refusal(tmp_path / "pipe.pth")


def safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (1,), end: int = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": entry(shape=(10**10,), end=4 * 10**10)}, "truncated or damaged"),
        ({"a": entry(shape=(2**40, 2**40))}, "truncated or damaged"),
        ({"a": {"shape": [1]}}, "no type for 'a'"),
        ([1], "no JSON object"),
        (dict.fromkeys(map(str, range(50_001)), entry(shape=(0,), end=0)), "claims 50001 tensors"),
        ({"a": entry("F6_E2M3", (4,), 3)}, "F6_E2M3 in a: quantized"),
    ],
    ids=["more than there is", "overflow", "no type", "a list", "many", "six bits"],
)
def test_headers_of_safetensors_that_are_wrong(tmp_path: Path, header: object, said: str) -> None:
    assert said in refusal(safetensors(tmp_path / "x.safetensors", header, b"1234"))


def test_a_header_longer_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 20 << 20))
        stream.truncate(21 << 20)
    assert "would be 20971520 bytes long" in refusal(path)


def test_dictionaries_are_read_once_and_not_too_deep(tmp_path: Path) -> None:
    tensors = {"a.b": torch.ones(2)}
    wide: dict[str, Any] = tensors
    for _ in range(40):
        # As many paths to the innermost as 2 ** 40.
        wide = {"x": wide, "y": wide}
    content = {"state_dict": tensors, "same": tensors, "wide": wide, "optimizer": {"state": {0: {"step": 1}}}}
    content["again"] = content
    torch.save(content, tmp_path / "nested.pth")
    assert list(read_weights(tmp_path / "nested.pth")) == ["state_dict"]


def test_kinds_of_types_are_the_same_in_a_header_and_in_a_tensor(tmp_path: Path) -> None:
    kinds = {
        "float": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
        "quantized": (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
        "integer": (torch.int8, torch.uint8, torch.int64, torch.uint16, torch.bool),
        "complex": (torch.complex64,),
    }
    expected = {str(dtype): kind for kind, dtypes in kinds.items() for dtype in dtypes}
    tensors = {str(dtype): torch.ones(2).to(dtype) for dtypes in kinds.values() for dtype in dtypes}
    save_file(tensors, tmp_path / "model.safetensors")
    assert {key: kind for key, (kind, _) in kinds_in_folder(tmp_path).items()} == expected
    assert {key: kind_of(tensor)[0] for key, tensor in load_file(tmp_path / "model.safetensors").items()} == expected
