"""A part of a model, converted by itself and put back: the whole is saved and loaded, in its own names."""

import copy
from pathlib import Path

import pytest
import timm
import torch
import transformers
from own_attentions import PerHead
from torch import nn

from armour_surgery import convert, deploy, load, save
from armour_surgery.errors import AlreadyConvertedError, AlreadyDeployedError, SchemaError
from armour_surgery.measure.cost import count_params
from armour_surgery.notes import ArmourWarning
from armour_surgery.surgery.perform import surgery_of

IMAGES, WORDS = torch.randn(2, 3, 8, 8), torch.zeros(2, 5, dtype=torch.int64)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=20, depth=2, num_heads=2, num_classes=0
        )
        self.words = nn.Embedding(11, 20)
        self.mixer = PerHead()

    def forward(self, pictures: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.mixer(self.words(ids) + self.model.vision_tower(pictures)[:, None])  # type: ignore[operator]


def test_a_tower_is_put_back_and_saved_with_the_whole(tmp_path: Path) -> None:
    whole = Whole().eval()
    before = count_params(whole)
    whole.model.vision_tower = convert(whole.model.vision_tower, include="blocks.1*")  # type: ignore[arg-type]
    fresh = load(save(whole, tmp_path / "out"), into=Whole())
    assert torch.equal(fresh(IMAGES, WORDS), whole(IMAGES, WORDS))
    plan = surgery_of(fresh)
    assert plan == surgery_of(whole).__class__.from_dict(plan.to_dict())
    assert [site.fqn for site in plan.sites] == ["model.vision_tower.blocks.1.attn"]
    assert [part.fqn for part in plan.parts] == ["model.vision_tower"]
    assert (plan.params_before, plan.params_after) == (before, count_params(fresh))
    with pytest.raises(AlreadyConvertedError):
        convert(fresh, example_input={"pictures": IMAGES, "ids": WORDS})
    # Saved again, it is what it was.
    again = load(save(copy.deepcopy(fresh), tmp_path / "again"), into=Whole())
    assert torch.equal(again(IMAGES, WORDS), whole(IMAGES, WORDS))


def test_several_parts_and_an_attention_itself(tmp_path: Path) -> None:
    whole = Whole().eval()
    whole.model.vision_tower = convert(whole.model.vision_tower, "kv")  # type: ignore[arg-type]
    whole.mixer = convert(whole.mixer, "qv", example_input=torch.empty(2, 5, 20))  # type: ignore[assignment]
    fresh = load(save(whole, tmp_path / "out"), into=Whole())
    assert torch.equal(fresh(IMAGES, WORDS), whole(IMAGES, WORDS))
    plan = surgery_of(fresh)
    assert {site.fqn: site.mode for site in plan.sites} == {
        "mixer": "qv",
        "model.vision_tower.blocks.0.attn": "kv",
        "model.vision_tower.blocks.1.attn": "kv",
    }
    assert (plan.mode, plan.init) == ("auto", "wq")
    other = Whole()
    other.mixer = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(SchemaError):
        load(tmp_path / "out", into=other)


def test_a_part_that_is_deployed_is_not_saved(tmp_path: Path) -> None:
    whole = Whole().eval()
    whole.model.vision_tower = deploy(convert(whole.model.vision_tower))  # type: ignore[arg-type]
    with pytest.raises(AlreadyDeployedError):
        save(whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inplace", [False, True])
def test_the_tower_of_a_library_s_model(tmp_path: Path, inplace: bool) -> None:
    config = transformers.ViTConfig(
        hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    whole = transformers.ViTForImageClassification(config).eval()
    with pytest.warns(ArmourWarning, match="If it is a part of a model, put it back and save the whole"):
        whole.vit = convert(whole.vit, inplace=inplace)  # built without a pooler, which it does not show
    loaded = load(save(whole, tmp_path / "out"))
    assert torch.equal(loaded(IMAGES).logits, whole(IMAGES).logits)
    # Not to be taken for a plain one by transformers itself; marked once, though model and part may share a config.
    assert loaded.config.model_type == "armour_vit"
