"""A plan that was edited is refused by file and reason, or does no harm."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import PLAN, armour, edit, put
from small_models import refused

from armour_surgery import ArmourError, load, save
from armour_surgery.errors import FolderError, SchemaError

NOT_JSON = {
    "empty": "",
    "text": "hello",
    "cut": '{"schema_version": 1, "tool": "armour-s',
    "list": "[]",
    "null": "null",
    "number": "17",
    "deep": "[" * 100_000,
    "long-number": '{"schema_version": ' + "1" * 5000 + "}",
    "byte-order-mark": "\ufeff{}",
}


@pytest.mark.parametrize("kind", NOT_JSON)
def test_a_plan_that_is_not_json(kind: str, broken: Path) -> None:
    (broken / PLAN).write_text(NOT_JSON[kind], encoding="utf-8")
    message = refused(SchemaError, lambda: load(broken))
    assert str(broken / PLAN) in message
    assert "\n" not in message


def test_a_plan_that_is_binary_or_cut(saved: Path, broken: Path) -> None:
    (broken / PLAN).write_bytes(b"\xff\xfe\x00\x01")
    assert str(broken / PLAN) in refused(SchemaError, lambda: load(broken))
    whole = (saved / PLAN).read_bytes()
    for length in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 3):
        (broken / PLAN).write_bytes(whole[:length])
        assert str(broken / PLAN) in refused(SchemaError, lambda: load(broken))


EDITS: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "other-tool": (("tool",), "scalpel", "not written by armour-surgery"),
    "newer-schema": (("schema_version",), 2, "schema version 2"),
    "text-schema": (("schema_version",), "1", "schema version '1'"),
    "no-schema": (("schema_version",), None, "schema version None"),
    "extra-key": (("hook",), "import os", "hook"),
    "plan-is-text": (("plan",), "qv", "plan"),
    "plan-extra-key": (("plan", "hook"), 1, "hook"),
    "source-is-text": (("plan", "source"), "timm", "plan"),
    "no-source": (("plan", "source"), None, "how to build"),
    "sites-are-text": (("plan", "sites"), "abc", "plan"),
    "site-extra-key": (("plan", "sites", 0, "hook"), 1, "hook"),
    "site-name-is-number": (("plan", "sites", 0, "fqn"), 3, "3"),
    "mode-is-list": (("plan", "sites", 0, "mode"), ["qv"], "qv"),
    "site-gone": (("plan", "sites", 0, "fqn"), "blocks.7.attn", "blocks.7.attn"),
    "site-not-attention": (("plan", "sites", 0, "fqn"), "blocks.0.mlp", "blocks.0.mlp"),
    "mode-that-does-not-fit": (("plan", "sites", 0, "mode"), "concat-half", "concat-half"),
    "mode-unknown": (("plan", "sites", 0, "mode"), "qq", "qq"),
    "example-shape": (("plan", "example", 0, 1), [2, 3, 32, "x"], "plan"),
    "example-negative": (("plan", "example", 0, 1), [2, 3, -32, 32], "-32"),
    "example-type": (("plan", "example", 0, 2), "nn", "nn"),
    "example-overflow": (("plan", "example", 0, 1), [99_999] * 4, "99999"),
    "example-other-size": (("plan", "example", 0, 1), [2, 3, 8, 8], "(2, 3, 8, 8)"),
    "weights-above": (("weights",), "../model.safetensors", "../model.safetensors"),
    "weights-absolute": (("weights",), "/etc/passwd", "/etc/passwd"),
    "weights-below": (("weights",), "sub/model.safetensors", "sub/model.safetensors"),
    "weights-dots": (("weights",), "..", "'..'"),
    "weights-empty": (("weights",), "", "weights"),
    "weights-nul": (("weights",), "a\0b", "a\\x00b"),
    "weights-surrogate": (("weights",), "\ud800", "weights"),
    "weights-long": (("weights",), "a" * 5000, "aaa"),
    "weights-number": (("weights",), 7, "7"),
    "sha-list": (("sha256",), ["a"], "'a'"),
    "tied-list": (("tied",), ["a"], "plan"),
    "buffer-dtype": (("buffer_dtypes",), {"nothing": "float16"}, "nothing"),
    "os-system": (("plan", "source", "library"), "os", "'os'"),
    "os-system-architecture": (("plan", "source", "architecture"), "os.system", "os.system"),
    "architecture-list": (("plan", "source", "architecture"), ["a"], "'a'"),
    "unknown-library": (("plan", "source", "library"), "keras", "'keras'"),
    "other-library": (("plan", "source", "library"), "transformers", "vit_tiny"),
    "hub-download": (("plan", "source", "architecture"), "hf-hub:timm/vit_tiny", "hf-hub:timm/vit_tiny"),
    "local-dir": (("plan", "source", "architecture"), "local-dir:/etc", "local-dir:/etc"),
    "pretrained": (("plan", "source", "arguments", "pretrained"), True, "pretrained"),
    "checkpoint-path": (("plan", "source", "arguments", "checkpoint_path"), "/etc/passwd", "checkpoint_path"),
    "unknown-argument": (("plan", "source", "arguments", "spleen"), 1, "spleen"),
    "arguments-list": (("plan", "source", "arguments"), [1], "[1]"),
    "attribute-private": (("plan", "source", "attributes"), {"blocks.0._modules": 1}, "blocks.0._modules"),
    "attribute-class": (("plan", "source", "attributes"), {"__class__": "x"}, "__class__"),
    "attribute-module-gone": (("plan", "source", "attributes"), {"blocks.9.x": 1}, "blocks.9"),
    "attribute-other-type": (("plan", "source", "attributes"), {"blocks.0.attn.num_heads": "x"}, "num_heads"),
    "attribute-no-heads": (("plan", "source", "attributes"), {"blocks.0.attn.num_heads": 0}, "VisionTransformer"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_plan_is_refused_by_file_and_reason(kind: str, broken: Path) -> None:
    where, value, word = EDITS[kind]
    edit(broken, lambda document: put(document, where, value))
    message = refused(FolderError, lambda: load(broken))
    assert word in message
    assert str(broken) in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    "where",
    [
        ("tool",), ("weights",), ("sha256",), ("tied",), ("buffer_dtypes",), ("versions",), ("plan",),
        ("plan", "sites"), ("plan", "source"), ("plan", "example"), ("plan", "mode"), ("plan", "params_before"),
        ("plan", "sites", 0, "fqn"), ("plan", "sites", 0, "residual"), ("plan", "source", "library"),
        ("plan", "source", "architecture"),
    ],
    ids=lambda where: ".".join(map(str, where)),
)  # fmt: skip
def test_a_plan_that_lacks_a_key_is_refused(where: tuple[str | int, ...], broken: Path) -> None:
    def drop(document: Any) -> None:
        for step in where[:-1]:
            document = document[step]
        del document[where[-1]]

    edit(broken, drop)
    message = refused(SchemaError, lambda: load(broken))
    assert str(broken / PLAN) in message
    if where != ("tool",):
        assert str(where[-1]) in message


WRONG_TYPES: dict[tuple[str | int, ...], Any] = {
    ("plan", "params_before"): "many",
    ("plan", "macs_after"): [1],
    ("plan", "init"): 7,
    ("plan", "refused"): [{"fqn": 5, "reason": None}],
    ("plan", "sites", 0, "params_before"): "many",
    ("plan", "sites", 0, "residual"): "none",
    ("plan", "source", "name"): 5,
    ("plan", "source", "license"): ["mit"],
    ("versions",): "all",
}


@pytest.mark.parametrize("where", WRONG_TYPES, ids=lambda where: ".".join(map(str, where)))
def test_a_wrong_type_is_refused_or_does_no_harm(where: tuple[str | int, ...], broken: Path, tmp_path: Path) -> None:
    """What `load` lets through must not surprise later, when the model is saved again."""
    edit(broken, lambda document: put(document, where, WRONG_TYPES[where]))
    try:
        model = load(broken)
    except SchemaError as error:
        assert str(broken / PLAN) in str(error)  # noqa: PT017
        return
    try:
        load(save(model, tmp_path / "again"))
    except ArmourError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_a_message_stays_one_line_whatever_the_keys_are(broken: Path) -> None:
    edit(broken, lambda document: document["plan"].update({"a\nb": 1}))
    refused(SchemaError, lambda: load(broken))


def test_a_site_that_is_named_twice_is_refused(broken: Path) -> None:
    edit(broken, lambda document: document["plan"]["sites"].append(document["plan"]["sites"][0]))
    assert "blocks.0.attn" in refused(SchemaError, lambda: load(broken))


def test_a_site_that_is_not_named_is_refused(broken: Path) -> None:
    edit(broken, lambda document: document["plan"]["sites"].clear())
    refused(FolderError, lambda: load(broken))


@pytest.fixture(scope="session")
def saved_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has something to say about buffers."""
    path = save(armour("eva02").to(torch.bfloat16), tmp_path_factory.mktemp("saved") / "eva02")
    assert json.loads((path / PLAN).read_text())["buffer_dtypes"]
    return path


BUFFER_TYPES = ["nn", "float33", "manual_seed", "int64", ["a"], None]


@pytest.mark.parametrize("dtype", BUFFER_TYPES, ids=map(str, BUFFER_TYPES))
def test_a_buffer_type_that_is_none_is_refused(dtype: Any, saved_half: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved_half, tmp_path / "out"))
    edit(path, lambda document: document["buffer_dtypes"].update(dict.fromkeys(document["buffer_dtypes"], dtype)))
    assert str(path / PLAN) in refused(SchemaError, lambda: load(path))


def test_a_buffer_of_integers_does_not_become_one_of_floats(tmp_path: Path) -> None:
    path = save(armour("beit"), tmp_path / "out")
    name = "blocks.0.attn.relative_position_index"
    edit(path, lambda document: document["buffer_dtypes"].update({name: "float16"}))
    assert name in refused(SchemaError, lambda: load(path))


HF_EDITS: dict[str, tuple[str, Any]] = {
    "auto_map": ("auto_map", {"AutoModel": "evil.Model"}),
    "trust_remote_code": ("trust_remote_code", True),
    "quantization": ("quantization_config", {"quant_method": "bitsandbytes"}),
    "attention-kernel": ("_attn_implementation", "kernels-community/evil"),
    "attention-kernel-argument": ("attn_implementation", "kernels-community/evil"),
}


@pytest.mark.parametrize("kind", HF_EDITS)
def test_a_config_that_would_fetch_something_is_refused(kind: str, saved_hf: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved_hf, tmp_path / "model"))
    key, value = HF_EDITS[kind]
    edit(path, lambda document: document["plan"]["source"]["arguments"].update({key: value}))
    message = refused(SchemaError, lambda: load(path))
    assert key in message or str(value) in message


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        (
            "TimmWrapperModel",
            {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": {"checkpoint_path": "FILE"}},
        ),
        ("TimmWrapperModel", {"architecture": "hf-hub:timm/vit_tiny_patch16_224", "num_classes": 5}),
        ("TimmWrapperModel", {"architecture": "local-dir:DIR", "num_classes": 5}),
    ],
    ids=["checkpoint", "hub", "folder"],
)
def test_a_wrapped_timm_model_reads_no_file(
    architecture: str, arguments: dict[str, Any], saved_hf: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(saved_hf, tmp_path / "model"))
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    torch.save({"state_dict": {}}, tmp_path / "weights.pth")
    text = json.dumps(arguments).replace("FILE", str(tmp_path / "weights.pth")).replace("DIR", str(tmp_path))
    change = {"architecture": architecture, "arguments": json.loads(text)}
    edit(path, lambda document: document["plan"]["source"].update(change))
    message = refused(SchemaError, lambda: load(path))
    assert "must not" in message


@pytest.mark.parametrize("architecture", ["PreTrainedModel", "AutoModel", "pipeline", "os", "ViTConfig", "__doc__"])
def test_a_transformers_name_that_is_no_model_is_refused(architecture: str, saved_hf: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved_hf, tmp_path / "model"))
    edit(path, lambda document: document["plan"]["source"].update(architecture=architecture))
    assert architecture in refused(SchemaError, lambda: load(path))
