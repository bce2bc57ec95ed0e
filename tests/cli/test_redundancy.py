"""`redundancy` as a command: one document, a figure, and mistakes in one line."""

from pathlib import Path

import pytest
from command_line import document, failed, good

from armour_surgery.likeness.pairs import PAIRS


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


VIT = ("test_vit", "--no-pretrained")


def test_one_document_and_a_figure(tiny: Path) -> None:
    found = document("redundancy", *VIT, "--out", "figure.png", "--layer", "3", "--threshold", "0.02")
    assert (found["model"], found["weights"], found["threshold"]) == ("test_vit", "random", 0.02)
    assert (found["layer"], found["out"]) == (found["sites"][3]["fqn"], "figure.png")
    for site in found["sites"]:
        assert {"fqn", "kind", "num_heads", "key_dim", "value_dim", "pairs", "mode", "residual"} <= set(site)
        for pair in PAIRS:
            one = site["pairs"][pair]
            assert 0 <= one["share"] <= 100
            assert abs(one["share"] - one["share_by_chance"]) < 5  # random weights
            assert one["mean_abs_difference"] > 0
            assert 0 < one["residual"] < 1
    assert (tiny / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_person_is_told_that_random_weights_say_nothing(tiny: Path) -> None:
    result = good("redundancy", *VIT)
    text = " ".join(result.stdout.split())
    assert "random weights: these numbers say nothing" in text
    assert "By chance" in text
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert list(tiny.iterdir()) == []


def test_mistakes_are_one_line(tiny: Path) -> None:
    assert "ends in .png" in failed("redundancy", *VIT, "--out", "figure.txt", code=2).stderr
    assert "absent" in failed("redundancy", *VIT, "--out", "absent/figure.png").stderr
    assert "layer '9'" in failed("redundancy", *VIT, "--layer", "9", code=2).stderr
    assert "threshold -1.0" in failed("redundancy", *VIT, "--threshold", "-1", code=2).stderr
    assert list(tiny.iterdir()) == []
