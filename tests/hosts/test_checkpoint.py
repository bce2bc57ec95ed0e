"""Checkpoint files load from any wrapper and prefix, none of them runs anything, and what differs is named."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from named_hosts import SMALL, TINY
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from torch.optim.swa_utils import AveragedModel

from armour_surgery.errors import CheckpointError
from armour_surgery.hosts import load_model
from armour_surgery.hosts.checkpoint import odd_tensor
from armour_surgery.notes import ArmourWarning

ARGUMENTS: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32, "num_classes": 4}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny ViT of timm, to name as MODEL."""
    return folder(tmp_path_factory.mktemp("host"))


def vit(**arguments: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**ARGUMENTS, **arguments})


def folder(path: Path, **arguments: Any) -> str:
    save_for_hf(vit(**arguments), str(path), model_args={**ARGUMENTS, **arguments}, safe_serialization=True)
    return f"local-dir:{path}"


def behind(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


def loads(host: str, path: Path, content: object, weights: Weights, **sizes: int) -> list[str]:
    """What is said while the file loads, after a look that the model has those weights."""
    torch.save(content, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = load_model(host, checkpoint=path, **sizes)
    state = model.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    assert {warning.category for warning in caught} <= {ArmourWarning}
    return [str(warning.message).removeprefix(f"checkpoint {path}: ") for warning in caught]


def refusal(host: str, path: Path, content: object, **sizes: int) -> str:
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        load_model(host, checkpoint=path, **sizes)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict", "checkpoint.model"])
@pytest.mark.parametrize("prefix", ["model.", "backbone.", "net.", "module._orig_mod.", "teacher.backbone."])
def test_a_prefix_is_taken_off_and_said(host: str, tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    weights = vit().state_dict()
    content: dict[str, Any] = behind(prefix, weights)
    for name in reversed(wrapper.split(".") if wrapper else []):
        content = {name: content, "epoch": 3}
    assert loads(host, tmp_path / "w.pth", content, weights) == [f"took the prefix {prefix!r} off the names"]


def test_plain_weights_load_without_a_word(host: str, tmp_path: Path) -> None:
    weights = vit().state_dict()
    for content in (weights, {"model": weights, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}):
        assert loads(host, tmp_path / "w.pth", content, weights) == []


def test_what_lies_beside_the_prefix_is_named(host: str, tmp_path: Path) -> None:
    weights = vit().state_dict()
    lightning = {"state_dict": {**behind("model.", weights), "loss.weight": torch.ones(4)}, "callbacks": {}}
    (said,) = loads(host, tmp_path / "w.pth", lightning, weights)
    assert said == "took the prefix 'model.' off the names; left loss.weight aside"
    averaged = AveragedModel(vit())
    (said,) = loads(host, tmp_path / "w.pth", averaged.state_dict(), averaged.module.state_dict())
    assert said == (
        "took the averaged (EMA) weights under module; took the prefix 'module.' off the names; left n_averaged aside"
    )
    heads = {f"head.mlp.{number}.weight": torch.ones(5, 24) for number in range(4)}
    headless = vit(num_classes=0).state_dict()
    none = folder(tmp_path / "headless", num_classes=0)
    dino = {"teacher": {**behind("backbone.", headless), **heads}}
    (said,) = loads(none, tmp_path / "w.pth", dino, headless)
    assert said.endswith("left head.mlp.0.weight, head.mlp.1.weight, head.mlp.2.weight and 1 more aside")


def test_of_several_averages_come_first_and_it_is_said(host: str, tmp_path: Path) -> None:
    raw, averaged = vit().state_dict(), vit().state_dict()
    path = tmp_path / "w.pth"
    both = {"state_dict": raw, "state_dict_ema": averaged}
    assert loads(host, path, both, averaged) == [
        "took the averaged (EMA) weights under state_dict_ema and not state_dict"
    ]
    both = {"model": raw, "model_ema": {"n_averaged": torch.ones(1).long(), **behind("module.", averaged)}}
    (said,) = loads(host, path, both, averaged)
    assert said.startswith("took the averaged (EMA) weights under model_ema.module and not model; ")
    both = {"model": {**behind("student.backbone.", raw), **behind("teacher.backbone.", averaged)}}
    (said,) = loads(host, path, both, averaged)
    assert said.startswith("took the weights under model.teacher.backbone and not model.student.backbone; ")
    wider = vit(embed_dim=48).state_dict()
    assert loads(host, path, {"student": raw, "teacher": wider}, raw) == []
    assert loads(host, path, {"model": raw, "model_ema": wider}, raw) == [
        "the averaged weights under model_ema do not fit"
    ]


def test_behind_a_prefix_every_key_has_to_fit(host: str, tmp_path: Path) -> None:
    weights = behind("model.", vit().state_dict())
    adapted = {**weights, "model.blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 24)}
    message = refusal(host, tmp_path / "w.pth", adapted)
    assert "w.pth (behind model)" in message
    assert "left over blocks.0.attn.qkv.lora_A.weight;" in message
    del weights["model.norm.bias"]
    assert "missing norm.bias;" in refusal(host, tmp_path / "w.pth", weights)


def test_other_classes_and_channels_are_named_with_the_option_that_helps(host: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for sizes, advice in (
        ({"num_classes": 5}, "the file has a head for 5 classes: pass --num-classes 5"),
        ({"in_chans": 1}, "the file has a first layer for 1-channel images: pass --in-chans 1"),
        (
            {"num_classes": 5, "in_chans": 1},
            "5 classes and a first layer for 1-channel images: pass --num-classes 5 --in-chans 1",
        ),
    ):
        weights = vit(**sizes).state_dict()
        assert refusal(host, path, weights).endswith(advice)
        assert loads(host, path, weights, weights, **sizes) == []


def test_a_file_without_a_head_is_told_by_it(host: str, tmp_path: Path) -> None:
    headless = vit(num_classes=0).state_dict()
    assert refusal(host, tmp_path / "w.pth", headless).endswith("pass --num-classes 0 for the model without one")


HALVES = (torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", HALVES)
def test_other_floats_load(host: str, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {key: value.to(dtype) for key, value in vit().state_dict().items()}
    assert loads(host, tmp_path / "w.pth", weights, {key: value.float() for key, value in weights.items()}) == []


ODD = {
    "int8": lambda value: (value * 100).to(torch.int8),
    "bool": lambda value: value > 0,
    "float8_e4m3fn": lambda value: value.to(torch.float8_e4m3fn),
    "complex64": lambda value: value.to(torch.complex64),
    "qint8": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    r"a sparse tensor \(sparse_coo\)": lambda value: value.to_sparse(),
    "a meta tensor": lambda value: value.to("meta"),
}


@pytest.mark.parametrize("named", ODD)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_what_is_no_float_is_refused_with_its_key(host: str, tmp_path: Path, named: str) -> None:
    key = "blocks.0.attn.qkv.weight"
    weights = vit().state_dict()
    path = tmp_path / "w.pth"
    torch.save({"state_dict": behind("model.", {**weights, key: ODD[named](weights[key])})}, path)
    with pytest.raises(CheckpointError, match=rf"w\.pth holds {named}.* in {key}, where .*; \w+"):
        load_model(host, checkpoint=path)


def test_floats_are_no_integers_either() -> None:
    expected = {"norm.num_batches_tracked": torch.tensor(1), "norm.weight": torch.ones(2)}
    assert odd_tensor(expected, expected) is None
    assert odd_tensor({"norm.num_batches_tracked": torch.tensor(1, dtype=torch.int32)}, expected) is None
    # A table that older versions stored, which is no weight.
    assert odd_tensor({"relative_position_index": torch.tensor(1)}, expected) is None
    problem = odd_tensor({"norm.num_batches_tracked": torch.tensor(1.0)}, expected)
    assert str(problem).startswith("holds float32 in norm.num_batches_tracked, where the model has integer numbers; ")
    assert "int8 in old_name.weight" in str(odd_tensor({"old_name.weight": torch.ones(2).to(torch.int8)}, expected))


def test_quantized_folders_are_refused(tmp_path: Path) -> None:
    named = {"timm": folder(tmp_path / "timm"), "hf": f"hf:{tmp_path / 'hf'}"}
    transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)).save_pretrained(tmp_path / "hf")
    for name, model in named.items():
        load_model(model)
        path = tmp_path / name / "model.safetensors"
        weights = load_file(path)
        key = next(key for key in weights if key.endswith(("qkv.weight", "query.weight")))
        save_file({**weights, key: weights[key].to(torch.int8)}, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"I8 in {key}, where the model has floats: quantized"):
            load_model(model)


def test_transformers_checkpoints_have_prefixes_too(tmp_path: Path) -> None:
    raw = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=5))
    averaged = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=5))
    raw.save_pretrained(tmp_path / "vit")
    host, path = f"hf:{tmp_path / 'vit'}", tmp_path / "w.pth"
    content = {
        "state_dict": behind("model.", raw.state_dict()),
        "state_dict_ema": behind("model.", averaged.state_dict()),
    }
    (said,) = loads(host, path, content, averaged.state_dict())
    assert said == (
        "took the averaged (EMA) weights under state_dict_ema.model and not state_dict.model; "
        "took the prefix 'model.' off the names"
    )
    # Names that the library translates, behind a prefix.
    saved = behind("net.", load_file(tmp_path / "vit" / "model.safetensors"))
    assert loads(host, path, {**saved, "loss.weight": torch.ones(5)}, raw.state_dict()) == [
        "took the prefix 'net.' off the names; left loss.weight aside"
    ]
    other = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=3, num_channels=1))
    advice = "3 classes and a first layer for 1-channel images: pass --num-classes 3 --in-chans 1"
    assert refusal(host, path, other.state_dict()).endswith(advice)
    assert loads(host, path, other.state_dict(), other.state_dict(), num_classes=3, in_chans=1) == []


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict", "state_dict_ema"])
def test_checkpoints_load_from_their_wrappers(tmp_path: Path, wrapper: str | None) -> None:
    weights = timm.create_model("levit_128s", num_classes=3).state_dict()
    prefixed = {f"module.{key}": value for key, value in weights.items()}
    path = tmp_path / "weights.pth"
    torch.save({wrapper: prefixed, "epoch": 3} if wrapper else prefixed, path)
    with pytest.warns(ArmourWarning, match=r"took the prefix 'module\.' off the names$"):
        model, source = load_model("levit_128s", checkpoint=path, num_classes=3)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
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
    with pytest.raises(CheckpointError, match=r"does not fit levit_128s.*head for 3 classes: pass --num-classes 3$"):
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
    with pytest.raises(CheckpointError, match=r"truncated or damaged \(File is not a zip file"):
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
