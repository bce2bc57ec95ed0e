"""Models of no library: a folder has the surgery and the weights, and a fresh model of the user's gets both."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from own_attentions import PerHead
from small_models import refused
from torch import nn

from armour_surgery import convert, load, save
from armour_surgery.errors import AlreadyConvertedError, FolderError, KeyMismatchError, SchemaError, UsageError
from armour_surgery.saving.any_model import OwnModels, load_any
from armour_surgery.surgery.perform import surgery_of

IMAGES = torch.randn(3, 3, 8, 12)


class Own(nn.Module):
    def __init__(self, classes: int = 5, attention: type[nn.Module] = PerHead) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 20, 4, 4)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.inner = attention()
        self.head = nn.Linear(20, classes)
        self.tied = nn.Linear(20, classes)
        self.tied.weight = self.head.weight

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = (x + self.inner(x)).mean(1) * self.scale
        return self.head(x) + self.tied(x)


class Packed(timm.models.VisionTransformer):
    """A user's own class that derives from a library's."""

    def __init__(self) -> None:
        super().__init__(img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=5)


def converted(mode: str = "auto") -> nn.Module:
    return convert(Own(), mode, example_input=IMAGES).eval()


def same(first: nn.Module, second: nn.Module) -> bool:
    return torch.equal(first(IMAGES), second(IMAGES)) and torch.equal(first(IMAGES[:1]), second(IMAGES[:1]))


def test_the_surgery_is_done_again_on_a_fresh_model(tmp_path: Path) -> None:
    model = converted()
    folder = save(model, tmp_path / "out")
    fresh = Own().train()
    assert load(folder, into=fresh) is fresh
    assert same(model, fresh)
    assert not fresh.training
    assert fresh.tied.weight is fresh.head.weight
    assert surgery_of(fresh).sites == surgery_of(model).sites
    assert surgery_of(fresh).example == (("image", (3, 3, 8, 12), "float32"),)
    assert same(copy.deepcopy(fresh), model)
    # It is trained and saved on.
    fresh.train()(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in fresh.parameters())
    assert same(load(save(fresh, tmp_path / "again"), into=Own()), model)
    with torch.device("meta"):
        empty = Own()
    message = refused(KeyMismatchError, lambda: load(folder, into=empty))
    assert "scale" in message  # which is in no file


def test_the_folder_says_that_no_library_made_it_and_what_to_do(tmp_path: Path) -> None:
    folder = save(converted(), tmp_path / "out")
    message = refused(FolderError, lambda: load(folder))
    assert "holds a Own (Own), which no library can build" in message
    assert "into=Own()" in message
    assert "--into FILE.py:CALLABLE" in message
    card = (folder / "README.md").read_text()
    assert 'load("out", into=Own())' in card
    assert str(tmp_path) not in card + (folder / "surgery.json").read_text()
    refused(UsageError, lambda: save(converted(), tmp_path / "other", model_args={"depth": 3}))
    assert not (tmp_path / "other").exists()


def test_a_model_that_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    folder = save(converted(), tmp_path / "out")

    class Other(PerHead):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bar(self.foo(x)[..., :12])

    wrong = [(Own(7), KeyMismatchError, r"head.weight \(5, 20\) instead of \(7, 20\).*a model like the one"),
             (Own(attention=Other), SchemaError, "does not fit the Own that was passed as into"),
             (nn.Linear(3, 3), SchemaError, "does not fit the Linear that was passed as into")]  # fmt: skip
    for model, kind, message in wrong:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(kind, match=message):
            load(folder, into=model)
        assert not hasattr(model, "surgery")
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    refused(AlreadyConvertedError, lambda: load(folder, into=converted()))
    assert "has to be a model: a fresh one" in refused(UsageError, lambda: load(folder, into=Own))  # type: ignore[arg-type]
    assert "wrapper" in refused(UsageError, lambda: load(folder, into=nn.DataParallel(Own())))


def test_a_library_s_model_may_be_loaded_into_as_well(tmp_path: Path) -> None:
    def host() -> nn.Module:
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=(8, 12), patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=5
        )

    model = convert(host()).eval()
    fresh = host().double()
    assert same(load(save(model, tmp_path / "out"), into=fresh), model)


def test_a_class_that_derives_from_a_library_s_is_the_user_s(tmp_path: Path) -> None:
    model = convert(Packed()).eval()
    folder = save(model, tmp_path / "out")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(load(folder, into=Packed())(x), model(x))
    assert "Packed" in refused(FolderError, lambda: load(folder))


def test_weights_keep_their_type_and_go_where_the_model_is(tmp_path: Path) -> None:
    model = converted().bfloat16()
    fresh = load(save(model, tmp_path / "out"), into=Own().bfloat16())
    x = IMAGES.bfloat16()
    assert torch.equal(fresh(x), model(x))


def test_nothing_that_a_folder_names_is_called_by_itself(tmp_path: Path) -> None:
    folder = str(save(converted(), tmp_path / "out"))
    message = refused(UsageError, lambda: load_any(folder))
    assert "only you have its code" in message
    assert "--into PATH/FILE.py:Own" in message
    own = OwnModels(into=("a.py:X", "b.py:X"))
    assert "none of --into a.py:X, b.py:X is that" in refused(UsageError, lambda: load_any(folder, own=own))
