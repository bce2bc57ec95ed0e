"""--model-kwargs: arguments of a library's builders, as literals, kept and built with again."""

from pathlib import Path

import pytest
import timm
import torch
from named_hosts import TINY, swin
from timm.models import VisionTransformer

from armour_surgery import convert, load, save
from armour_surgery.errors import UsageError
from armour_surgery.hosts import build, load_model
from armour_surgery.hosts.arguments import read_arguments


def test_values_are_literals_of_python_or_text() -> None:
    written = ["a=3", "b=1e-4", "c=(2, 3)", "d=None", "e=avg", "f='3'", "g=x=y", "h= True", "i={'k': [1]}", "j="]
    expected = {"a": 3, "b": 1e-4, "c": [2, 3], "d": None, "e": "avg", "f": "3", "g": "x=y", "h": True}
    assert read_arguments(written) == {**expected, "i": {"k": [1]}, "j": ""}
    for wrong, message in (
        (["depth"], "is not KEY=VALUE"),
        (["=3"], "is not KEY=VALUE"),
        (["a b=3"], "is not KEY=VALUE"),
        (["a=1", "a=2"], "names 'a' twice"),
        (["a={1, 2}"], "and not this value"),
        (["a=1e999"], "and not this value"),
        (["a=b'x'"], "and not this value"),
    ):
        with pytest.raises(UsageError, match=message):
            read_arguments(wrong)


def test_timm_builds_with_them_and_a_saved_folder_says_them(tmp_path: Path) -> None:
    given = read_arguments(["depth=1", "embed_dim=24", "num_heads=3", "img_size=(32, 48)", "global_pool=avg"])
    model, source = load_model("vit_tiny_patch16_224", pretrained=False, num_classes=5, arguments=given)
    assert isinstance(model, VisionTransformer)
    assert (len(model.blocks), model.embed_dim, model.patch_embed.img_size) == (1, 24, (32, 48))
    assert given.items() <= source.arguments.items()
    armour = convert(model, source=source)
    loaded = load(save(armour, str(tmp_path / "out")))
    x = torch.randn(2, 3, 32, 48)
    assert torch.equal(loaded(x), armour.eval()(x))
    assert len(timm.create_model("vit_tiny_patch16_224").blocks) == 12


def test_torchvision_and_transformers_build_with_them() -> None:
    model, source = load_model("torchvision:squeezenet1_0", pretrained=False, arguments={"dropout": 0.25})
    assert model.classifier[0].p == 0.25  # type: ignore[index,union-attr]
    assert source.arguments == {"dropout": 0.25}
    small = {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 3], "window_size": 4}
    model, source = load_model("hf:swin", pretrained=False, img_size=32, num_classes=3, arguments=small)
    # What a config computes of its entries follows them.
    assert (model.config.hidden_size, model.classifier.out_features) == (24, 3)  # type: ignore[union-attr]
    assert [tuple(p.shape) for p in build(source).parameters()] == [tuple(p.shape) for p in model.parameters()]


def test_transformers_folders_take_them(tmp_path: Path) -> None:
    folder = str(tmp_path / "swin")
    swin().save_pretrained(folder)
    model, source = load_model(f"hf:{folder}", arguments={"layer_norm_eps": 1e-3})
    assert model.config.layer_norm_eps == source.arguments["layer_norm_eps"] == 1e-3


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (TINY, {"foo": 1}, r"takes no foo; leave --model-kwargs foo=\.\.\. out"),
        (TINY, {"pretrained": True}, "name 'pretrained'.*--checkpoint FILE"),
        (TINY, {"checkpoint_path": "/x"}, "without files or the network"),
        (TINY, {"device": "cpu"}, "is about weights or where they lie"),
        (TINY, {"num_classes": 3}, "--model-kwargs num_classes=3 and --num-classes say it twice"),
        ("torchvision:vit_b_16", {"foo": 1}, r"takes no foo; leave --model-kwargs foo=\.\.\. out"),
        ("torchvision:vit_b_16", {"weights": "DEFAULT"}, "is about weights"),
        ("hf:vit", {"foo": 1}, "config of its type has no foo; leave"),
        ("hf:vit", {"num_labels": 3}, "use --num-classes"),
    ],
)
def test_what_a_builder_does_not_take_is_told(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(name, pretrained=False, num_classes=5, arguments=arguments)
