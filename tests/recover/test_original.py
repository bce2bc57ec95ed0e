"""The original is found by what is recorded of it, and told from others by its tensors."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from saved_models import HF, edit
from small_models import surgery_of, vit
from timm.models import save_for_hf
from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTConfig, ViTForImageClassification

from armour_surgery import convert, load, save
from armour_surgery.errors import TeacherError
from armour_surgery.hosts import load_model
from armour_surgery.notes import ArmourWarning
from armour_surgery.records import SurgeryPlan
from armour_surgery.recover.original import check_original, load_original, note_other
from armour_surgery.saving.any_model import NOTHING_ASKED

SIZES: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 3, "patch_size": 8}


def find(student: nn.Module, *, judges_head: bool = True) -> nn.Module:
    surgery = surgery_of(student)
    model, source = load_original(student, surgery, NOTHING_ASKED)
    check_original(model, source, student, surgery, judges_head=judges_head)
    return model


def refusal(student: nn.Module, **options: bool) -> str:
    with pytest.raises(TeacherError) as caught:
        find(student, **options)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A timm folder that somebody published."""
    sizes = {**SIZES, "img_size": 32, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    save_for_hf(model, str(tmp_path / "tiny"), model_args=sizes, safe_serialization=True)
    return f"local-dir:{tmp_path / 'tiny'}"


def converted(name: str, **options: Any) -> nn.Module:
    model, source = load_model(name, **options)
    return convert(model, "qv", source=source)


def same(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in first.state_dict().items())


def test_a_published_model_is_its_own_record(folder: str) -> None:
    assert same(find(converted(folder)), load_model(folder)[0])


def test_arguments_of_the_builder_are_given_again(tmp_path: Path) -> None:
    torch.save(
        timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, **SIZES).state_dict(), tmp_path / "w.pt"
    )
    options = {"checkpoint": tmp_path / "w.pt", "img_size": 32, "num_classes": 4, "arguments": SIZES}
    student = converted("vit_tiny_patch16_224", **options)
    saved = load(save(student, tmp_path / "out"))
    assert same(find(saved), load_model("vit_tiny_patch16_224", **options)[0])


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_models_of_transformers_are_found_again(kind: str, tmp_path: Path) -> None:
    if kind == "vit":
        ViTForImageClassification(ViTConfig(**HF, num_labels=5)).save_pretrained(tmp_path / "hf")
    else:
        Dinov2ForImageClassification(Dinov2Config(**HF, num_labels=5)).save_pretrained(tmp_path / "hf")
    name = f"hf:{tmp_path / 'hf'}"
    with torch.random.fork_rng(), pytest.warns(ArmourWarning) if kind == "vit" else nullcontext():
        student = converted(name, img_size=64)
        assert surgery_of(student).source.options == {"img_size": 64}  # type: ignore[union-attr]
        found = find(load(save(student, tmp_path / "out")))
    assert found(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 5)


def test_weights_that_changed_before_the_conversion_are_told(folder: str) -> None:
    model, source = load_model(folder)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[0] += 1e-3  # type: ignore[index, union-attr]
    said = refusal(convert(model, "qv", source=source))
    assert re.search(r"1 of \d+ tensors differ \(blocks\.1\.mlp\.fc1\.bias\)", said)
    assert said.endswith(f"--teacher {folder}")


def test_a_new_head_counts_only_where_the_head_teaches(folder: str, tmp_path: Path) -> None:
    student = converted(folder, num_classes=3)
    said = refusal(student)
    assert re.search(r"1 of \d+ tensors differ \(head\.weight\)", said)
    find(student, judges_head=False)
    ViTForImageClassification(ViTConfig(**HF, num_labels=5)).save_pretrained(tmp_path / "hf")
    student = converted(f"hf:{tmp_path / 'hf'}", num_classes=3)
    assert "tensors differ (classifier.weight" in refusal(student)
    find(student, judges_head=False)


def test_the_same_file_is_enough_where_a_table_was_resampled(tmp_path: Path) -> None:
    """Another machine may round otherwise when it resamples."""
    torch.save(timm.create_model("test_vit", num_classes=3, img_size=32).state_dict(), tmp_path / "w.pt")
    with pytest.warns(ArmourWarning, match="resampled"):
        student = converted("test_vit", checkpoint=tmp_path / "w.pt", num_classes=3)
    surgery = surgery_of(student)
    rounded = {**surgery.original, "pos_embed": "0" * 16}
    student.surgery = replace(surgery, original=rounded)  # type: ignore[assignment]
    with pytest.warns(ArmourWarning, match="resampled"):
        find(student)
    gone = {**rounded, "blocks.9.norm.weight": "0" * 16}
    student.surgery = replace(surgery, original=gone)  # type: ignore[assignment]
    with pytest.warns(ArmourWarning, match="resampled"):
        assert "blocks.9.norm.weight" in refusal(student)


def test_folders_without_a_record_load_and_are_judged_as_before(folder: str, tmp_path: Path) -> None:
    path = save(converted(folder), tmp_path / "old")

    def forget(document: dict[str, Any]) -> None:
        plan = document["plan"]
        for key in ("original", "classes"):
            del plan[key]
        for key in ("options", "checkpoint"):
            del plan["source"][key]

    edit(path, forget)
    student = load(path)
    surgery: SurgeryPlan = surgery_of(student)
    assert (surgery.original, surgery.source.options, surgery.source.checkpoint) == ({}, None, None)  # type: ignore[union-attr]
    assert same(find(student), load_model(folder)[0])
    student.surgery = replace(surgery, trained="Trained.")  # type: ignore[assignment]
    with pytest.warns(ArmourWarning, match="without a record of the weights .* nobody can tell"):
        find(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.01)
    student.surgery = surgery  # type: ignore[assignment]
    assert "has other weights than the model" in refusal(student)
    note_other(vit(), None, surgery, "some")


def test_nothing_that_a_folder_names_is_called(tmp_path: Path, folder: str) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    student = converted(folder)
    surgery = surgery_of(student)
    for source, told in (
        (replace(surgery.source, name=f"{tmp_path}/evil.py:f"), "only you can make it"),  # type: ignore[type-var]
        (replace(surgery.source, options={"num_classes": "many"}), "num_classes='many', which is no number"),  # type: ignore[type-var]
        (replace(surgery.source, options={"pretrained_cfg": {"url": "http://x"}}), "cannot be loaded"),  # type: ignore[type-var]
    ):
        student.surgery = replace(surgery, source=source)  # type: ignore[assignment]
        assert told in refusal(student)
    assert not (tmp_path / "ran").exists()


def test_the_origin_stays_known_where_the_head_was_changed_afterwards(tmp_path: Path, folder: str) -> None:
    student = converted(folder)
    student.reset_classifier(9)  # type: ignore[operator]
    saved = load(save(student, tmp_path / "out"))
    source = surgery_of(saved).source
    assert source is not None
    assert (source.name, source.options) == (folder, {})
    assert same(find(saved), load_model(folder)[0])
