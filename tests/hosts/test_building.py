"""A host is described and built again as the same model, and a folder builds nothing else."""

import json

import pytest
import timm
import torch
import torchvision
import transformers
from named_hosts import SMALL, TINY, swin, tiny
from torch import nn

from armour_surgery.errors import ExampleInputError, FolderError, SchemaError, UsageError
from armour_surgery.hosts import build, describe, example_input
from armour_surgery.records import Source


def clip() -> nn.Module:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=SMALL, text_config=text))


def mixed(attention: dict[str, str]) -> nn.Module:
    model = clip()
    model.set_attn_implementation(attention)
    return model


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
    "hf-clip-text-eager": lambda: mixed({"text_config": "eager"}),
    "hf-clip-image-eager": lambda: mixed({"": "eager", "vision_config": "eager", "text_config": "sdpa"}),
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


def attentions(model: nn.Module) -> dict[str, str]:
    """What every module of a model of transformers is told to compute attention with."""
    configs = {name: getattr(module, "config", None) for name, module in model.named_modules()}
    return {name: getattr(config, "_attn_implementation", "") for name, config in configs.items()}


@pytest.mark.parametrize("host", HOSTS)
def test_a_rebuilt_host_is_the_same_model(host: str) -> None:
    model = HOSTS[host]()
    source = describe(model)
    assert json.loads(json.dumps(source.arguments, allow_nan=False)) == source.arguments
    rebuilt = build(source)
    assert all(parameter.is_meta for parameter in rebuilt.parameters())
    assert not any(buffer.is_meta for buffer in rebuilt.buffers())
    assert {n: type(m) for n, m in rebuilt.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    assert attentions(rebuilt) == attentions(model)
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


def test_a_host_is_built_that_tries_itself_out() -> None:
    """timm's hybrids run their backbone to see what comes out of it, which has to be where its weights are."""
    arguments = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32}
    built = build(Source("timm", "vit_base_resnet26d_224", arguments))
    assert all(parameter.is_meta for parameter in built.parameters())
    assert not any(buffer.is_meta for buffer in built.buffers())


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
