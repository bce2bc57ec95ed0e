"""A folder that is damaged or not whole is refused by name."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import PLAN, WEIGHTS, edit, host
from small_models import refused

from armour_surgery import load
from armour_surgery.errors import CorruptFileError, FolderError, KeyMismatchError, SchemaError
from armour_surgery.saving import folder


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    message = refused(SchemaError, lambda: load(tmp_path / "absent"))
    assert str(tmp_path / "absent") in message


def test_a_folder_without_a_plan(tmp_path: Path) -> None:
    message = refused(SchemaError, lambda: load(tmp_path))
    assert str(tmp_path) in message
    assert PLAN in message


TIES = {
    "same-shape": {"blocks.1.norm1.weight": "blocks.0.norm1.weight"},
    "other-shape": {"head.bias": "head.weight"},
    "itself": {"head.bias": "head.bias"},
    "absent": {"head.bias": "nowhere"},
    "not-a-name": {"nowhere": "head.bias"},
}


@pytest.mark.parametrize("kind", TIES)
def test_ties_that_the_weights_contradict_are_refused(kind: str, broken: Path) -> None:
    """The file holds a tensor of its own for every name, so nothing may be replaced by another."""
    edit(broken, lambda document: document["tied"].update(TIES[kind]))
    message = refused(FolderError, lambda: load(broken))
    assert str(broken) in message
    assert any(name in message for name in (*TIES[kind], *TIES[kind].values()))


def test_a_tie_of_other_shapes_is_refused(broken: Path) -> None:
    tensors = load_file(broken / WEIGHTS)
    del tensors["head.bias"]
    rewrite_weights(broken, tensors, {"head.bias": "head.weight"})
    assert "head.bias" in refused(KeyMismatchError, lambda: load(broken))


def test_weights_behind_a_link_out_of_the_folder(saved: Path, broken: Path) -> None:
    (broken / WEIGHTS).unlink()
    (broken / WEIGHTS).symlink_to(saved / WEIGHTS)
    message = refused(SchemaError, lambda: load(broken))
    assert str(broken / PLAN) in message
    assert "outside" in message or "its own folder" in message


def test_weights_behind_a_link_inside_the_folder_are_fine(broken: Path) -> None:
    (broken / WEIGHTS).rename(broken / "blob")
    (broken / WEIGHTS).symlink_to("blob")
    load(broken)


def test_weights_that_are_missing(broken: Path) -> None:
    (broken / WEIGHTS).unlink()
    message = refused(CorruptFileError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert "missing" in message
    (broken / WEIGHTS).mkdir()
    assert str(broken / WEIGHTS) in refused(FolderError, lambda: load(broken))


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0001, 0.01, 0.3, 0.99, "-1"], ids=str)
def test_truncated_weights(share: float | str, broken: Path) -> None:
    whole = (broken / WEIGHTS).read_bytes()
    cut = len(whole) - 1 if share == "-1" else math.ceil(len(whole) * float(share))
    (broken / WEIGHTS).write_bytes(whole[:cut])
    message = refused(CorruptFileError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert "truncated" in message


@pytest.mark.parametrize("place", [0, 9, 200, 0.5, -1])
def test_one_flipped_bit(place: float, broken: Path) -> None:
    content = bytearray((broken / WEIGHTS).read_bytes())
    index = int(len(content) * place) if isinstance(place, float) else place
    content[index] ^= 1
    (broken / WEIGHTS).write_bytes(content)
    assert str(broken / WEIGHTS) in refused(CorruptFileError, lambda: load(broken))


def test_appended_bytes(broken: Path) -> None:
    with (broken / WEIGHTS).open("ab") as stream:
        stream.write(b"\0")
    assert str(broken / WEIGHTS) in refused(CorruptFileError, lambda: load(broken))


def test_a_pickle_in_place_of_the_weights_is_not_opened(broken: Path) -> None:
    torch.save({"head.bias": torch.zeros(5)}, broken / WEIGHTS)
    edit(broken, lambda document: document.update(sha256=folder.digest_of(broken / WEIGHTS)))
    assert str(broken / WEIGHTS) in refused(CorruptFileError, lambda: load(broken))


def rewrite_weights(path: Path, tensors: dict[str, torch.Tensor], tied: dict[str, str] | None = None) -> None:
    """Other weights, with a checksum that says they are right."""
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    edit(path, lambda document: document.update(sha256=folder.digest_of(path / WEIGHTS), tied=tied or {}))


def test_keys_that_are_missing(broken: Path) -> None:
    tensors = load_file(broken / WEIGHTS)
    del tensors["blocks.0.attn.proj.bias"]
    rewrite_weights(broken, tensors)
    message = refused(KeyMismatchError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert "lacks blocks.0.attn.proj.bias" in message


def test_keys_that_are_left_over(broken: Path) -> None:
    rewrite_weights(broken, {**load_file(broken / WEIGHTS), "blocks.0.attn.spleen": torch.zeros(2)})
    message = refused(KeyMismatchError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert "left over blocks.0.attn.spleen" in message


@pytest.mark.parametrize("shape", [(4,), (5, 1), (1, 5), (), (0,)], ids=str)
def test_tensors_of_the_wrong_shape(shape: tuple[int, ...], broken: Path) -> None:
    rewrite_weights(broken, {**load_file(broken / WEIGHTS), "head.bias": torch.zeros(shape)})
    message = refused(KeyMismatchError, lambda: load(broken))
    assert str(broken / WEIGHTS) in message
    assert f"head.bias {shape} instead of (5,)" in message


def test_weights_of_another_mode(broken: Path, saved: Path) -> None:
    rewrite_weights(broken, {key: tensor.clone() for key, tensor in host().state_dict().items()})
    message = refused(KeyMismatchError, lambda: load(broken))
    assert "blocks.0.attn.qkv.weight (144, 48) instead of (96, 48)" in message


def test_all_problems_are_told_at_once(broken: Path) -> None:
    tensors = {f"extra.{index}": torch.zeros(1) for index in range(5)}
    rewrite_weights(broken, tensors)
    message = refused(KeyMismatchError, lambda: load(broken))
    assert "lacks" in message
    assert "left over extra.0, extra.1, extra.2 and more" in message
    assert len(message) < 1000
