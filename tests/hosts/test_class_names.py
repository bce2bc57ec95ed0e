"""What a model's classes are called: as its library says, or its plan, or as ImageNet's are."""

from dataclasses import replace
from typing import Any

import timm
import transformers
from saved_models import HF
from small_models import surgery_of, vit
from torch import nn

from armour_surgery import convert
from armour_surgery.hosts.class_names import ClassNames, class_names, numbers_by_name

PETS = ("dog", "golden_retriever", "cat")
TIMM: dict[str, Any] = {"img_size": 32, "num_classes": 3}


def named(model: nn.Module) -> ClassNames:
    found = class_names(model)
    assert found is not None
    return found


def labelled(**config: Any) -> nn.Module:
    return timm.create_model("test_vit", **TIMM, pretrained_cfg_overlay=config)


def hf(*names: str) -> nn.Module:
    config = transformers.ViTConfig(**HF, num_labels=len(names))
    config.id2label = dict(enumerate(names))
    return transformers.ViTForImageClassification(config)


def test_timm_has_label_names() -> None:
    for names in (
        PETS,
        list(PETS),
        {2: "cat", 0: "dog", 1: "golden_retriever"},
        {"0": "dog", "1": PETS[1], "2": "cat"},
    ):
        found = named(labelled(label_names=names))
        assert (found.names, found.said) == (PETS, True)
    described = named(labelled(label_names=("n1", "n2", "n3"), label_descriptions={"n1": "dog, hound", "n3": "cat"}))
    assert described.numbers().items() >= {"n1": 0, "dog": 0, "hound": 0, "n2": 1, "cat": 2}.items()
    assert class_names(labelled()) is None
    assert class_names(labelled(label_names={0: "dog", 2: "cat"})) is None


def test_transformers_have_labels_in_their_config() -> None:
    assert named(hf(*PETS)).names == PETS
    assert class_names(hf("LABEL_0", "LABEL_1", "LABEL_2")) is None
    assert named(convert(hf(*PETS))).names == PETS


def test_names_of_another_head_do_not_count() -> None:
    model = labelled(label_names=PETS)
    model.reset_classifier(4)  # type: ignore[operator]
    assert class_names(model) is None


def test_a_plan_has_names_where_a_library_has_no_place_for_them() -> None:
    model = convert(vit())
    assert class_names(model) is None
    model.surgery = replace(surgery_of(model), classes=("a", "b", "c", "d", "e"))  # type: ignore[assignment]
    assert named(model).names == ("a", "b", "c", "d", "e")


def test_a_thousand_classes_may_be_those_of_imagenet() -> None:
    found = named(timm.create_model("test_vit"))
    assert (found.names[0], found.said) == ("n01440764", False)
    numbers = found.numbers()
    assert (numbers["tench"], numbers["golden retriever"], numbers["tench, Tinca tinca"]) == (0, 207, 0)
    assert "crane" not in numbers  # the bird and the machine


def test_labels_of_imagenet_are_known_by_their_synsets_too() -> None:
    imagenet = named(timm.create_model("test_vit"))
    described = [others[0] for others in imagenet.others]
    found = named(hf(*described))
    assert (found.names[:1], found.said) == (("tench, Tinca tinca",), True)
    assert found.numbers()["n01440764"] == 0
    assert found.numbers()["n03126707"] == 517
    # As many names in another order are no such labels.
    assert "n01440764" not in named(hf(*reversed(described))).numbers()


def test_spelling_differs_and_what_two_classes_share_means_none() -> None:
    numbers = ClassNames(("Golden Retriever", "cat", "Cat"), (("dog",), (), ("dog",)), True).numbers()
    assert numbers == {"golden retriever": 0, "Golden Retriever": 0, "cat": 1, "Cat": 2}
    assert numbers_by_name([("a_b",), ("a-b",)]) == {"a_b": 0, "a-b": 1}
