"""What is exported loads where it is meant for, computes the same, and has no projection of V in it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import timm
import torch
import transformers
from saved_models import armour
from small_models import Own, refused, vit
from torch import nn

from armour_surgery import convert, export
from armour_surgery.errors import ExportError, FolderError, NotOursError, UsageError
from armour_surgery.exporting import formats
from armour_surgery.measure.difference import largest_difference
from armour_surgery.notes import ArmourWarning

IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def products(path: Path) -> int:
    """How many products with a matrix of weights a graph has."""
    graph = onnx.load(path).graph
    held = {tensor.name for tensor in graph.initializer}
    return sum(node.op_type in ("MatMul", "Gemm") and node.input[1] in held for node in graph.node)


def answers(model: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(images)
    return found


@pytest.fixture(scope="module")
def split() -> nn.Module:
    """Q, K and V from a layer each, so that products can be counted."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 3, "num_labels": 5}
    config = transformers.ViTConfig(**sizes, intermediate_size=28, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def graphs(split: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, formats.Exported]:
    """The split model before and after, in every format of a graph."""
    folder = tmp_path_factory.mktemp("graphs")
    converted = convert(split, "qv")
    made = {"before": export(split, folder / "before.onnx", format="onnx")}
    for format, ending in (("onnx", ".onnx"), ("openvino", ".xml"), ("pt2", ".pt2")):
        made[format] = export(converted, folder / f"after{ending}", format=format, name="split")
    made["deployed"] = export(converted, folder / "deployed.onnx", format="onnx", deploy=True)
    made["int8"] = export(converted, folder / "int8.onnx", format="onnx", int8=True)
    return made


def test_what_is_told(graphs: dict[str, formats.Exported]) -> None:
    for name, told in graphs.items():
        out = Path(told.out)
        files = [out] + ([out.with_suffix(".bin")] if name == "openvino" else [])
        assert told.bytes == sum(file.stat().st_size for file in files)
        assert (told.max_relative_error < 1e-5) == (name != "int8")
        assert told.checked_with.split()[0] == {"openvino": "openvino", "pt2": "torch"}.get(name, "onnxruntime")
        assert set(told.to_dict()) == {"model", "format", "out", "bytes", "max_relative_error", "checked_with"}
    assert graphs["pt2"].max_relative_error == 0
    assert graphs["int8"].max_relative_error < 0.2
    assert graphs["int8"].bytes < 0.8 * graphs["onnx"].bytes


def test_the_projection_of_v_is_in_no_graph(graphs: dict[str, formats.Exported]) -> None:
    before, after = products(Path(graphs["before"].out)), products(Path(graphs["onnx"].out))
    assert before - after == 1
    assert products(Path(graphs["deployed"].out)) == after
    kinds = Counter(node.get_type_name() for node in openvino.Core().read_model(graphs["openvino"].out).get_ops())
    whole = Counter(node.op_type for node in onnx.load(graphs["onnx"].out).graph.node)
    assert kinds["MatMul"] == whole["MatMul"] + whole["Gemm"]
    linears = [node for node in torch.export.load(graphs["pt2"].out).graph.nodes if "linear" in str(node.target)]
    assert len(linears) == after


def test_any_batch_in_every_runtime(split: nn.Module, graphs: dict[str, formats.Exported]) -> None:
    wanted = convert(split, "qv")(IMAGES).logits.detach()
    session = onnxruntime.InferenceSession(graphs["onnx"].out, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": IMAGES.numpy()})
    assert largest_difference([wanted], [torch.from_numpy(logits)]) < 1e-4
    # Where the processor has it, bf16 is what OpenVINO takes by itself.
    single = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(graphs["openvino"].out, "CPU", single)
    (logits,) = compiled({"pixel_values": IMAGES.numpy()}).values()
    assert largest_difference([wanted], [torch.from_numpy(np.array(logits))]) < 1e-4
    found = torch.export.load(graphs["pt2"].out).module()(pixel_values=IMAGES)
    assert torch.equal(found["logits"], wanted)


def test_files_say_where_they_come_from(graphs: dict[str, formats.Exported]) -> None:
    held = {entry.key: entry.value for entry in onnx.load(graphs["deployed"].out).metadata_props}
    origin = json.loads(held["armour_surgery"])
    assert (origin["mode"], origin["init"], origin["deployed"]) == ("qv", "wq", True)
    extra = {"armour_surgery.json": ""}
    torch.export.load(graphs["pt2"].out, extra_files=extra)
    assert json.loads(extra["armour_surgery.json"])["model"] == "split"
    told = openvino.Core().read_model(graphs["openvino"].out).get_rt_info("armour_surgery").astype(str)
    assert json.loads(told)["class"].endswith("ViTForImageClassification")


def test_other_image_sizes_where_the_model_takes_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = convert(vit(dynamic_img_size=True, depth=1), "qv")
    export(model, tmp_path / "any.onnx", format="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "any.onnx", providers=["CPUExecutionProvider"])
    for size in ((40, 24), (56, 56)):
        images = torch.randn(2, 3, *size)
        (found,) = session.run(None, {"x": images.numpy()})
        assert largest_difference([answers(model, images)], [torch.from_numpy(found)]) < 1e-4


def test_compat_of_timm_loads_as_any_other_folder(tmp_path: Path) -> None:
    converted = armour("vit")
    told = export(converted, tmp_path / "out", format="compat")
    assert told.checked_with.startswith("timm ")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert largest_difference([answers(converted)], [answers(model)]) < 1e-6
    assert 'timm.create_model("local-dir:FOLDER", pretrained=True)' in (tmp_path / "out/README.md").read_text()
    assert told.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    export(converted, tmp_path / "out", format="compat")  # an earlier one is replaced


def test_compat_of_transformers_loads_with_its_processor(tmp_path: Path) -> None:
    converted = armour("hf-vit")
    export(converted, tmp_path / "out", format="compat")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(model) is transformers.ViTForImageClassification
    with torch.no_grad():
        assert largest_difference([converted(IMAGES).logits], [model(IMAGES).logits]) < 1e-6
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor(np.zeros((50, 40, 3), np.uint8), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_compat_of_a_user_class(tmp_path: Path) -> None:
    converted = convert(Own().eval(), example_input=(2, 3, 32, 32))
    export(converted, tmp_path / "out", format="compat", into=Own())
    assert "load_state_dict" in (tmp_path / "out/README.md").read_text()


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    converted = armour("vit").train()
    before = {key: tensor.clone() for key, tensor in converted.state_dict().items()}
    export(converted, tmp_path / "m.pt2", format="pt2", deploy=True)
    assert converted.training
    assert all(torch.equal(before[key], tensor) for key, tensor in converted.state_dict().items())


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        ("m.onnx", {"format": "tflite"}, "'tflite' is none; choose timm, hf, compat, onnx, openvino, pt2"),
        ("m.bin", {"format": "onnx"}, "ends in .onnx"),
        ("m.pt2", {"format": "pt2", "int8": True}, "--int8 is for --format onnx, not for pt2"),
        ("m", {"format": "compat", "deploy": True}, "--deploy is for"),
        ("m", {"format": "timm", "remote_code": True}, "--remote-code is for --format hf, not for timm"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    path: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert said in refused(UsageError, lambda: export(vit(), tmp_path / path, **options))
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    refused(NotOursError, lambda: export(armour("vit"), tmp_path / "out", format="compat"))
    refused(FolderError, lambda: export(armour("vit"), tmp_path / "no/m.onnx", format="onnx"))
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


def test_what_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats._NEAR, "pt2", -1.0)
    (tmp_path / "m.pt2").write_bytes(b"earlier")
    message = refused(ExportError, lambda: export(armour("vit"), tmp_path / "m.pt2", format="pt2"))
    assert "differ by" in message
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("m.pt2", b"earlier")]


class Counting(nn.Module):
    """Its forward depends on what is in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = vit(depth=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out * int(x.sum().item() > 0)


def test_a_forward_that_cannot_be_followed_is_told(tmp_path: Path) -> None:
    model = convert(Counting().eval(), example_input=torch.randn(2, 3, 32, 32))
    message = refused(ExportError, lambda: export(model, tmp_path / "m.pt2", format="pt2"))
    assert "torch could not follow Counting into torch.export" in message
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(ExportError, lambda: export(vit(depth=1), tmp_path / "m.onnx", format="onnx"))
    assert "pip install 'armour-surgery[onnx]'" in message


def test_a_fixed_gauge_in_8_bits_is_warned_of_with_the_measured_error(tmp_path: Path) -> None:
    fixed = convert(vit(depth=1), "qv", gauge="fixed")
    with pytest.warns(ArmourWarning, match=r"8 bits count for more: outputs differ by (\d[\d.e-]*) in all") as told:
        written = export(fixed, tmp_path / "m.onnx", format="onnx", int8=True)
    assert f"differ by {written.max_relative_error:.2g} in all" in str(told[0].message)


def test_a_fixed_gauge_is_exported_as_it_is(tmp_path: Path) -> None:
    fixed = convert(vit(depth=1), "kv", gauge="fixed")
    for name, options in (("m.onnx", {"format": "onnx", "deploy": True}), ("m.pt2", {"format": "pt2"})):
        assert export(fixed, tmp_path / name, **options).max_relative_error < 1e-5
