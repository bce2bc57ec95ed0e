"""The report page and its figures, on records made by hand."""

import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from armour_surgery.errors import FolderError, UsageError
from armour_surgery.records import Fidelity, FrontierPoint, RefusedSite, Sensitivity, SitePlan, Source, SurgeryPlan
from armour_surgery.report.figures import frontier_figure, sensitivity_figure
from armour_surgery.report.page import check_report, html_report, write_html
from armour_surgery.report.style import check_figure, inline_svg, save_figure, short_names

VOID = {"meta", "br", "path", "use", "rect", "line", "circle", "image", "hr", "img", "link"}


class Page(HTMLParser):
    """What a browser would make of a page: its elements, their attributes and the text, all closed properly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def site(number: int, residual: float | None = 0.125, name: str = "blocks.{}.attn") -> SitePlan:
    return SitePlan(
        name.format(number), "qv", "calibrated", 5300, 3975, 71000, 53000, residual, "x", ("joint-svd", "last layer")
    )


def surgery(sites: int = 3) -> SurgeryPlan:
    return SurgeryPlan(
        mode="auto",
        init="calibrated",
        sites=tuple(site(number, 0.05 * (number + 1)) for number in range(sites)),
        refused=(RefusedSite("down.attn", "downsampling attention: Q & V differ"),),
        params_before=1_234_567,
        params_after=1_111_111,
        macs_before=7_654_321,
        macs_after=6_543_210,
        example=(("pixels", (2, 3, 56, 40), "float32"),),
        source=Source("timm", "vit_tiny", name="timm:vit_tiny.in1k", license="mit", revision="abc123"),
        fidelity=Fidelity(41, "photos", 0.9712, 13.5, 96.75),
    )


def sensitivities(sites: int = 3) -> list[Sensitivity]:
    return [
        Sensitivity(f"blocks.{number}.attn", mode, rank, 1000 + number, 0.1 * (number + 1), 0.001 * 3**number)
        for number in range(sites)
        for mode, rank in (("qv", None), ("qv", 16), ("qk", None))
    ]


def frontier() -> list[FrontierPoint]:
    ways = [(f"blocks.{number}.attn", "qv", None) for number in range(3)]
    return [
        FrontierPoint(1_234_567, 0.0, 0.0, ()),
        FrontierPoint(1_200_000, 0.01, None, tuple(ways[:1])),
        FrontierPoint(1_150_000, 0.03, 0.02, tuple(ways[:2])),
        FrontierPoint(1_111_111, 0.09, 0.06, tuple(ways)),
    ]


def everything() -> str:
    return html_report(replace(surgery(), max_loss=0.05), "my model", sensitivities(), frontier(), 'out/my "folder"')


# The page


def test_the_page_says_what_was_done() -> None:
    text = Page(everything()).text
    for part in (
        "my model", "timm:vit_tiny.in1k", "3 of 4 attentions converted", "mit", "abc123", "pixels 3 × 56 × 40",
        "1,234,567", "1,111,111", "−10.0 %", "7,654,321", "6,543,210", "−14.5 %",
        "15,900", "11,925", "213,000", "159,000",
        "41, held out", "photos", "0.9712", "13.5 dB", "96.8 %", "close to the original", "No labels were used",
        "blocks.0.attn", "blocks.2.attn", "joint-svd, last layer", "0.0500", "0.1500", "5,300", "3,975", "−25.0 %",
        "relative error of the attention's output on images that nothing was fitted to",
        "down.attn", "downsampling attention: Q & V differ",
        "What each site costs alone", "Parameters against loss", r'model = load("out/my \"folder\"")',
    ):  # fmt: skip
        assert part in text, part


def test_the_page_is_whole_and_loads_nothing() -> None:
    html = everything()
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert {"script", "link", "img", "image", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    assert "://" not in html
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    links = [value for _, found in page.tags for key, value in found.items() if key in ("href", "xlink:href", "src")]
    assert all(value and value.startswith("#") for value in links)
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in links if value} | set(re.findall(r"url\(#([^)]*)\)", html)) == set(ids)
    assert page.count("svg") == 2
    policy = [found["content"] for tag, found in page.tags if tag == "meta" and "http-equiv" in found]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in html


def test_equal_arguments_give_an_equal_page_in_every_process_and_matplotlib_is_left_as_it_was() -> None:
    code = (
        "import sys, matplotlib\n"
        "def settings(): return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != 'backend'}\n"
        "before = settings()\n"
        "from test_page import everything; page = everything()\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "sys.stdout.buffer.write(page.encode())"
    )
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=here)
    assert done.stdout.decode() == everything() == everything()


def test_sections_are_there_when_there_is_something_to_say() -> None:
    plain = replace(surgery(), refused=(), fidelity=None, source=None)
    text = Page(html_report(plain, "x")).text
    for title in (
        "How to load it",
        "Left as they were",
        "What each site costs alone",
        "Parameters against loss",
        "cosine",
    ):
        assert title not in text
    assert "not compared with the original" in text
    assert "A model built in Python" in text
    untrained = replace(plain, init="wq", sites=(replace(site(0, 1.25), init="wq", steps=()),))
    text = Page(html_report(untrained, "x")).text
    assert "It needs training." in text
    assert "Frobenius" in text
    assert "fitted" not in text
    nothing = replace(plain, sites=(site(0, None),))
    assert "residual" not in Page(html_report(nothing, "x")).text.lower()


@pytest.mark.parametrize(
    ("cosine", "said"),
    [
        (0.995, "nearly the same"),
        (0.96, "close to"),
        (0.85, "expect some accuracy to be lost"),
        (0.2, "needs training"),
    ],
)
def test_fidelity_in_words(cosine: float, said: str) -> None:
    text = Page(html_report(replace(surgery(), fidelity=Fidelity(7, "synthetic", cosine, 9.1, None)), "x")).text
    assert said in text
    assert "same first choice" not in text
    assert "9.1 dB" in text


def test_ranks_are_told_where_there_are_any() -> None:
    assert "rank" not in Page(html_report(surgery(), "x")).text
    ranked = replace(surgery(), sites=(site(0), replace(site(1), rank=24), site(2)))
    text = Page(html_report(ranked, "x")).text
    assert "1 × qv rank 24" in text
    assert "2 × qv" in text
    assert "blocks.1.attn qv 24 calibrated" in text
    assert "blocks.0.attn qv all calibrated" in text


def test_the_chosen_point_is_the_one_that_was_converted() -> None:
    def chosen_rows(html: str) -> list[str]:
        return re.findall(r'<tr class="chosen"><th scope="row" class="number">([\d,]+)</th>', html)

    assert chosen_rows(html_report(surgery(), "x", (), frontier())) == ["1,111,111"]
    assert chosen_rows(html_report(surgery(2), "x", (), frontier())) == ["1,150,000"]
    other = replace(surgery(), sites=(site(9),))
    assert chosen_rows(html_report(other, "x", (), frontier())) == []
    budget = Page(html_report(replace(surgery(), max_loss=0.07), "x", (), frontier())).text
    assert "budget 0.07" in budget
    assert "chosen: 1.111 M" in budget


EVIL = "<script>alert(1)</script>&\"'`${x}"


def test_everything_is_escaped() -> None:
    evil = replace(
        surgery(),
        init=EVIL,
        sites=(replace(site(0), fqn=EVIL, mode=EVIL, init=EVIL, steps=(EVIL,)), site(1)),
        refused=(RefusedSite(EVIL, EVIL),),
        example=((EVIL, (2, 3), "float32"),),
        source=Source(EVIL, EVIL, name=EVIL, license=EVIL, revision=EVIL),
        fidelity=Fidelity(3, EVIL, 0.9, 3.0, 50.0),
    )
    costs = [Sensitivity(name, EVIL, rank, 5, 0.1, 0.2) for name in (EVIL, "other") for rank in (None, 8)]
    points = [FrontierPoint(1_200_000, 0.1, None, ((EVIL, EVIL, None),))]
    html = html_report(evil, EVIL, costs, points, EVIL)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in html
    assert page.text.count("<script>alert(1)</script>") >= 14


@settings(max_examples=25, deadline=None)
@given(name=st.text(), fqn=st.text(min_size=1), reason=st.text())
def test_any_text_leaves_the_page_whole(name: str, fqn: str, reason: str) -> None:
    plan = replace(surgery(), sites=(replace(site(0), fqn=fqn),), refused=(RefusedSite(fqn, reason),))
    assert Page(html_report(plan, name)).count("section") == Page(html_report(surgery(), "x")).count("section")


# Figures


def svg(figure: Figure) -> Page:
    return Page(inline_svg(figure, "a label"))


def test_a_figure_follows_the_page() -> None:
    text = inline_svg(sensitivity_figure(sensitivities(), "a title"), "a label")
    assert text.startswith("<svg ")
    assert 'aria-label="a label"' in text
    assert not re.search(r"(?<!, )#[0-9a-f]{6}", text), "a color that the page cannot change"
    for name in ("--ink", "--muted", "--rule", "--series-1", "--series-2"):
        assert f"var({name}, #" in text


def test_sensitivities_have_a_bar_for_each_site_and_mode_and_a_line_for_each_rank() -> None:
    figure = sensitivity_figure(sensitivities(4), "cost $of$ each")
    upper, lower = figure.axes
    for axes, name in ((upper, "loss"), (lower, "residual")):
        assert [len(bars) for bars in axes.containers] == [4, 4]
        wanted = [getattr(one, name) for one in sensitivities(4) if (one.mode, one.rank) == ("qk", None)]
        assert [patch.get_height() for patch in axes.containers[1]] == wanted
        [line] = axes.get_lines()
        assert list(line.get_ydata()) == [getattr(one, name) for one in sensitivities(4) if one.rank == 16]
    # From 0.001 to 0.027 is less than a factor of thirty, from 0.001 to 0.081 is more.
    assert (upper.get_yscale(), lower.get_yscale()) == ("linear", "linear")
    assert sensitivity_figure(sensitivities(5), "").axes[0].get_yscale() == "log"
    text = svg(figure).text
    for part in ("cost $of$ each", "blocks.*.attn", "qv, rank 16", "loss of the model", "error of the site's output"):
        assert part in text


def test_sites_that_were_not_tried_in_a_way_have_a_gap() -> None:
    some = [one for one in sensitivities(3) if (one.fqn, one.rank) != ("blocks.1.attn", 16)]
    [line] = sensitivity_figure(some, "").axes[0].get_lines()
    values = list(line.get_ydata())
    assert values[1] != values[1]
    assert values[::2] == [0.001, 0.001 * 9]


@pytest.mark.parametrize("sites", [1, 12, 48])
def test_names_of_sites_do_not_overlap(sites: int) -> None:
    figure = sensitivity_figure(
        [Sensitivity(f"layers.{n // 6}.blocks.{n % 6}.attn", "qv", None, 1, 0.1, 0.1) for n in range(sites)], "t"
    )
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[1].get_xticklabels()]
    assert len(boxes) == sites
    assert all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    bottom = figure.axes[1].xaxis.label.get_window_extent()
    assert all(box.y0 >= bottom.y1 for box in boxes)


def test_figures_of_nothing_and_of_values_that_have_no_place() -> None:
    svg(sensitivity_figure([], ""))
    svg(frontier_figure([], 5_000_000, None))
    odd = [
        Sensitivity("a.0", "qv", None, 1, float("nan"), 0.0),
        Sensitivity("a.1", "qv", None, 1, float("inf"), -1e-9),
        Sensitivity("a.2", "qv", None, 1, 0.2, 1e-5),
        Sensitivity("a.3", "qv", None, 1, 0.3, 0.5),
    ]
    svg(sensitivity_figure(odd, ""))


def test_the_frontier_shows_prediction_measurement_budget_and_choice() -> None:
    figure = frontier_figure(frontier(), 1_234_567, 0.05, frontier()[2])
    lines = {str(line.get_label()): line for line in figure.axes[0].get_lines()}
    predicted = lines["predicted: sum of the sites alone"]
    assert list(predicted.get_xdata()) == [1.234567, 1.2, 1.15, 1.111111]
    assert list(predicted.get_ydata()) == [0.0, 0.01, 0.03, 0.09]
    measured = lines["measured on held-out images"]
    assert list(measured.get_ydata()) == [0.0, 0.02, 0.06]
    assert set(lines["budget 0.05"].get_ydata()) == {0.05}
    chosen = lines["chosen: 1.150 M"]
    assert (list(chosen.get_xdata()), list(chosen.get_ydata())) == ([1.15], [0.02])
    assert set(lines["the original"].get_xdata()) == {1.234567}
    untried = frontier_figure(frontier(), 1_234_567, 0.05, frontier()[1])
    [dot] = [line for line in untried.axes[0].get_lines() if line.get_label() == "chosen: 1.200 M"]
    assert list(dot.get_ydata()) == [0.01]
    assert "change, %" in svg(untried).text
    assert "chosen" not in svg(frontier_figure(frontier(), 1_234_567, None)).text


@pytest.mark.parametrize(
    ("fqns", "labels", "pattern"),
    [
        (["blocks.0.attn", "blocks.1.attn", "blocks.10.attn"], ["0", "1", "10"], "blocks.*.attn"),
        (["s.0.b.1.attn", "s.0.b.2.attn"], ["1", "2"], "s.0.b.*.attn"),
        (["s.0.b.0.a", "s.1.b.2.a"], ["0.0", "1.2"], "s.*.b.*.a"),
        (["enc.early.attn", "enc.late.attn"], ["early", "late"], "enc.*.attn"),
        (["enc.a.self.attn", "enc.b.attn"], ["a.self", "b"], "enc.*.attn"),
        (["one", "two"], ["one", "two"], "attention"),
        (["blocks.3.attn"], ["blocks.3.attn"], "attention"),
        ([], [], "attention"),
    ],
)
def test_short_names(fqns: list[str], labels: list[str], pattern: str) -> None:
    assert short_names(fqns) == (labels, pattern)


@given(st.lists(st.text("ab.01", min_size=1), unique=True, max_size=6))
def test_short_names_tell_names_apart(fqns: list[str]) -> None:
    labels, _ = short_names(fqns)
    assert len(set(labels)) == len(labels) == len(fqns)


# Writing


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
