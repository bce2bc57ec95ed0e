"""`--num-classes 0` is a model without a head, of every library that has such, also out of weights that have one."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from command_line import good
from named_hosts import SMALL
from saved_models import same
from torch import nn

from armour_surgery import convert, load, save
from armour_surgery.errors import CheckpointError, UsageError
from armour_surgery.hosts import features, load_model
from armour_surgery.hosts.running import has_no_head, head_size

TIMM: dict[str, dict[str, Any]] = {
    "test_vit": {"img_size": 32},
    "levit_128s": {"img_size": 64, "embed_dim": [24, 36], "depth": [1, 1], "num_heads": [3, 5], "key_dim": 8},
    "deit_tiny_distilled_patch16_224": {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]},
}


def headless(name: str, **options: Any) -> tuple[nn.Module, Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, source = load_model(name, num_classes=0, **options)
    assert has_no_head(model)
    assert head_size(model) == 0
    return model, source, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", TIMM)
def test_timm_leaves_the_head_of_a_file_aside(name: str, tmp_path: Path) -> None:
    whole = timm.create_model(name, num_classes=5, **TIMM[name]).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    model, source, (said,) = headless(name, checkpoint=tmp_path / "w.pth", arguments=TIMM[name])
    assert "left head" in said
    assert said.endswith("aside")
    images = torch.randn(2, 3, *whole.pretrained_cfg["input_size"][1:])  # type: ignore[index]
    if "img_size" in TIMM[name]:
        images = images[..., : TIMM[name]["img_size"], : TIMM[name]["img_size"]]
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), whole.forward_features(images))  # type: ignore[operator]
    assert features(model, {"x": images})[1] is None
    converted = convert(model, source=source)
    assert same(converted, load(save(converted, tmp_path / "out")))


def test_what_is_no_head_is_still_left_over(tmp_path: Path) -> None:
    weights = timm.create_model("test_vit", num_classes=5, img_size=32).state_dict()
    torch.save({**weights, "blocks.0.ls9.gamma": torch.ones(64)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"left over blocks\.0\.ls9\.gamma"):
        load_model("test_vit", num_classes=0, img_size=32, checkpoint=tmp_path / "w.pth")
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="head for 5 classes: pass --num-classes 5"):
        load_model("test_vit", img_size=32, checkpoint=tmp_path / "w.pth")


def test_transformers_leave_the_head_aside_too(tmp_path: Path) -> None:
    host = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=5)).eval()
    host.save_pretrained(tmp_path / "hf")
    torch.save(host.state_dict(), tmp_path / "w.pth")
    for options in ({}, {"checkpoint": tmp_path / "w.pth"}):
        model, source, said = headless(f"hf:{tmp_path / 'hf'}", **options)
        assert said == (
            [f"checkpoint {tmp_path / 'w.pth'}: left classifier.bias, classifier.weight aside"] * len(options)
        )
        assert type(model) is type(host)
        images = {"pixel_values": torch.randn(2, 3, 32, 32)}
        with torch.no_grad():
            ours, logits = features(model, images)
            assert torch.equal(ours, features(host, images)[0])
        assert logits is None
        converted = convert(model, source=source)
        assert same(converted, load(save(converted, tmp_path / "out")))
    body = transformers.ViTModel(transformers.ViTConfig(**SMALL))
    body.save_pretrained(tmp_path / "body")
    assert type(load_model(f"hf:{tmp_path / 'body'}", num_classes=0)[0]) is transformers.ViTModel


def test_who_has_no_such_form_says_so() -> None:
    with pytest.raises(UsageError, match="torchvision's vit_b_16 has no form without a head; leave --num-classes 0"):
        load_model("torchvision:vit_b_16", pretrained=False, num_classes=0)
    with pytest.raises(UsageError, match="SiglipForImageClassification of hf:siglip has no form without a head"):
        load_model("hf:siglip", pretrained=False, num_classes=0)


@pytest.mark.usefixtures("short_turns")
def test_every_command_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_vit", num_classes=5, img_size=32).state_dict(), "w.pth")
    sizes = ["--num-classes", "0", "--img-size", "32", "--checkpoint", "w.pth"]
    good("inspect", "test_vit", *sizes)
    good("convert", "test_vit", *sizes, "--out", "armour")
    good("bench", "armour", "--vs", "test_vit", *sizes, "--rounds", "2", "--budget", "0.1", "--json")
    quick = ["data.batch_size=4", "data.images_per_epoch=4", "data.holdout=4", "schedule.epochs=1"]
    settings = [word for one in quick for word in ("--set", one)]
    taught = good("finetune", "armour", "--recipe", "recover", *settings, "--out", "back")
    assert "taught by the original, test_vit" in taught.stdout
    assert load("back").num_classes == 0
