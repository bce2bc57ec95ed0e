"""What is saved comes back the same, to the last bit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from saved_models import HF, HOSTS, PLAN, WEIGHTS, armour, host, outputs, same
from small_models import refused
from torch import nn

from armour_surgery import convert, load, save
from armour_surgery.errors import FolderError
from armour_surgery.hosts import example_input


@pytest.mark.parametrize("name", HOSTS)
def test_a_model_comes_back_bit_identical(name: str, tmp_path: Path) -> None:
    converted = armour(name)
    assert save(converted, tmp_path / "out") == tmp_path / "out"
    again = load(tmp_path / "out")
    assert same(converted, again)
    assert isinstance(again, type(HOSTS[name]()))
    assert not again.training
    assert again.surgery.sites == converted.surgery.sites  # type: ignore[union-attr]
    assert again.surgery.source is not None  # type: ignore[union-attr]
    trained = [name for name, parameter in converted.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in again.named_parameters() if parameter.requires_grad] == trained


@pytest.mark.parametrize("name", ["vit", "hf-vit"])
def test_loaded_tensors_are_aligned_and_one_image_gets_the_same_bits(name: str, tmp_path: Path) -> None:
    """In the file they stand side by side, and memory that is not aligned gets kernels that sum in another order."""
    converted = armour(name).eval()
    save(converted, tmp_path / "out")
    again = load(tmp_path / "out")
    assert {tensor.data_ptr() % 64 for tensor in again.state_dict().values() if tensor.numel()} == {0}
    assert all(map(torch.equal, outputs(again, 1), outputs(converted, 1)))


@pytest.mark.parametrize("name", ["vit", "eva02", "beit", "hf-vit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_comes_back_bit_identical(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    converted = armour(name).to(dtype)
    save(converted, tmp_path / "out")
    again = load(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert {n: b.dtype for n, b in again.named_buffers()} == {n: b.dtype for n, b in converted.named_buffers()}
    assert same(converted, again)


def test_a_half_precision_model_is_converted_and_comes_back(tmp_path: Path) -> None:
    converted = convert(host("eva02").to(torch.bfloat16))
    save(converted, tmp_path / "out")
    assert same(converted, load(tmp_path / "out"))


FRESH = """
import sys, warnings
warnings.simplefilter("error")
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from armour_surgery import load
for folder in sys.argv[1:]:
    saved = load_file(Path(folder) / "seen" / "io.safetensors")
    with torch.no_grad():
        out = load(folder)(saved["x"])
    out = out if isinstance(out, torch.Tensor) else out[0]
    print(folder, torch.equal(out, saved["out"]), "transformers" in sys.modules)
"""


def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    folders = []
    for name in ("vit", "levit", "hf-vit"):
        converted = armour(name)
        path = save(converted, tmp_path / name)
        x = torch.randn(next(iter(example_input(converted, 3).values())).shape)
        with torch.no_grad():
            out = converted(x)
        (path / "seen").mkdir()
        out = out if isinstance(out, torch.Tensor) else out[0]
        save_file({"x": x, "out": out.contiguous()}, path / "seen" / "io.safetensors")
        folders.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.rpartition("/")[2] for line in done.stdout.splitlines()]
    # timm's models do not wait for transformers to be imported.
    assert lines == ["vit True False", "levit True False", "hf-vit True True"]


def test_changes_after_the_conversion_are_kept(tmp_path: Path) -> None:
    converted = armour()
    converted.reset_classifier(7)  # type: ignore[operator]
    converted.blocks[1].attn.attn_drop.p = 0.3  # type: ignore[union-attr, index]
    converted.blocks[0].mlp.drop1.p = 0.2  # type: ignore[union-attr, index]
    again = load(save(converted, tmp_path / "out"))
    assert same(converted, again)
    assert again.head.out_features == 7  # type: ignore[union-attr]
    assert again.blocks[1].attn.attn_drop.p == 0.3  # type: ignore[union-attr, index]
    assert again.blocks[0].mlp.drop1.p == 0.2  # type: ignore[union-attr, index]
    torch.manual_seed(0)
    wanted = converted.train()(torch.ones(2, 3, 32, 32))
    torch.manual_seed(0)
    assert torch.equal(again.train()(torch.ones(2, 3, 32, 32)), wanted)


def test_a_replaced_head_is_kept(tmp_path: Path) -> None:
    converted = armour()
    converted.head = nn.Linear(48, 9)
    assert same(converted, load(save(converted, tmp_path / "out")))


def test_a_head_that_the_library_cannot_build_is_explained(tmp_path: Path) -> None:
    converted = armour()
    converted.head = nn.Sequential(nn.Linear(48, 9))
    message = refused(FolderError, lambda: save(converted, tmp_path / "out"))
    assert "'head'" in message
    assert "Sequential" in message
    assert list(tmp_path.iterdir()) == []


def test_hf_head_of_another_size_is_kept(tmp_path: Path) -> None:
    converted = armour("hf-vit")
    converted.classifier = nn.Linear(48, 9)
    converted.config.num_labels = 9  # type: ignore[union-attr]
    assert same(converted, load(save(converted, tmp_path / "out")))


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    converted = armour()
    blocks: Any = converted.blocks
    blocks[1].norm1.weight = blocks[0].norm1.weight
    again = load(save(converted, tmp_path / "out"))
    blocks = again.blocks
    assert blocks[1].norm1.weight is blocks[0].norm1.weight
    assert len(list(again.parameters())) == len(list(converted.parameters()))
    assert same(converted, again)


def test_a_host_that_ties_by_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**HF, vocab_size=11)).eval()
    converted = convert(model)
    again = load(save(converted, tmp_path / "out"))
    assert same(converted, again)
    assert len(list(again.parameters())) == len(list(converted.parameters()))


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("vit", "qv", {"include": "blocks.1*"}),
        ("vit", "qk-diag", {}),
        ("vit", "kv", {"exclude": ["blocks.0*"]}),
        ("levit-conv", "grouped-shuffled", {}),
        ("levit", "concat-full", {}),
        ("levit", "concat-key", {}),
        ("hf-swin", "kv", {}),
    ],
)
def test_modes_and_parts_of_models_come_back(name: str, mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    converted = convert(host(name), mode, **options)
    assert same(converted, load(save(converted, tmp_path / "out")))


def test_a_loaded_model_is_saved_again(vit: nn.Module, tmp_path: Path) -> None:
    first = save(vit, tmp_path / "first")
    second = save(load(first), tmp_path / "second")
    assert (first / PLAN).read_bytes() == (second / PLAN).read_bytes()
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


def test_a_deep_copy_is_saved(tmp_path: Path) -> None:
    converted = armour()
    assert same(converted, load(save(converted, tmp_path / "out")))


def test_train_mode_is_not_lost_by_saving(tmp_path: Path) -> None:
    converted = armour().train()
    save(converted, tmp_path / "out")
    assert all(module.training for module in converted.modules())


def test_saving_changes_nothing_on_the_model_and_no_random_numbers(vit: nn.Module, tmp_path: Path) -> None:
    before = {key: tensor.clone() for key, tensor in vit.state_dict().items()}
    state, surgery = torch.get_rng_state(), vit.surgery
    load(save(vit, tmp_path / "out"))
    assert torch.equal(torch.get_rng_state(), state)
    assert vit.surgery is surgery
    assert all(torch.equal(tensor, before[key]) for key, tensor in vit.state_dict().items())


def test_a_config_with_infinities_is_written_and_read_back(tmp_path: Path) -> None:
    """JSON has no infinity, and some configs have limits without one."""
    model: Any = host("hf-vit")
    model.config.time_limits = [0.0, float("inf"), {"least": float("-inf")}]
    again: Any = load(save(convert(model), tmp_path / "out"))
    assert again.config.time_limits == [0.0, float("inf"), {"least": float("-inf")}]
    assert "Infinity" not in (tmp_path / "out" / PLAN).read_text(encoding="utf-8")


def test_a_host_whose_images_carry_their_places_in_numbers(tmp_path: Path) -> None:
    """Pix2Struct's patches begin with row and column: noise in their place is no place."""
    sizes: dict[str, Any] = {"hidden_size": 24, "d_kv": 8, "d_ff": 28}
    vision = {**sizes, "num_hidden_layers": 1, "num_attention_heads": 3}
    text = {**sizes, "num_layers": 1, "num_heads": 3, "vocab_size": 31}
    config = transformers.Pix2StructConfig(vision_config=vision, text_config=text)
    torch.manual_seed(0)
    converted: Any = convert(transformers.Pix2StructForConditionalGeneration(config).eval(), "qv")
    again: Any = load(save(converted, tmp_path / "out"))
    patches = torch.cat([torch.ones(2, 5, 2), torch.rand(2, 5, 768)], dim=-1)
    with torch.no_grad():
        wanted, found = (model.encoder(patches).last_hidden_state for model in (converted, again))
    assert torch.equal(wanted, found)
