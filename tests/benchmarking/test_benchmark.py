"""`bench`: intervals that keep their promise, models treated alike, and what is written about it."""

import copy
import csv
import io
import json
import os
import subprocess
import sys
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import command_line
import pytest
import timm
import torch
from command_line import failed
from PIL import Image
from rich.console import Console  # noqa: TID251
from timm.models import save_for_hf
from tiny_hosts import case
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from armour_surgery import benchmark, convert, save
from armour_surgery.benchmarking import benchmark as benchmarking
from armour_surgery.benchmarking import environment as surroundings
from armour_surgery.benchmarking import intervals, operators, speed
from armour_surgery.benchmarking.figure import speed_figure
from armour_surgery.benchmarking.files import markdown
from armour_surgery.benchmarking.intervals import FASTER, NO_DIFFERENCE, SLOWER, TOO_FEW, median_interval, verdict
from armour_surgery.benchmarking.memory import held_bytes, peak_growth
from armour_surgery.benchmarking.operators import OperatorTime, Profile, side_by_side
from armour_surgery.benchmarking.speed import compare
from armour_surgery.cli.bench import bench
from armour_surgery.cli.bench_tables import model_table, pair_table, size_table
from armour_surgery.errors import BenchmarkError, UsageError
from armour_surgery.measure.cost import count_macs, count_params
from armour_surgery.saving.any_model import load_any

ARGUMENTS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 1,
    "num_heads": 4,
    "num_classes": 6,
}
MIB = 2**20
QUICK = ("--rounds", "2", "--budget", "0.1", "--batch-size", "3")


def vit(**changes: Any) -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**ARGUMENTS, **changes})
    return model.eval()


quick = partial(benchmark, batch_sizes=(3,), rounds=2, budget_s=0.1)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns and profiles of these models are as good when they are short."""
    monkeypatch.setattr(speed, "_TURN_S", 0.002)
    monkeypatch.setattr(operators, "_SECONDS", 0.02)


# Intervals


def ratios(rounds: int, generator: torch.Generator) -> list[float]:
    """Around a true 1.07: rounds that are alike for a while, a drift, and one in eight hit by somebody else's work."""
    steps = torch.randn(rounds, generator=generator)
    logs = [float(steps[0])]
    for step in steps[1:].tolist():
        logs.append(0.8 * logs[-1] + 0.6 * step)
    hits = (torch.rand(rounds, generator=generator) < 0.125) * torch.randn(rounds, generator=generator)
    drift = torch.linspace(-0.01, 0.01, rounds)
    found = 0.015 * torch.tensor(logs) + 0.02 * torch.randn(rounds, generator=generator) + 0.3 * hits + drift
    return (1.07 * found.exp()).tolist()


def kept_promises(rounds: int) -> tuple[float, float, float]:
    """Of 100 pairs of runs: how often an interval holds the truth, two overlap, and one holds the other's median."""
    generator = torch.Generator().manual_seed(7)
    true = overlap = inside = 0.0
    for _ in range(100):
        runs = [ratios(rounds, generator) for _ in range(2)]
        (low, high), (other_low, other_high) = ends = [median_interval(run) or (0.0, 0.0) for run in runs]
        medians = [float(torch.tensor(run).quantile(0.5)) for run in runs]
        true += sum(a <= 1.07 <= b for a, b in ends) / 2
        overlap += low <= other_high and other_low <= high
        inside += (low <= medians[1] <= high) / 2 + (other_low <= medians[0] <= other_high) / 2
    return true / 100, overlap / 100, inside / 100


@pytest.mark.parametrize("rounds", [40, 100])
def test_two_runs_agree_nine_times_out_of_ten(rounds: int) -> None:
    true, overlap, inside = kept_promises(rounds)
    assert true >= 0.96
    assert overlap >= 0.98
    assert inside >= 0.9


def test_rounds_taken_for_independent_would_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_BLOCKS", 30)
    assert kept_promises(60)[2] < 0.9


def test_an_interval_depends_on_the_ratios_alone() -> None:
    found = ratios(60, torch.Generator().manual_seed(1))
    low, high = median_interval(found) or (0.0, 0.0)
    assert median_interval(found) == (low, high)
    assert low < float(torch.tensor(found).quantile(0.5)) < high
    assert median_interval([1 / ratio for ratio in found]) == pytest.approx((1 / high, 1 / low))
    assert median_interval([1.5] * 12) == pytest.approx((1.5, 1.5))
    assert median_interval([1.5] * 10) is None


def test_the_quantile_of_student() -> None:
    # From the table in every textbook, at 99.5 %.
    for freedom, value in ((5, 4.032), (7, 3.499), (10, 3.169), (30, 2.750)):
        assert intervals._student(0.995, freedom) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("speedup", "interval", "noise", "said"),
    [
        (1.07, (1.05, 1.09), (0.99, 1.01), FASTER),
        (0.93, (0.91, 0.95), (0.99, 1.01), SLOWER),
        (1.07, (0.99, 1.16), (0.99, 1.01), NO_DIFFERENCE),
        (1.07, (1.05, 1.09), (0.99, 1.08), NO_DIFFERENCE),
        (1.07, (1.05, 1.09), (0.92, 1.01), NO_DIFFERENCE),
        (0.93, (0.91, 0.95), (0.99, 1.08), NO_DIFFERENCE),
        (1.07, None, (0.99, 1.01), TOO_FEW),
        (1.07, (1.05, 1.09), None, TOO_FEW),
    ],
)
def test_a_difference_inside_the_noise_is_not_called(speedup: float, interval: Any, noise: Any, said: str) -> None:
    assert verdict(speedup, interval, noise) == said


# Rounds


def test_each_model_follows_every_other_and_itself_as_often() -> None:
    log: list[str] = []
    clock = [0.0]

    def model(name: str, _: Tensor) -> None:
        clock[0] += 1
        log.append(name)

    shares: list[float] = []
    compare(
        {name: partial(model, name) for name in "abc"},
        lambda: torch.zeros(1, 1),
        rounds=60,
        budget_s=10**6,
        clock=lambda: clock[0],
        before_block=shares.append,
    )
    timed = "".join(log[-180:])
    follows = [first + second for first, second in zip(timed, timed[1:], strict=False)]
    assert all(9 <= follows.count(name * 2) <= 10 for name in "abc")
    assert all(19 <= follows.count(pair) <= 30 for pair in ("ab", "ba", "bc", "cb", "ca", "ac"))
    assert {name: timed[::3].count(name) for name in "abc"} == dict.fromkeys("abc", 20)
    assert shares[0] == 0
    assert 14 <= len(shares) <= 16


def test_a_fast_model_is_called_until_its_turn_is_over() -> None:
    clock, calls = [0.0], []

    def model(_: Tensor) -> None:
        clock[0] += 0.0004 * (1 + len(calls) % 5 // 4)
        calls.append(1)

    report = compare({"a": model, "b": model}, lambda: torch.zeros(2, 1), rounds=4, clock=lambda: clock[0])
    assert len(calls) - report.warmup_calls == 4 * 2 * 5
    # The slow call of a turn moves the percentile, and neither median.
    assert report.models[0].latency_ms == pytest.approx(0.4)
    assert report.models[0].p90_ms == pytest.approx(0.8)
    assert report.pairs[0].speedup == pytest.approx(1)


def test_there_must_be_time() -> None:
    with pytest.raises(UsageError, match="more than 0 seconds, and it is 0"):
        compare({"a": print}, lambda: torch.zeros(1), budget_s=0)


# Memory


def test_what_a_model_holds_counts_shared_memory_once() -> None:
    module = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 10, bias=False))
    module[2].weight = nn.Parameter(module[0].weight.data.view(10, 20))
    assert held_bytes(module) == 4 * (200 + 20 + 4 * 20) + 8


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_the_peak_of_a_call_is_what_it_took_on_top() -> None:
    kept = torch.ones(20 * MIB // 4)

    def call() -> float:
        return float((kept + 1).sum())

    call()
    grown = peak_growth(call, torch.device("cpu"))
    assert grown is not None
    assert 19 * MIB < grown < 24 * MIB
    assert (peak_growth(lambda: None, torch.device("cpu")) or 0) < MIB
    assert peak_growth(call, torch.device("meta")) is None


# Surroundings


def test_the_environment_is_recorded_and_names_no_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = json.loads(json.dumps(surroundings.environment().to_dict()))
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert {"timm", "transformers", "armour_surgery", "load"} <= found.keys()
    if hasattr(os, "sched_getaffinity"):
        assert found["affinity"] == sorted(os.sched_getaffinity(0))
    assert str(Path.home()) not in json.dumps(found)
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists():
        words = ("git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD")
        head = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        assert found["commit"].removesuffix("-dirty") == head
    monkeypatch.setattr(surroundings, "_CHECKOUT", tmp_path)
    assert surroundings.environment().commit is None


# Models


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


class Spy(nn.Module):
    """Notes what it is called with, and where its weights are; takes `seconds`."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 4)
        self.norm = nn.BatchNorm1d(4)
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        if not image.is_meta:
            place = self.layer.weight.data_ptr()
            self.seen.append((tuple(image.shape), image.dtype, self.training, place, torch.get_num_threads()))
        result: Tensor = self.norm(self.layer(image.mean((1, 2))))
        return result


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
    assert len([line for line in lines if line.startswith(f" {name} ")]) == 2
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


# The command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`tiny`, and `armour` converted from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmarking, "keep_memory", lambda: True)  # it would be for the whole suite
    save_for_hf(vit(), "tiny", model_args=ARGUMENTS, safe_serialization=True)
    model, source = load_any("local-dir:tiny")
    save(convert(model, "qv", source=source), "armour")
    return tmp_path


document = partial(command_line.document, "bench")


def bad(*arguments: str, code: int = 2) -> str:
    return failed("bench", *arguments, code=code).stderr


def test_a_folder_against_its_original_in_every_format(here: Path) -> None:
    files = [word for name in ("s.json", "s.csv", "s.md", "s.png", "s.svg") for word in ("--out", name)]
    found = document("local-dir:tiny", "--vs", "armour", "--vs", "armour", "--profile", *QUICK, *files)
    assert list(found) == [
        "environment", "settings", "batch_size", "models", "pairs", "noise", "batches", "profile",
    ]  # fmt: skip
    assert [one["name"] for one in found["models"]] == ["local-dir:tiny", "armour", "armour (2)"]
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [
        ("local-dir:tiny", "armour"), ("local-dir:tiny", "armour (2)"),
    ]  # fmt: skip
    assert found["models"][1]["params"] < found["models"][0]["params"]
    assert json.loads(Path("s.json").read_text()) == found
    with Path("s.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["name"], row["batch_size"]) for row in rows[:2]] == [("local-dir:tiny", "1"), ("armour", "1")]
    assert float(rows[4]["speedup"]) == found["pairs"][0]["speedup"]
    assert (rows[3]["speedup"], rows[4]["verdict"]) == ("", TOO_FEW)
    text = Path("s.md").read_text()
    assert "| armour over local-dir:tiny | fp32, eager | 3 |" in text
    assert "aten::addmm" in text
    with Image.open("s.png") as picture:
        assert picture.width > 800
    assert "<svg" in Path("s.svg").read_text()


def test_tables_fit_a_terminal(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = command_line.good("bench", "local-dir:tiny", "--vs", "armour", "--profile", *QUICK, "--out", "s.md")
    assert max(map(len, result.stdout.splitlines())) <= 80
    flat = " ".join(result.stdout.split())
    for part in ("images/s", "p90", "99 % interval", "a copy of itself", TOO_FEW, "aten::addmm", "Written: s.md"):
        assert part in flat
    assert "…" not in result.stdout.partition("Where the time goes")[0]


def test_what_cannot_be_done_is_said_before_anything_is_timed(here: Path) -> None:
    assert "no format for 's.txt'; name a file that ends in .json, .csv, .md" in bad("armour", "--out", "s.txt")
    assert "is not a folder" in bad("armour", "--out", "nowhere/s.md", code=1)
    assert "dtype 'int8' is none of fp32, bf16, fp16" in bad("armour", "--dtype", "int8")
    assert "device 'tpu' cannot be used here" in bad("armour", "--device", "tpu")
    assert "rounds must be an even number" in bad("armour", "--rounds", "5")
    assert "more than 0 seconds" in bad("armour", "--budget", "0")
    assert "did you mean deit_tiny" in bad("armour", "--vs", "deit_tinny_patch16_224", code=1)


def test_an_interrupted_run_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(path.name for path in here.iterdir())
    monkeypatch.setattr(benchmarking, "compare", interrupted)
    assert "interrupted; nothing was left half-written" in bad("armour", "--out", "s.csv", "--out", "s.png", code=1)
    assert sorted(path.name for path in here.iterdir()) == before


def test_help_names_every_option_and_the_defaults_are_those_of_python() -> None:
    text = command_line.good("bench", "--help").stdout
    for option in ("--vs", "--device", "--dtype", "--batch-size", "--compile", "--deploy", "--profile", "--rounds",
                   "--budget", "--threads", "--out", "--no-pretrained", "--json"):  # fmt: skip
        assert option in text
    command, python = (signature(one).parameters for one in (bench, benchmark))
    assert command["rounds"].default == python["rounds"].default
    assert command["budget"].default == python["budget_s"].default


def test_the_figure_has_a_dot_for_each_model() -> None:
    figure = speed_figure(["a$", "b"], [2_000_000, 1_000_000], [100.0, 110.0], [None, (105.0, 115.0)], "where")
    (axes,) = figure.axes
    lines = [line.get_xydata().tolist() for line in axes.get_lines()]  # type: ignore[union-attr]
    assert lines == [[[2.0, 100.0]], [[1.0, 105.0], [1.0, 115.0]], [[1.0, 110.0]]]
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 115


def test_markdown_of_several_benchmarks_has_one_table_of_pairs() -> None:
    found = [quick({"a|b": Spy()}, example_input=(2, 3, 5, 8), dtype=dtype) for dtype in ("fp32", "bf16")]
    text = markdown(found)
    assert text.count("| comparison |") == 1
    assert "| a\\|b again over a\\|b | bf16, eager | 3 |" in text
