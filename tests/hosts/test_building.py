import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torch import nn

from armour_surgery.errors import (
    ArmourError,
    CheckpointError,
    ExampleInputError,
    FolderError,
    HubUnreachableError,
    ModelError,
    SchemaError,
    UnknownModelError,
    UsageError,
)
from armour_surgery.hosts import build, describe, example_input, hub, library_of, load_model, suggest
from armour_surgery.records import Source

TINY = "deit_tiny_patch16_224"
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
}


def tiny(**arguments: Any) -> nn.Module:
    return timm.create_model(TINY, **{"depth": 1, "num_classes": 5, **arguments})


def clip() -> nn.Module:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=SMALL, text_config=text))


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinModel(config)


HOSTS = {
    "deit": lambda: tiny(drop_path_rate=0.1, proj_drop_rate=0.2),
    "deit-distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1, in_chans=1, img_size=96),
    "levit": lambda: timm.create_model("levit_128s"),
    "levit-conv": lambda: timm.create_model("levit_conv_128s", img_size=128, num_classes=3),
    "beit": lambda: timm.create_model("beit_base_patch16_224", depth=1, embed_dim=96, num_heads=3),
    "eva02": lambda: timm.create_model("eva02_tiny_patch14_224", depth=1),
    "dinov2": lambda: timm.create_model("vit_small_patch14_dinov2", depth=1, img_size=70),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), embed_dim=24, num_heads=(3,) * 4
    ),
    "hf-vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=5)),
    "hf-vit-eager": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL, attn_implementation="eager")),
    "hf-deit": lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SMALL)),
    "hf-levit": lambda: transformers.LevitModel(transformers.LevitConfig(image_size=64)),
    "hf-dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)),
    "hf-beit": lambda: transformers.BeitModel(transformers.BeitConfig(**SMALL, use_relative_position_bias=True)),
    "hf-clip-vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL)),
    "hf-clip": clip,
    "hf-swin": swin,
}


def outputs(model: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.rand(like.shape, generator=generator) if like.is_floating_point() else torch.ones(like.shape).long()
        for name, like in example_input(model, 1).items()
    }
    with torch.no_grad():
        out = model.eval()(**inputs)
    values = out.values() if isinstance(out, dict) else (out if isinstance(out, tuple) else [out])
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("host", HOSTS)
def test_a_rebuilt_host_is_the_same_model(host: str) -> None:
    model = HOSTS[host]()
    source = describe(model)
    assert json.loads(json.dumps(source.arguments, allow_nan=False)) == source.arguments
    rebuilt = build(source)
    assert all(parameter.is_meta for parameter in rebuilt.parameters())
    assert not any(buffer.is_meta for buffer in rebuilt.buffers())
    assert {n: type(m) for n, m in rebuilt.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    rebuilt.load_state_dict(model.state_dict(), strict=True, assign=True)
    expected, found = outputs(model), outputs(rebuilt)
    assert expected
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_torchvision_vit_is_recognized_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model("vit_b_16", image_size=64, num_classes=7)
    source = describe(model)
    assert (source.architecture, source.arguments) == ("vit_b_16", {"num_classes": 7, "image_size": 64})
    assert example_input(model)["x"].shape == (2, 3, 64, 64)


def test_plain_attributes_come_back() -> None:
    model = tiny()
    model.blocks[0].attn.attn_drop.p = 0.25
    model.blocks[0].norm1.eps = 1e-3
    model.head = nn.Linear(192, 3)
    model.note = "only the live model has this"
    source = describe(model)
    assert source.attributes == {
        "blocks.0.attn.attn_drop.p": 0.25,
        "blocks.0.norm1.eps": 1e-3,
        "num_classes": 5,
    }
    rebuilt = build(source)
    assert rebuilt.blocks[0].attn.attn_drop.p == 0.25
    assert rebuilt.head.out_features == 3
    assert not rebuilt.training


def test_tied_parameters_stay_tied_and_random_numbers_are_left_alone() -> None:
    model = transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**SMALL))
    before = torch.get_rng_state()
    rebuilt = build(describe(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(list(rebuilt.parameters())) == len(list(model.parameters()))
    assert isinstance(nn.Linear(2, 2).weight.data, torch.Tensor)
    assert not nn.Linear(2, 2).weight.is_meta


def test_data_config_of_a_finetuned_model_survives() -> None:
    model = tiny()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5, 0.5, 0.5), "crop_pct": 1.0}
    rebuilt = build(describe(model))
    assert rebuilt.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert rebuilt.pretrained_cfg["crop_pct"] == 1.0


def test_describe_names_what_differs_and_takes_arguments() -> None:
    model = tiny()
    model._model_args = {}
    model.blocks.append(nn.Identity())
    with pytest.raises(FolderError, match=r"module 'blocks\.1'.*Identity.*model_args"):
        describe(model)
    plain = tiny()
    plain._model_args = {}
    with pytest.raises(FolderError, match="model_args"):
        describe(plain)
    assert describe(plain, {"depth": 1}).arguments["depth"] == 1
    with pytest.raises(UsageError, match="JSON"):
        describe(plain, {"norm_layer": nn.LayerNorm})
    with pytest.raises(FolderError, match=r"torch\.nn\.modules.*unwrap"):
        describe(nn.Sequential(model))
    with pytest.raises(FolderError, match=r"not made by timm\.create_model"):
        describe(timm.models.VisionTransformer(depth=1, embed_dim=32, num_heads=2))
    with torch.device("meta"):
        vit = torchvision.models.VisionTransformer(64, 16, 1, 2, 32, 64)
    with pytest.raises(FolderError, match="no torchvision builder"):
        describe(vit)


def test_describe_takes_num_labels_for_a_replaced_head() -> None:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=5))
    model.classifier = nn.Linear(32, 3)
    with pytest.raises(FolderError, match=r"classifier\.weight is \(3, 32\) in the model and \(5, 32\)"):
        describe(model)
    assert build(describe(model, {"num_labels": 3})).classifier.out_features == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("os", "system"), "library 'os' is unknown"),
        (Source("timm", 3), "must be a name"),  # type: ignore[arg-type]
        (Source("timm", "os.system"), "not a timm"),
        (Source("timm", "hf-hub:timm/x"), "not a timm"),
        (Source("timm", TINY, {"pretrained": True}), "'pretrained', which must not"),
        (Source("timm", TINY, {"checkpoint_path": "/etc/passwd"}), "'checkpoint_path', which must not"),
        (Source("timm", TINY, {"pretrained_cfg_overlay": {"url": "http://x"}}), "alone, not"),
        (Source("timm", TINY, {"bogus": 1}), "could not build.*bogus"),
        (Source("timm", TINY, []), "must be an object"),  # type: ignore[arg-type]
        (Source("transformers", "os.system"), "not a model class"),
        (Source("transformers", "AutoModel"), "not a model class"),
        (Source("transformers", "pipeline"), "not a model class"),
        (
            Source("transformers", "ViTModel", {"a": [{"use_pretrained_backbone": True}]}),
            "'use_pretrained_backbone'",
        ),
        (
            Source("transformers", "ViTModel", {"_attn_implementation": "kernels-community/x"}),
            "asks for the attention",
        ),
        (Source("torchvision", "os"), "not a torchvision"),
        (Source("torchvision", "vit_b_16", {"weights": "DEFAULT"}), "'weights', which must not"),
        (Source("timm", TINY, {"depth": 1}, {"nowhere.p": 1}), "no module 'nowhere'"),
        (Source("timm", TINY, {"depth": 1}, {"forward": 1}), "not a plain attribute"),
        (Source("timm", TINY, {"depth": 1}, {"head.__class__": 1}), "not a plain attribute"),
        (Source("timm", TINY, {"depth": 1}, {"head._parameters": 1}), "not a plain attribute"),
        (Source("timm", TINY, {"depth": 1}, {"num_classes": "many"}), "another type"),
        (Source("timm", TINY, {"depth": 1}, {"num_classes": {"a": 1}}), "another type"),
    ],
)
def test_build_refuses_what_a_folder_must_not_name(source: Source, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        build(source)


def test_example_inputs() -> None:
    assert example_input(HOSTS["deit-distilled"](), 3)["x"].shape == (3, 1, 96, 96)
    assert example_input(tiny().half())["x"].dtype == torch.float16
    inputs = example_input(clip())
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert inputs["input_ids"].dtype == torch.int64
    assert all(value.is_meta for value in inputs.values())
    with pytest.raises(ExampleInputError, match=r"Linear.*example_input="):
        example_input(nn.Linear(2, 2))
    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ExampleInputError, match=r"input_ids.*example_input="):
        example_input(bert)
    with pytest.raises(UsageError, match="batch_size"):
        example_input(tiny(), 0)


def test_library_and_suggestions() -> None:
    assert library_of(tiny()) == "timm"
    assert library_of(swin()) == "transformers"
    assert library_of(torchvision.models.get_model("squeezenet1_0")) == "torchvision"
    assert library_of(nn.Linear(1, 1)) is None
    assert suggest("deit_tiny_patch16_24")[0] == TINY
    assert suggest("vit_b_16") == ["torchvision:vit_b_16"]
    assert suggest("org/name") == []


# Loading.


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "deit_tiny_patch16_24",
            {},
            UnknownModelError,
            f"no model 'deit_tiny_patch16_24'; did you mean {TINY} or",
        ),
        (f"{TINY}.foo", {}, UnknownModelError, "no weights tagged 'foo'; known tags: fb_in1k"),
        ("vit_b_16", {}, UnknownModelError, "did you mean torchvision:vit_b_16"),
        ("torchvision:vit_b16", {}, UnknownModelError, "did you mean torchvision:vit_b_16"),
        ("vit_small_patch16_18x2_224", {}, ModelError, "no pretrained weights.*--no-pretrained"),
        ("foo:bar", {}, UnknownModelError, "unknown prefix 'foo'"),
        ("hf:", {}, UsageError, "ends at its prefix"),
        (" ", {}, UsageError, "MODEL is empty"),
        ("./nope", {}, UnknownModelError, "no such folder"),
        ("a/b/c", {}, UnknownModelError, "no such folder"),
        ("google/vit", {}, ModelError, "write hf:google/vit for transformers or hf-hub:google/vit"),
        ("local-dir:/nope", {}, UnknownModelError, "the folder does not exist"),
        ("hf:/nope", {}, UnknownModelError, "the folder does not exist"),
        ("hf:vit", {}, ModelError, "is a transformers model type.*--no-pretrained"),
        (__file__, {}, UnknownModelError, "is a file.*--checkpoint"),
        (TINY, {"img_size": 0}, UsageError, "img_size must be 1 or more, not 0"),
        (TINY, {"num_classes": -1}, UsageError, "num_classes must be 1 or more"),
        ("resnet18", {"img_size": 64, "pretrained": False}, UsageError, "resnet18 takes no img_size"),
        ("torchvision:squeezenet1_0", {"img_size": 64, "pretrained": False}, UsageError, "takes no img_size"),
        ("torchvision:swin_t", {"in_chans": 1, "pretrained": False}, UsageError, "takes no in_chans"),
        ("hf:bert", {"in_chans": 1, "pretrained": False}, UsageError, "hf:bert takes no in_chans"),
        ("hf:bert", {"num_classes": 2, "pretrained": False}, UsageError, "no image classifier"),
        (TINY, {"checkpoint": "/nope.pth"}, CheckpointError, "does not exist"),
        (TINY, {"checkpoint": "/"}, CheckpointError, "is a folder.*local-dir:/"),
        (TINY, {"checkpoint": __file__}, CheckpointError, r"ending '\.py'"),
    ],
)
def test_names_and_sizes_that_are_wrong(
    name: str, options: dict[str, Any], error: type[ArmourError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)


def test_no_hub_is_one_line_and_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    for name in (TINY, "hf-hub:timm/nope", "hf:org/nope", "torchvision:squeezenet1_0"):
        with pytest.raises(
            HubUnreachableError, match=r"--no-pretrained.*--checkpoint FILE.*local-dir:DIR / hf:DIR"
        ) as caught:
            load_model(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE
    assert capfd.readouterr().err == ""


def test_quiet_does_not_swallow_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), hub.quiet(), hub.offline():
        raise KeyboardInterrupt


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


def test_folders_of_timm_and_transformers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=5)).eval()
    folder = tmp_path / "vit"
    model.save_pretrained(folder)
    capfd.readouterr()
    loaded, source = load_model(f"hf:{folder}")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert describe(loaded).arguments == source.arguments
    assert source.name == f"hf:{folder}"
    assert load_model(str(folder))[1].library == "transformers"
    again, _ = load_model(f"hf:{folder}", checkpoint=folder / "model.safetensors")
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    fresh, fresh_source = load_model(f"hf:{folder}", num_classes=3)
    assert build(fresh_source).classifier.out_features == fresh.classifier.out_features == 3
    with pytest.raises(UsageError, match=r"do not fit img_size=64 .*--no-pretrained"):
        load_model(f"hf:{folder}", img_size=64)
    assert load_model(f"hf:{folder}", img_size=64, pretrained=False)[0].config.image_size == 64
    with pytest.raises(CheckpointError, match=r"head for 5 classes: pass --num-classes"):
        load_model(f"hf:{folder}", num_classes=3, checkpoint=folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(f"hf:{folder}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnknownModelError, match=r"no model\.safetensors .*--no-pretrained"):
        load_model(f"hf:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(UnknownModelError, match=r"folder has no config\.json"):
        load_model(f"hf:{folder}")
    with pytest.raises(UnknownModelError, match=r"without surgery\.json"):
        load_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_model(str(folder))
    assert capfd.readouterr().err == ""


def test_timm_folder(tmp_path: Path) -> None:
    model = tiny()
    config = {
        "architecture": TINY,
        "num_classes": 5,
        "model_args": {"depth": 1},
        "pretrained_cfg": {**model.pretrained_cfg, "mean": [0.1, 0.2, 0.3], "num_classes": 5},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        loaded, source = load_model(name)
        assert torch.equal(loaded.head.weight, model.head.weight)
        rebuilt = build(source)
        assert list(rebuilt.pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
        rebuilt.load_state_dict(loaded.state_dict(), strict=True, assign=True)


def test_a_model_type_builds_offline() -> None:
    model, source = load_model("hf:mobilevit", pretrained=False, num_classes=4)
    assert (type(model).__name__, source.architecture) == ("MobileViTForImageClassification",) * 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert replace(describe(model), name="hf:mobilevit") == source
