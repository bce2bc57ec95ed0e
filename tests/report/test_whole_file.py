"""Pages and figures are written whole or not at all, in the format of their name."""

import os
import stat
from pathlib import Path

import pytest
from page_by_hand import frontier, sensitivities

from armour_surgery.errors import FolderError, UsageError
from armour_surgery.report.figures import frontier_figure, sensitivity_figure
from armour_surgery.report.page import check_report, write_html
from armour_surgery.report.style import check_figure, save_figure


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert write_html(target, "<p>ä\udce4</p>") == target
    assert target.read_bytes() == "<p>ä?</p>".encode()
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    write_html(str(target), "new")
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "real" / "page.html")
    write_html(tmp_path / "link.html", "text")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real" / "page.html").read_text() == "text"


def test_an_interrupted_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FolderError, match=r"report\.html could not be written: No space left on device; name another"):
        write_html(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_places_where_no_page_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    for path, said in (
        (tmp_path, "is a folder; name a file for the report in it"),
        (tmp_path / "absent" / "x.html", "is not a folder, so the report x.html cannot be written there"),
        (tmp_path / "file" / "x.html", "is not a folder, so the report x.html cannot be written there"),
        (tmp_path / "pipe", "is not a regular file"),
    ):
        for refuse in (lambda path: check_report(path), lambda path: write_html(path, "x")):
            with pytest.raises(FolderError, match=said) as caught:
                refuse(path)
            assert "\n" not in str(caught.value)
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(FolderError, match="cannot be written to; name another place for the report x.html"):
        write_html(tmp_path / "x.html", "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")])
def test_a_figure_is_saved_in_the_format_of_its_name(name: str, start: bytes, tmp_path: Path) -> None:
    target = tmp_path / name
    contents = []
    for _ in range(2):
        assert save_figure(target, sensitivity_figure(sensitivities(), "t")) == target
        contents.append(target.read_bytes())
    assert contents[0] == contents[1]
    assert contents[0].startswith(start)
    assert os.listdir(tmp_path) == [name]


def test_figures_that_cannot_be_saved(tmp_path: Path) -> None:
    for name in ("figure", "figure.docx", "png"):
        with pytest.raises(UsageError, match=r"name a file that ends in \.png, \.svg, \.pdf"):
            check_figure(tmp_path / name)
    with pytest.raises(FolderError, match=r"the figure x\.png cannot be written there"):
        save_figure(tmp_path / "absent" / "x.png", frontier_figure(frontier(), 1_234_567, None))
    assert os.listdir(tmp_path) == []
