"""What a timm model was built with is known in every version of timm, whoever imported what first."""

import pytest
import timm
from timm import models
from timm.models import _factory

from armour_surgery.hosts.timm import example, source_of
from armour_surgery.plugins import timm_arguments

LEVIT = {"img_size": 64, "embed_dim": (24, 36), "depth": (1, 1), "num_heads": (3, 5), "num_classes": 7}


def test_arguments_that_no_module_shows_are_kept() -> None:
    model = timm.create_model("levit_128s", pretrained=False, **LEVIT)
    told = source_of(model, {}).arguments
    assert told["depth"] == [1, 1]
    assert not {"pretrained", "pretrained_cfg", "cache_dir"} & set(told)
    assert example(model)["x"][0] == (3, 64, 64)
    assert source_of(timm.create_model("levit_128s"), {}).arguments.keys() <= {"drop_path_rate"}


def test_an_armour_model_has_its_caller_s_arguments_too() -> None:
    model = timm.create_model("armour_levit_128s", **LEVIT)
    assert source_of(model, {}).architecture.partition(".")[0] == "levit_128s"
    assert source_of(model, {}).arguments["depth"] == [1, 1]


def test_older_versions_of_timm_keep_nothing_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_factory, "model_entrypoint", models.model_entrypoint)
    monkeypatch.delattr(models, "get_model_traits", raising=False)
    timm_arguments.register()
    model = _factory.model_entrypoint("vit_tiny_patch16_224")(pretrained=False, depth=1)
    assert model._model_args == {"depth": 1}
    assert example(model)["x"][0] == (3, 224, 224)


def test_newer_versions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_factory, "model_entrypoint", models.model_entrypoint)
    monkeypatch.setattr(models, "get_model_traits", dict, raising=False)
    timm_arguments.register()
    assert _factory.model_entrypoint is models.model_entrypoint
