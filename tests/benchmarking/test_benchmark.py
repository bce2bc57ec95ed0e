"""Every model of a benchmark is treated alike, and what does not run is named."""

import copy
import io
import json
from functools import partial
from typing import Any

import pytest
import torch
from quick_benchmarks import MIB, Spy, quick, vit
from rich.console import Console  # noqa: TID251
from tiny_hosts import case
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from armour_surgery import benchmark, convert
from armour_surgery.benchmarking import benchmark as benchmarking
from armour_surgery.benchmarking.intervals import FASTER, NO_DIFFERENCE, SLOWER, TOO_FEW
from armour_surgery.benchmarking.operators import OperatorTime, Profile, side_by_side
from armour_surgery.cli.bench_tables import model_table, pair_table, size_table
from armour_surgery.errors import BenchmarkError, ExampleInputError, UsageError
from armour_surgery.measure.cost import count_macs, count_params

pytestmark = pytest.mark.usefixtures("short_turns")


def test_what_is_measured_has_the_contracts_keys() -> None:
    host = vit()
    converted = convert(host, "qv")
    found = benchmark({"host": host, "qv": converted}, batch_sizes=(3, 2), rounds=12, budget_s=60.0)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["environment"]["device"] == "cpu"
    assert data["batch_size"] == 3
    assert [one["name"] for one in data["models"]] == ["host", "qv"]
    for one, model in zip(data["models"], (host, converted), strict=True):
        assert one["params"] == count_params(model)
        assert one["macs"] == count_macs(model, {"x": torch.empty(1, 3, 32, 32)}).macs
        assert one.keys() >= {"images_per_s", "latency_ms", "p90_ms", "peak_mib"}
        assert one["latency_ms"] <= one["p90_ms"]
        assert one["peak_mib"] is None or one["peak_mib"] > 4 * one["params"] / MIB
    (pair,) = data["pairs"]
    assert (pair["a"], pair["b"]) == ("host", "qv")
    assert pair["speedup_iqr"][0] <= pair["speedup"] <= pair["speedup_iqr"][1]
    assert pair["speedup_interval"][0] <= pair["speedup"] <= pair["speedup_interval"][1]
    assert pair["verdict"] in (FASTER, SLOWER, NO_DIFFERENCE)
    assert pair["rounds"] == data["noise"]["rounds"] == 12
    assert (data["noise"]["a"], data["noise"]["b"]) == ("host", "host again")
    assert [batch["batch_size"] for batch in data["batches"]] == [1, 2, 3]
    assert data["batches"][2]["pairs"] == data["pairs"]
    assert data["models"][0]["latency_ms"] == data["batches"][0]["models"][0]["latency_ms"]


def test_every_model_gets_the_same_treatment_and_weights_move() -> None:
    one, kept = Spy().train(), Spy()
    before = copy.deepcopy(kept.state_dict())
    options = {"dtype": "bf16", "example_input": (2, 3, 5, 8), "threads": 1, "rounds": 8, "budget_s": 9.0}
    found = quick({"one": one}, inplace=True, **options)
    quick({"kept": kept}, **options)
    shapes, dtypes, training, places, threads = map(set, zip(*one.seen, strict=True))
    assert shapes == {(1, 3, 5, 8), (3, 3, 5, 8)}
    assert (dtypes, training, threads) == ({torch.bfloat16}, {False}, {1})
    assert len(places) > 3
    assert found.settings.dtype == "bf16"
    assert found.batches[0].pairs == ()
    assert not kept.seen
    assert kept.training
    assert all(torch.equal(before[key], value) for key, value in kept.state_dict().items())


def test_moved_weights_are_the_same_and_what_shares_memory_still_does() -> None:
    model = vit()
    model.head.weight = nn.Parameter(model.blocks[0].attn.qkv.weight[:6])  # type: ignore[union-attr, index]
    model.register_buffer("strided", torch.arange(12.0).view(3, 4).t())
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    benchmarking._move_weights(model)
    after = model.state_dict()
    assert torch.equal(model(images), expected)
    assert not [name for name, value in after.items() if value.data_ptr() == before[name] and value.numel() > 1]
    assert model.strided.stride() == (1, 4)  # type: ignore[operator]
    assert after["head.weight"].data_ptr() == after["blocks.0.attn.qkv.weight"].data_ptr()


def test_models_of_other_libraries_and_sizes_stand_side_by_side() -> None:
    library = ViTModel(ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
                                 image_size=48, patch_size=8))  # fmt: skip
    found = quick({"timm": vit(), "hf": library.eval(), "timm again": vit()})
    assert [cost.name for cost in found.costs] == ["timm", "hf", "timm again"]
    assert found.largest.noise.b == "timm again again"
    assert found.costs[1].macs > 1.5 * found.costs[0].macs
    assert found.largest.pairs[1].speedup_interval is None
    assert found.largest.verdict(found.largest.pairs[1]) == TOO_FEW


def test_what_a_host_keeps_in_another_type_goes() -> None:
    model = case("levit").build()
    with torch.no_grad():
        model(**case("levit").batches()[0])
    assert any(module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache"))
    assert quick({"levit": model}, dtype="bf16", example_input=case("levit").example()).settings.dtype == "bf16"


def test_where_the_time_goes() -> None:
    found = quick({"vit": vit()}, profile=True)
    (profile,) = found.profiles
    times = {one.name: one for one in profile.operators}
    assert times["aten::addmm"].calls == 5  # qkv, projection, two layers of the MLP, head
    assert list(times.values()) == sorted(times.values(), key=lambda one: -one.self_ms)
    assert profile.total_ms == pytest.approx(sum(one.self_ms for one in times.values()))
    assert found.to_dict()["profile"][0]["operators"][0].keys() == {"name", "self_ms", "calls"}


def test_operators_before_and_after_share_rows() -> None:
    before = Profile("a", 4, (OperatorTime("mm", 5.0, 1), OperatorTime("add", 2.0, 3), OperatorTime("cat", 1.0, 1)))
    after = Profile("b", 4, (OperatorTime("mm", 4.0, 1), OperatorTime("fused", 3.0, 1)))
    assert side_by_side([before, after], 2) == [
        ("mm", [5.0, 4.0]), ("fused", [0.0, 3.0]), ("2 others", [3.0, 0.0]), ("all", [8.0, 7.0]),
    ]  # fmt: skip
    assert [name for name, _ in side_by_side([after], 2)] == ["mm", "fused", "all"]


class Plain(nn.Module):
    """An image to four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.layer(image.mean((1, 2)))
        return result


class Moody(Spy):
    """Fails in one way or another."""

    def forward(self, image: Tensor) -> Tensor:
        if not image.is_meta and image.dtype is not torch.float32:
            raise RuntimeError("not implemented for 'Half'")
        if len(image) > 2 and not image.is_meta:
            raise MemoryError("out of memory")
        return super().forward(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp16"}, "moody does not run on cpu in fp16, batch size 1: .*'Half'; take fp32"),
        ({}, "moody does not run on cpu in fp32, batch size 3: MemoryError: out of memory; a smaller batch"),
    ],
)
def test_a_model_that_does_not_run_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        quick({"fine": Spy(), "moody": Moody()}, example_input=(2, 3, 5, 8), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": (4, 0)}, "batch size must be 1 or more, not 0"),
        ({"dtype": "fp8"}, "dtype 'fp8' is none of fp32, bf16, fp16"),
        ({"device": "tpu"}, "device 'tpu' cannot be used here"),
        ({"threads": 0}, "threads must be 1 or more, not 0"),
        ({"rounds": 3}, "rounds must be an even number"),
    ],
)
def test_what_is_never_right(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quick({"spy": Spy()}, example_input=(2, 3, 5, 8), **options)
    with pytest.raises(UsageError, match="no model"):
        quick({})


def test_every_model_is_compiled_for_its_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        sizes.extend(one.shape[0] for one in inputs if one.ndim == 4)
        return graph.forward

    # Generating code takes half a minute; it is torch's.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    name = "deit_base_patch16_224"
    found = quick({name: Plain(), "two": Plain()}, compile=True, example_input=(2, 3, 5, 8), rounds=8)
    assert found.settings.compiled
    # Numbers, not symbols; at most once for each of three models, so moving the weights compiles nothing again.
    assert set(sizes) == {1, 3}
    assert max(sizes.count(1), sizes.count(3)) <= 3
    for batch in found.batches:
        assert all(batch.compile_s[key] > 0 for key in (name, "two", f"{name} again"))
    # The tables are widest then, and still leave room for a name and all headers.
    told = io.StringIO()
    for table in (size_table(found), model_table(found), pair_table(found)):
        Console(file=told, width=80).print(table)
    lines = told.getvalue().splitlines()
    assert len([line for line in lines if line.startswith(f"{name} ")]) == 2
    assert "compile, s" in told.getvalue()
    assert "…" not in told.getvalue()


def test_a_model_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    message = "plain does not compile and run on cpu in fp32, batch size 1: .*no compiler here.*leave compiling out"
    with pytest.raises(BenchmarkError, match=message):
        quick({"plain": Plain()}, compile=True, example_input=(2, 3, 5, 8))


def test_deployed_models() -> None:
    pytest.importorskip("armour_surgery.deployment")
    model = case("levit").build()
    sample = case("levit").example()
    found = quick({"levit": model, "armour": convert(model, example_input=sample)}, deploy=True, example_input=sample)
    assert found.settings.deployed
    assert found.costs[0].params < count_params(model)
    assert found.costs[1].params < found.costs[0].params


def test_what_is_not_known_of_a_model_is_what_the_first_one_takes() -> None:
    unknown = nn.Sequential(nn.Conv2d(3, 5, 7), nn.Flatten(), nn.Linear(5 * 26 * 26, 6))
    measured = quick({"known": vit(), "own": unknown})
    assert [cost.name for cost in measured.costs] == ["known", "own"]
    with pytest.raises(ExampleInputError, match="its input is not known"):
        quick({"own": unknown, "known": vit()})


@pytest.mark.parametrize(("runtime", "said"), [("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")])
def test_other_runtimes_take_turns_like_torch(runtime: str, said: str) -> None:
    model = vit()
    measured = quick({"stock": model, "armour": convert(model, "qv")}, runtime=runtime, batch_sizes=(3,), deploy=True)
    assert (measured.settings.runtime, measured.settings.ran) == (runtime, said)
    assert [batch.batch_size for batch in measured.batches] == [1, 3]
    assert all(speed.images_per_s > 0 for batch in measured.batches for speed in batch.models)
    assert measured.to_dict()["settings"]["runtime"] == runtime


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runtime": "tflite"}, "runtime 'tflite' is none; choose torch, compile, onnx, openvino"),
        ({"runtime": "onnx", "compile": True}, "compile is for torch"),
        ({"runtime": "onnx", "profile": True}, "profile is for torch"),
        ({"runtime": "openvino", "dtype": "bf16"}, "timed on cpu in fp32, not on cpu in bf16"),
    ],
)
def test_what_a_runtime_does_not_do_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        quick({"stock": vit()}, **options)


def test_compile_is_a_runtime_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def keep(model: nn.Module, **_: Any) -> nn.Module:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", keep)
    assert quick({"stock": vit()}, runtime="compile").settings.compiled
    assert compiled
