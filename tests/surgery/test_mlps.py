"""MLPs with fewer hidden channels: exact where nothing is lost, within the goal, and carried everywhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import outputs, relative_error
from small_models import refused
from tiny_hosts import CASES
from torch import nn

from armour_surgery import convert, deploy, export, load, save, sensitivities
from armour_surgery.copies import full_copy
from armour_surgery.discover.mlps import find_mlps
from armour_surgery.errors import NothingToConvertError, PatternError, SchemaError, UsageError
from armour_surgery.initialize import reconstruct
from armour_surgery.measure.cost import count_params
from armour_surgery.notes import ArmourWarning
from armour_surgery.rewrite.edits import apply_edits, tensor_named
from armour_surgery.surgery.mlps import edits_of, params_per_channel
from armour_surgery.surgery.order import params_goal
from armour_surgery.surgery.perform import surgery_of

HOSTS = ["vit", "swin", "levit", "levit-conv", "hf-vit", "hf-dinov2"]


def _images(name: str, count: int = 9) -> list[torch.Tensor]:
    torch.manual_seed(1)
    shape = next(iter(CASES[name].batches()[0].values())).shape[1:]
    return [torch.randn(8, *shape) for _ in range(count)]


def _narrowed(name: str, goal: str | None = "-12%", **options: Any) -> tuple[nn.Module, nn.Module]:
    case = CASES[name]
    model = case.build()
    options.setdefault("mlp", True)
    armour = convert(
        model, init="calibrated", calibration=_images(name), params=goal, example_input=case.batches()[0], **options
    )
    return model, armour


@pytest.fixture(scope="module")
def narrow_vit() -> tuple[nn.Module, nn.Module]:
    return _narrowed("vit")


@pytest.mark.parametrize("name", [*HOSTS, "beit", "deit-distilled"])
def test_channels_that_are_read_with_zeros_can_go(name: str) -> None:
    """The oracle: where the second layer reads nothing of a channel, the model without it computes the same."""
    case = CASES[name]
    model = case.build(torch.float64)
    narrow = full_copy(model)
    example = case.batches(torch.float64)[0]
    for mlp in find_mlps(model, example):
        kept = sorted(torch.randperm(mlp.hidden)[: mlp.hidden - 11].tolist())
        gone = sorted(set(range(mlp.hidden)) - set(kept))
        for one in (model, narrow):
            with torch.no_grad():
                tensor_named(one, f"{mlp.second}.weight")[:, gone] = 0
        before = count_params(narrow)
        apply_edits(narrow, edits_of(mlp, kept))
        assert before - count_params(narrow) == 11 * params_per_channel(model, mlp)
    assert {mlp.hidden for mlp in find_mlps(narrow, example)}.isdisjoint(
        mlp.hidden for mlp in find_mlps(model, example)
    )
    for batch in case.batches(torch.float64):
        with torch.no_grad():
            assert relative_error(outputs(model, batch), outputs(narrow, batch)) < 1e-12


@pytest.mark.parametrize("name", HOSTS)
def test_the_goal_is_reached_and_everything_carries_it(name: str, tmp_path: Path) -> None:
    # Of what lies after the last pooling, the few images show too little.
    model, armour = _narrowed(name, exclude="stages.1.downsample*" if name == "levit-conv" else ())
    surgery = surgery_of(armour)
    assert surgery.mlps
    assert count_params(armour) == surgery.params_after <= 0.88 * count_params(model)
    assert surgery.params_goal == round(0.88 * count_params(model))
    saved = sum(site.params_before - site.params_after for site in (*surgery.sites, *surgery.mlps))
    assert saved == surgery.params_before - surgery.params_after
    assert surgery.macs_after < surgery.macs_before
    assert all(mlp.hidden_after % 8 == 0 and 0 <= mlp.residual < 1 for mlp in surgery.mlps)
    assert surgery.chosen(surgery.frontier).measured == surgery.loss
    batch = CASES[name].batches()[1]
    with torch.no_grad():
        expected = outputs(armour.eval(), batch)
    again = armour
    if not name.startswith("levit"):  # these are made by their class, and nothing could build them again
        save(armour, tmp_path / "out")
        again = load(tmp_path / "out")
        assert again.surgery == surgery
        assert all(torch.equal(one, other) for one, other in zip(outputs(again, batch), expected, strict=True))
    with torch.no_grad():
        deployed = outputs(deploy(again, example_input=CASES[name].example()), batch)
        assert relative_error(expected, deployed) < 1e-4


@pytest.mark.parametrize("format", ["compat", "timm", "pt2"])
def test_it_is_exported(format: str, narrow_vit: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    told = export(
        narrow_vit[1], tmp_path / ("m.pt2" if format == "pt2" else "m"), format=format, images=_images("vit", 1)
    )
    assert told.max_relative_error < 1e-5


def test_in_place_is_the_same_and_the_original_stays(narrow_vit: tuple[nn.Module, nn.Module]) -> None:
    model, armour = narrow_vit
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own, converted = _narrowed("vit", inplace=True)
    assert converted is own
    assert surgery_of(own).mlps == surgery_of(armour).mlps
    for name, tensor in armour.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_patterns_are_about_mlps_too() -> None:
    model, armour = _narrowed("vit", "-4%", include="blocks.1.mlp")
    surgery = surgery_of(armour)
    assert surgery.sites == ()
    assert [mlp.fqn for mlp in surgery.mlps] == ["blocks.1.mlp"]
    for name, tensor in model.state_dict().items():
        if not name.startswith("blocks.1.mlp"):
            assert torch.equal(armour.state_dict()[name], tensor)
    # Without `mlp` there is nothing of that name.
    message = refused(PatternError, lambda: _narrowed("vit", "-4%", include="blocks.1.mlp", mlp=False))
    assert "'blocks.1.mlp' matches none of the 2 attention sites" in message


def test_several_sizes_cost_one_measurement(narrow_vit: tuple[nn.Module, nn.Module]) -> None:
    model, armour = narrow_vit
    example = CASES["vit"].batches()[0]
    found = sensitivities(model, calibration=_images("vit"), mlp=True, example_input=example)
    assert tuple(found) == surgery_of(armour).sensitivities
    told: list[str] = []
    _, again = _narrowed("vit", measured=found, progress=lambda what, done, count: told.append(what))
    assert surgery_of(again) == surgery_of(armour)
    assert not any("measuring" in what for what in told)
    for lacking in ("mlp", "attn"):
        some = [one for one in found if lacking not in one.fqn]
        message = refused(UsageError, lambda some=some: _narrowed("vit", measured=some))  # type: ignore[misc]
        assert f"measured has nothing of blocks.0.{lacking}" in message
    _narrowed("vit", "-8%", measured=[one for one in found if one.fqn != "blocks.1.mlp"])


def test_what_was_measured_serves_a_given_rank() -> None:
    found = sensitivities(CASES["vit"].build(), calibration=_images("vit"), example_input=CASES["vit"].batches()[0])
    for measured in (None, found):
        _, armour = _narrowed("vit", "-3%", mlp=False, rank=8, measured=measured)
        assert {site.rank for site in surgery_of(armour).sites} == {8}
    _, again = _narrowed("vit", "-3%", mlp=False, rank=8, measured=surgery_of(armour).sensitivities)
    assert surgery_of(again) == surgery_of(armour)


def test_without_weights_mlps_keep_what_they_have() -> None:
    model = CASES["vit"].build().to("meta")
    armour = convert(model, init="calibrated", params="-12%", mlp=True, example_input=CASES["vit"].example())
    assert surgery_of(armour).sites
    assert surgery_of(armour).mlps == ()


def test_a_loss_is_a_goal_too() -> None:
    _, armour = _narrowed("vit", None, max_loss=0.05)
    assert surgery_of(armour).mlps
    assert surgery_of(armour).loss <= 0.05


def test_an_mlp_of_which_too_little_is_seen_stays_and_is_told() -> None:
    case = CASES["levit"]
    with pytest.warns(ArmourWarning, match=r"downsample.mlp.* keep all hidden channels: .* fewer tokens"):
        armour = convert(
            case.build(), init="calibrated", calibration=_images("levit", 2), params="-4%", mlp=True,
            example_input=case.batches()[0],
        )  # fmt: skip
    assert "stages.1.downsample.mlp" not in [mlp.fqn for mlp in surgery_of(armour).mlps]


def test_a_host_without_such_mlps_is_told_of() -> None:
    with pytest.warns(ArmourWarning, match="mlp found no MLP in SegformerModel that can have fewer channels"):
        armour = _narrowed("hf-segformer", "-3%")[1]
    assert surgery_of(armour).mlps == ()
    assert surgery_of(armour).sites


def test_more_than_there_is_to_save_is_refused() -> None:
    message = refused(NothingToConvertError, lambda: _narrowed("vit", "-90%"))
    assert "params asks for" in message
    assert message.endswith("or add rank='auto' (--rank auto), with which more can go")
    everything = refused(NothingToConvertError, lambda: _narrowed("vit", "-99%", rank="auto"))
    assert everything.endswith("Ask for a number between these")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mlp": True, "init": "calibrated"}, "mlp needs a goal"),
        ({"params": "-5%", "max_loss": 0.1, "init": "calibrated"}, "are two goals"),
        ({"measured": [], "init": "calibrated"}, "measured is for a goal"),
        ({"params": "-5%"}, "params needs images to measure with"),
        ({"params": "5%", "init": "calibrated"}, "params '5%' is no size"),
        ({"params": 0, "init": "calibrated"}, "params 0 is no size"),
        ({"params": "-100%", "init": "calibrated"}, "'-100%' is no size"),
    ],
)
def test_goals_that_make_no_sense(options: dict[str, Any], told: str) -> None:
    assert told in refused(UsageError, lambda: convert(CASES["vit"].build(), **options))


@pytest.mark.parametrize(
    ("given", "goal"),
    [("-15%", 850), ("-2.5 %", 975), ("700", 700), (700, 700), ("0.5k", 500), ("18M", 18_000_000), ("1.2g", 1.2e9)],
)
def test_sizes_as_people_write_them(given: object, goal: float) -> None:
    assert params_goal(given, 1000) == goal


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [("blocks.0.mlp", "blocks.9.mlp", "no such mlp"), ('"hidden_before": 192', '"hidden_before": 184', "it has 192")],
)
def test_a_plan_that_does_not_fit_is_refused(
    old: str, new: str, told: str, narrow_vit: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    save(narrow_vit[1], tmp_path / "out")
    path = tmp_path / "out" / "surgery.json"
    text = path.read_text(encoding="utf-8")
    assert old in text
    start, _, end = text.partition('"mlps"')
    path.write_text(f'{start}"mlps"{end.replace(old, new, 1)}', encoding="utf-8")
    assert told in refused(SchemaError, lambda: load(tmp_path / "out"))


def test_steps_by_gradient_move_narrowed_mlps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spied(before: nn.Module, after: nn.Module, units: list[str], weights: list[nn.Parameter], *rest: Any) -> Any:
        start = [weight.detach().clone() for weight in weights]
        first, least = reconstruct(before, after, units, weights, *rest)
        moved = [not torch.equal(weight, value) for weight, value in zip(weights, start, strict=True)]
        names = {id(weight): name for name, weight in after.named_parameters()}
        seen.update(units=units, names=[names[id(weight)] for weight in weights], moved=moved, better=least < first)
        return first, least

    monkeypatch.setattr("armour_surgery.surgery.new_weights.reconstruct", spied)
    _, armour = _narrowed("vit", "-8%", include="*.mlp", reconstruct=4)
    mlps = surgery_of(armour).mlps
    assert mlps
    assert seen["units"] == [mlp.fqn.rpartition(".")[0] for mlp in mlps]
    assert sorted(seen["names"]) == sorted(
        f"{mlp.fqn}.{layer}.{kind}" for mlp in mlps for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    )
    # Worse weights are not kept, and then nothing is said to have moved.
    assert all(moved == seen["better"] for moved in seen["moved"])
    assert all(("reconstruction" in mlp.steps) == seen["better"] for mlp in mlps)
