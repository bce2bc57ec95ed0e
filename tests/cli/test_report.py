"""The page that `convert --report` writes says how it came about, and how fast the model is where that was measured."""

import re
from pathlib import Path

import pytest
from command_line import bad, document, good
from page_by_hand import Page

from armour_surgery.saving.document import installed_versions


def test_the_page_has_the_command_the_date_and_the_versions(tiny: str, here: Path) -> None:
    given = ("--exclude", "blocks.1*", "--out", str(here / "a folder"), "--report", str(here / "page.html"))
    good("convert", f"local-dir:{here}/tiny", *given, "--num-classes", "7", "--no-pretrained")
    text = Page((here / "page.html").read_text(encoding="utf-8")).text
    command = (
        "armour-surgery convert local-dir:tiny --exclude 'blocks.1*' --no-pretrained --num-classes 7 --out 'a folder' "
        "--report page.html"
    )
    assert command in text
    assert re.search(r"date 20\d\d-\d\d-\d\d \d\d:\d\d UTC", text)
    for name, version in installed_versions().items():
        assert f"{name} {version}" in text
    assert str(here) not in text
    assert "Speed" not in text


@pytest.mark.usefixtures("short_turns")
def test_speed_is_on_the_page_where_it_was_measured(tiny: str, here: Path) -> None:
    found = document("convert", tiny, "--out", "out", "--report", "page.html", "--bench", "1", "--mode", "kv")
    assert found["mode"] == "kv"
    page = Page((here / "page.html").read_text(encoding="utf-8"))
    assert "Speed model batch images/s ms speed-up 99 % interval verdict original 1" in page.text
    assert "converted 1" in page.text
    assert "Benchmark: fp32, eager" in page.text


def test_speed_is_for_a_page_of_a_model_that_is_converted(tiny: str) -> None:
    for options in ((), ("--report", "page.html", "--dry-run")):
        message = bad("convert", tiny, "--bench", "1", *options, code=2)
        assert "--bench is for the page that --report writes" in message
