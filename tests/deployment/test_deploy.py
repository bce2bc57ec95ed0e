"""What `deploy` promises of whole models: the same function, still exportable, the original untouched."""

import copy
from typing import Any

import pytest
import torch
from deployed import double, worst
from oracle import outputs, relative_error
from shared_hosts import converted_host
from small_models import vit
from tiny_hosts import CASES
from torch import nn

from armour_surgery import convert, deploy, save
from armour_surgery.copies import full_copy, meta_copy
from armour_surgery.deployment import PASSES
from armour_surgery.deployment.records import DeployedPlace
from armour_surgery.errors import (
    AlreadyDeployedError,
    ArmourError,
    ExampleInputError,
    NothingToDeployError,
    PostconditionError,
    UsageError,
)
from armour_surgery.rewrite import ArmourAttention

PLAIN = ["deit-distilled", "dinov2", "beit", "swin", "levit", "hf-dinov2"]
CONVERTED = ["vit", "levit-conv", "hf-levit", "hf-beit"]


@pytest.mark.parametrize(("name", "converted"), [*((n, False) for n in PLAIN), *((n, True) for n in CONVERTED)])
def test_a_deployed_model_computes_the_same(name: str, converted: bool) -> None:
    model, example = double(name, converted)
    before = copy.deepcopy(model.state_dict())
    deployed = deploy(model, example_input=example)
    assert isinstance(deployed, type(model))
    assert worst(name, model, deployed) < 1e-12
    assert deployed.deployment.error < 1e-12
    assert set(PASSES) - set(deployed.deployment.passes) == {"fold-layer-norm"}
    assert not deployed.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not hasattr(model, "deployment")
    if converted:
        assert deployed.surgery == model.surgery
        assert any(isinstance(module, ArmourAttention) for module in deployed.modules())


def test_in_float32_too() -> None:
    case = CASES["levit"]
    model = case.build()
    deployed = deploy(model, example_input=case.example())
    with torch.no_grad():
        errors = [relative_error(outputs(model, batch), outputs(deployed, batch)) for batch in case.batches()]
    assert max(errors) < 1e-5


def test_in_place_it_is_the_same_object() -> None:
    case = CASES["vit"]
    model = case.build(torch.float64)
    batch = case.batches(torch.float64)[0]
    example = {key: value.double() for key, value in case.example().items()}
    with torch.no_grad():
        expected = outputs(model, batch)
        assert deploy(model, example_input=example, inplace=True) is model
        assert relative_error(expected, outputs(model, batch)) < 1e-12


def test_a_copy_of_a_deployed_model_works_on() -> None:
    model, example = double("levit", False)
    deployed = deploy(model, example_input=example)
    copied = copy.deepcopy(deployed)
    assert copied.deployment == deployed.deployment
    assert worst("levit", model, copied) < 1e-12


def test_without_weights_it_does_the_same_and_compares_nothing() -> None:
    model, example = double("levit", False)
    deployed = deploy(meta_copy(model), example_input=example)
    assert deployed.deployment.error is None
    assert deployed.deployment.done == deploy(model, example_input=example).deployment.done


@pytest.mark.parametrize(("name", "converted"), [("levit", True), ("vit", False)])
def test_it_compiles_and_exports(name: str, converted: bool, tmp_path) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    model = full_copy(converted_host(name)) if converted else case.build()
    model.eval()
    deployed = deploy(model, example_input=case.example())
    batch = case.batches()[1]
    with torch.no_grad():
        expected = outputs(model, batch)
        compiled = torch.compile(deployed, backend="eager", fullgraph=True)
        assert relative_error(expected, outputs(compiled, batch)) < 1e-5
        exported = torch.export.export(deployed, (batch["x"],)).module()
        assert relative_error(expected, [exported(batch["x"])]) < 1e-5


@pytest.mark.parametrize(("name", "converted"), [("levit", True), ("dinov2", False)])
def test_it_exports_to_onnx(name: str, converted: bool, tmp_path) -> None:
    from onnx.reference import ReferenceEvaluator

    case = CASES[name]
    model = (full_copy(converted_host(name)) if converted else case.build()).eval()
    deployed = deploy(model, example_input=case.example())
    batch = case.batches()[1]
    with torch.no_grad():
        expected = outputs(model, batch)
        file = tmp_path / "model.onnx"
        torch.onnx.export(deployed, (batch["x"],), file, dynamo=True, verbose=False)
    found = ReferenceEvaluator(str(file)).run(None, {"x": batch["x"].numpy()})
    assert relative_error(expected, [torch.from_numpy(found[0])]) < 1e-5


@pytest.mark.parametrize("asked", [{"compiled": True}, {"runtime": "compile"}, {"runtime": "onnx"}])
def test_products_stay_as_they_are_written_where_fusing_does_not_pay(asked: dict[str, Any]) -> None:
    model, example = double("levit", False)
    deployed = deploy(model, example_input=example, **asked)
    assert deployed.deployment.compiled is (asked != {"runtime": "onnx"})
    assert deployed.deployment.runtime == asked.get("runtime", "compile")
    assert any("as they are written" in place.reason for place in deployed.deployment.kept)
    assert deployed.deployment.count("fuse-attention") == 0
    assert deployed.deployment.count("fold-batch-norm") > 0
    assert worst("levit", model, deployed) < 1e-12


@pytest.mark.parametrize("name", ["vit", "levit", "hf-beit"])
def test_inside_inference_mode(name: str) -> None:
    """Where a model is used, so with what it cached there."""
    model, example = copy.deepcopy(double(name, False))
    with torch.inference_mode():
        model(**CASES[name].batches(torch.float64)[0])
        deployed = deploy(model, example_input=example)
    assert worst(name, model, deployed) < 1e-12
    assert not any(parameter.is_inference() for parameter in deployed.parameters())


def test_a_library_s_cache_may_be_of_inference_mode() -> None:
    """transformers' BEiT caches its index table for all models, in whatever mode it was made."""
    model, example = copy.deepcopy(double("vit", False))
    with torch.inference_mode():
        cached = torch.tensor(1.0, dtype=torch.float64)
    forward = type(model).forward

    class Cached(type(model)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(self, x * cached)

    model.__class__ = Cached
    assert worst("vit", model, deploy(model, example_input=example)) < 1e-12


def test_what_was_done_is_on_the_model() -> None:
    model, example = double("dinov2", False)
    report = deploy(model, example_input=example, passes=PASSES).deployment
    assert DeployedPlace("fold-layer-scale", "blocks.0.ls1.gamma") in report.done
    assert report.count("fold-layer-norm") == 4
    kept = {(place.name, place.fqn): place.reason for place in report.kept}
    assert "head" in kept["fold-layer-norm", "norm"] or "returns" in kept["fold-layer-norm", "norm"]
    assert "added in one go" in kept["drop-key-bias", "blocks.0.attn"]
    assert report.to_dict()["passes"] == PASSES


def refused(kind: type[ArmourError], action) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def test_what_is_deployed_is_done_with(tmp_path) -> None:
    model, example = double("vit", True)
    deployed = deploy(model, example_input=example)
    again = refused(AlreadyDeployedError, lambda: deploy(deployed, example_input=example))
    assert "comes last" in again
    assert "comes last" in refused(AlreadyDeployedError, lambda: convert(deployed, example_input=example))
    assert "save" in refused(AlreadyDeployedError, lambda: save(deployed, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    deployed.train()
    batch = CASES["vit"].batches(torch.float64)[0]
    assert "does not train" in refused(UsageError, lambda: deployed(**batch))
    deployed.eval()
    assert worst("vit", model, deployed) < 1e-12


def test_passes_are_chosen_by_name() -> None:
    model, example = double("vit", False)
    deployed = deploy(model, example_input=example, passes="fold-layer-norm")
    assert {place.name for place in deployed.deployment.done} == {"fold-layer-norm"}
    unknown = refused(UsageError, lambda: deploy(model, example_input=example, passes=["fold-layernorm"]))
    assert "'fold-layernorm'" in unknown
    assert all(name in unknown for name in PASSES)
    assert "empty" in refused(UsageError, lambda: deploy(model, example_input=example, passes=[]))
    nowhere = refused(UsageError, lambda: deploy(model, example_input=example, runtime="tensorrt"))
    assert "'tensorrt' is none; choose torch, compile, onnx, openvino" in nowhere


def test_nothing_to_do_is_an_error_that_says_why() -> None:
    model, example = double("vit", False)
    message = refused(NothingToDeployError, lambda: deploy(model, example_input=example, passes=["drop-key-bias"]))
    assert "added in one go" in message
    assert "VisionTransformer" in message
    plain = nn.Sequential(nn.Linear(8, 5), nn.ReLU())
    assert "Sequential" in refused(NothingToDeployError, lambda: deploy(plain, example_input=(2, 3, 8, 8)))


def test_an_example_that_does_not_fit_is_refused() -> None:
    model, _ = double("vit", False)
    assert "(2, 5, 32, 32)" in refused(ExampleInputError, lambda: deploy(model, example_input=(2, 5, 32, 32)))


def test_a_model_that_answers_differently_each_time_is_not_handed_out() -> None:
    class Restless(nn.Module):
        """Not a function of its input, which no pass can keep."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.layer(x) * self.calls

    message = refused(PostconditionError, lambda: deploy(Restless(), example_input={"x": torch.empty(2, 6)}))
    assert "Restless" in message
    assert "passes=" in message


def test_trained_weights_answer_the_same() -> None:
    pytest.importorskip("sklearn")
    from armour_surgery.demo.digits_vit import load_digits_vit
    from armour_surgery.images.digits import digits_split

    _, _, images, _ = digits_split()
    for model in (load_digits_vit(), convert(load_digits_vit(), "qv")):
        model.eval()
        deployed = deploy(model, passes=PASSES)
        with torch.no_grad():
            assert relative_error([model(images)], [deployed(images)]) < 1e-5


class Drawing(nn.Module):
    """It draws random numbers in eval mode too, as masked autoencoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = vit(depth=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shown: torch.Tensor = self.inner(x * (torch.rand_like(x[:, :1]) > 0.5))
        return shown


def test_a_model_that_draws_random_numbers_is_compared_on_the_same_ones() -> None:
    model = Drawing().eval()
    torch.manual_seed(1)
    following = torch.rand(3)
    torch.manual_seed(1)
    assert deploy(model, example_input=(2, 3, 32, 32)).deployment.error < 1e-5
    assert torch.equal(torch.rand(3), following)  # the caller's own numbers go on as if nothing had been drawn
