"""The folders that `save` writes are what timm and transformers load, and what no class without the surgery loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from saved_models import FILES, HF, HOSTS, armour, host, outputs
from small_models import refused, surgery_of
from torch import nn

from armour_surgery import convert, load, save
from armour_surgery.errors import ModelError

TIMM_HOSTS = sorted(name for name in HOSTS if not name.startswith("hf-"))
# Attention that is not fused is a choice of the one who loads, which no config carries.
HF_HOSTS = sorted(name for name in HOSTS if name.startswith("hf-") and name != "hf-vit-eager")

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))


@pytest.mark.parametrize("name", TIMM_HOSTS)
def test_timm_creates_it(name: str, tmp_path: Path) -> None:
    folder = save(armour(name), tmp_path / "out")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(model) is type(armour(name))
    assert equal(model, armour(name))
    data = timm.data.resolve_model_data_config(model)
    # As in timm's own folders: the size of images that the model takes, not what its original was trained with.
    size = (3, 64, 64) if name.startswith("levit") else (3, 32, 32)
    assert data == {**timm.data.resolve_model_data_config(armour(name)), "input_size": size}
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert tuple(told["pretrained_cfg"]["mean"]) == data["mean"]
    assert "url" not in told["pretrained_cfg"]


@pytest.mark.parametrize("name", HF_HOSTS)
def test_transformers_loads_it(name: str, tmp_path: Path) -> None:
    folder = save(armour(name), tmp_path / "out")
    kind = type(armour(name))
    classifies = kind.__name__.endswith("ForImageClassification")
    auto: Any = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
    model, told = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    assert type(model) is kind
    assert equal(model.eval(), armour(name))
    assert equal(load(folder), armour(name))
    transformers.AutoImageProcessor.from_pretrained(folder)
    with pytest.raises(RuntimeError, match="mismatched"):
        kind.from_pretrained(folder)


# Hosts whose own way to draw weights names the projections of their attention, or draws what is in no file.
DRAWING: dict[str, tuple[str, dict[str, Any]]] = {
    "names v_proj, and torch's attention with keys for values": ("Siglip", {"config": "SiglipVisionConfig", **HF}),
    "fills buffers": (
        "Swinv2",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    ),
}


@pytest.mark.parametrize("why", DRAWING)
def test_hosts_that_draw_weights_by_name(why: str, tmp_path: Path) -> None:
    kind, entries = DRAWING[why]
    entries = dict(entries)
    config = getattr(transformers, entries.pop("config", f"{kind}Config"))(**entries)
    torch.manual_seed(0)
    converted = convert(transformers.AutoModel.from_config(config).eval())
    save(converted, tmp_path / "out")
    assert equal(transformers.AutoModel.from_pretrained(tmp_path / "out").eval(), converted)


def test_another_head_and_no_weights_as_timm_has_them(tmp_path: Path) -> None:
    converted: Any = armour("vit")
    name = f"local-dir:{save(converted, tmp_path / 'out')}"
    other = timm.create_model(name, pretrained=True, num_classes=7).eval()
    assert other(IMAGES).shape == (3, 7)
    assert torch.equal(other.blocks[0].attn.qkv.weight, converted.blocks[0].attn.qkv.weight)
    fresh = timm.create_model(name, drop_path_rate=0.1)
    assert fresh.state_dict().keys() == converted.state_dict().keys()
    assert not torch.equal(fresh.blocks[0].attn.qkv.weight, converted.blocks[0].attn.qkv.weight)
    message = refused(ModelError, lambda: timm.create_model(name, pretrained=True, mlp_ratio=2.0))
    assert "does not fit the arguments {'mlp_ratio': 2.0}" in message


def test_what_was_loaded_is_saved_again(tmp_path: Path) -> None:
    name = f"local-dir:{save(armour('vit'), tmp_path / 'out')}"
    again = timm.create_model(name, pretrained=True).eval()
    assert equal(load(save(again, tmp_path / "again")), armour("vit"))
    assert surgery_of(again) == surgery_of(load(tmp_path / "again"))


def test_the_name_of_folders_needs_one() -> None:
    assert "what a saved folder holds" in refused(ModelError, lambda: timm.create_model("armour_surgery_folder"))


def test_a_config_of_an_earlier_model_goes_and_the_users_own_stays(tmp_path: Path) -> None:
    out = save(armour("hf-vit"), tmp_path / "out")
    assert (out / "preprocessor_config.json").is_file()
    save(armour("vit"), out)
    assert sorted(path.name for path in out.iterdir()) == FILES
    own = convert(nn.Sequential(host("vit").blocks[0]), example_input=torch.empty(2, 17, 48))
    save(own, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(set(FILES) - {"config.json"})
    (out / "config.json").write_text('{"mine": 1}')
    save(own, out)
    assert (out / "config.json").read_text() == '{"mine": 1}'
