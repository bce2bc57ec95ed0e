"""The model card tells what was done, and every residual that there is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from calibrated_plans import calibrated_plan, calibrated_site
from saved_models import CARD, armour

from armour_surgery import SurgeryPlan, save
from armour_surgery.saving.model_card import model_card


def rows(card: str) -> list[list[str]]:
    body = card.partition("| attention | mode |")[2].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body if line.startswith("|")]


# The table of residuals


def test_the_model_card_lists_residuals() -> None:
    card = model_card(calibrated_plan(0.125, None, 0.5), "x")
    assert rows(card) == [
        ["`blocks.0.attn`", "`qv`", "0.1250", "joint-svd, last"],
        ["`blocks.2.attn`", "`qv`", "0.5000", "joint-svd, last"],
    ]
    ranked = replace(calibrated_plan(), sites=(replace(calibrated_site(0, 0.125), rank=24),))
    assert rows(model_card(ranked, "x"))[0][1] == "`qv` rank 24"


@pytest.mark.parametrize(("sites", "shown"), [(24, 24), (25, 13), (48, 24), (100, 20)])
def test_neighbors_share_a_row_where_there_are_many(sites: int, shown: int) -> None:
    found = rows(model_card(calibrated_plan(*(0.001 * (number + 1) for number in range(sites))), "x"))
    assert len(found) == shown
    if shown < sites:
        assert found[0][0].startswith("`blocks.0.attn` to `blocks.")
        assert found[0][2].startswith("0.0010 to 0.00")
    assert f"`blocks.{sites - 1}.attn`" in found[-1][0]


def test_the_model_card_has_no_residuals_where_nothing_was_calibrated() -> None:
    assert rows(model_card(replace(calibrated_plan(0.5), init="joint-svd"), "x")) == []
    assert rows(model_card(calibrated_plan(None), "x")) == []


# The whole card


def test_the_model_card_tells_what_was_done(tmp_path: Path) -> None:
    converted = armour("levit")
    surgery: SurgeryPlan = converted.surgery  # type: ignore[assignment]
    assert any("downsampling" in site.reason for site in surgery.refused)
    assert SurgeryPlan.from_dict(json.loads(json.dumps(surgery.to_dict()))) == surgery
    card = (save(converted, tmp_path / "my-levit") / CARD).read_text(encoding="utf-8")
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: armour-surgery" in head
    assert "license: " in head
    assert "# my-levit" in body
    assert "levit_128s" in body
    assert "x `concat-half`" in body
    for number in (surgery.params_before, surgery.params_after, surgery.macs_before, surgery.macs_after):
        assert f"{number:,}" in body
    assert all(f"`{site.fqn}`" in body for site in (*surgery.sites, *surgery.refused))
    assert "downsampling" in body
    assert "needs training" in body
    assert "from armour_surgery import load" in body
    assert 'load("my-levit")' in body
    assert "License of the base model" in body
