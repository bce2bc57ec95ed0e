"""Checkpoint files load from their wrappers, and none of them runs anything."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from named_hosts import TINY
from safetensors.torch import save_file

from armour_surgery.errors import CheckpointError
from armour_surgery.hosts import load_model


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "state_dict_ema"])
def test_checkpoints_load_from_their_wrappers(tmp_path: Path, wrapper: str | None) -> None:
    weights = {
        f"module.{key}": value for key, value in timm.create_model("levit_128s", num_classes=3).state_dict().items()
    }
    path = tmp_path / "weights.pth"
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, path)
    model, source = load_model("levit_128s", checkpoint=path, num_classes=3)
    assert all(torch.equal(value, weights[f"module.{key}"]) for key, value in model.state_dict().items())
    assert (source.arguments["num_classes"], source.license) == (3, None)
    assert not model.training


def test_levit_as_its_authors_saved_it(tmp_path: Path) -> None:
    model = timm.create_model("levit_conv_128s")
    theirs: dict[str, torch.Tensor] = {}
    for number, (key, value) in enumerate(model.state_dict().items()):
        theirs[f"blocks.{number}.{key.rpartition('.')[2]}"] = (
            value[..., 0, 0] if value.ndim == 4 and value.shape[-1] == 1 else value
        )
    theirs["blocks.0.attention_bias_idxs"] = torch.zeros(2, 2, dtype=torch.long)
    torch.save({"model": theirs}, tmp_path / "levit.pth")
    loaded, _ = load_model("levit_conv_128s", checkpoint=tmp_path / "levit.pth")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    weights = timm.create_model("levit_128s", num_classes=3).state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"does not fit levit_128s.*head for 3 classes: pass --num-classes"):
        load_model("levit_128s", checkpoint=path)
    with pytest.raises(CheckpointError, match=rf"does not fit {TINY}: missing .* and \d+ more; left over .* more;"):
        load_model(TINY, checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(TINY, checkpoint=path)


def test_pickles_that_are_not_plain_weights_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "weights.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "extra": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"not plain weights.*safetensors"):
        load_model(TINY, checkpoint=path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="not plain weights"):
        load_model(TINY, checkpoint=path)
    assert not (tmp_path / "ran").exists()
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"truncated or damaged \(PytorchStreamReader"):
        load_model(TINY, checkpoint=path)
    path.write_bytes(b"hello world")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(TINY, checkpoint=path)
    torch.save({"model": {"epoch": 3}}, path)
    with pytest.raises(CheckpointError, match="holds int under 'epoch'"):
        load_model(TINY, checkpoint=path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="holds list"):
        load_model(TINY, checkpoint=path)
