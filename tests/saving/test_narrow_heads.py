"""Heads with fewer channels are saved and loaded bit for bit, and another rank in the file is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from oracle import outputs, randomize
from tiny_hosts import ANY_SIZE, CASES
from torch import nn

from armour_surgery import convert, load, save
from armour_surgery.cli.tables import cost_table
from armour_surgery.errors import SchemaError
from armour_surgery.saving.model_card import model_card
from armour_surgery.surgery.perform import surgery_of


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    """A ViT of which only the first site is narrow."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ANY_SIZE)
    return convert(randomize(model), "qv", init="joint-svd", rank={"blocks.0.attn": 8}).eval()


def test_a_model_comes_back_bit_identical(narrow: nn.Module, tmp_path: Path) -> None:
    batch = CASES["vit"].batches()[1]
    with torch.no_grad():
        wanted = narrow(**batch)
        for one in (copy.deepcopy(narrow), load(save(narrow, tmp_path / "saved"))):
            assert torch.equal(one(**batch), wanted)
            assert surgery_of(one).sites == surgery_of(narrow).sites
        again = load(save(load(tmp_path / "saved"), tmp_path / "again"))
        assert torch.equal(again(**batch), wanted)


def test_transformers_model_comes_back(tmp_path: Path) -> None:
    host = CASES["hf-vit"]
    converted = convert(host.build(), "qv", rank=8).eval()
    batch = host.batches()[1]
    with torch.no_grad():
        wanted, got = outputs(converted, batch), outputs(load(save(converted, tmp_path / "saved")), batch)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_the_rank_is_written_and_told(narrow: nn.Module, tmp_path: Path) -> None:
    document = json.loads((save(narrow, tmp_path / "saved") / "surgery.json").read_text())
    assert [site["rank"] for site in document["plan"]["sites"]] == [8, None]
    assert "1 x `qv` with 8 channels a head, 1 x `qv`" in model_card(surgery_of(narrow), "saved")
    assert "blocks.0.attn  (qv, rank 8)" in [row[0] for row in cost_table(surgery_of(narrow)).view.rows]


def _edited(folder: Path, rank: Any) -> Path:
    path = folder / "surgery.json"
    document = json.loads(path.read_text())
    for site in document["plan"]["sites"]:
        site["rank"] = rank
        if rank == "none":
            del site["rank"]
    path.write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("rank", [0, 5, 12, 13, -1, 2**70, "8", 8.5, True, None, "none"])
def test_a_folder_with_another_rank_is_refused(rank: Any, narrow: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"surgery\.json"):
        load(_edited(save(narrow, tmp_path / "saved"), rank))


def test_a_folder_from_before_ranks_loads(tmp_path: Path) -> None:
    host = CASES["vit"]
    converted = convert(host.build(), "qv").eval()
    batch = host.batches()[0]
    with torch.no_grad():
        assert torch.equal(load(_edited(save(converted, tmp_path / "saved"), "none"))(**batch), converted(**batch))
