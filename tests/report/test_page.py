"""The page says what was done, is whole whatever the text, loads nothing, and is the same in every process."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from page_by_hand import Page, everything, frontier, sensitivities, site, surgery

from armour_surgery.records import Fidelity, FrontierPoint, RefusedSite, Sensitivity, Source
from armour_surgery.report.page import Making, html_report
from armour_surgery.tabular import Table


def test_the_page_says_what_was_done() -> None:
    text = Page(everything()).text
    for part in (
        "my model", "timm:vit_tiny.in1k", "3 of 4 attentions converted", "mit", "abc123", "pixels 3 × 56 × 40",
        "1,234,567", "1,111,111", "−10.0 %", "7,654,321", "6,543,210", "−14.5 %",
        "15,900", "11,925", "213,000", "159,000",
        "41 held-out images (photos)", "0.9712", "13.5 dB", "96.8 %", "close to the original", "No labels were used",
        "blocks.0.attn", "blocks.2.attn", "joint-svd, last layer", "0.0500", "0.1500", "5,300", "3,975", "−25.0 %",
        "relative error of the attention's output on images that nothing was fitted to",
        "down.attn", "downsampling attention: Q & V differ",
        "What each site costs alone", "Parameters against loss", r'model = load("my \"folder\"")',
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
        "from page_by_hand import everything; page = everything()\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "sys.stdout.buffer.write(page.encode())"
    )
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=tests)
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


def test_a_fidelity_without_a_head() -> None:
    text = Page(html_report(replace(surgery(), fidelity=Fidelity(7, "synthetic", 0.85, 9.1, None)), "x")).text
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


def test_how_the_page_was_made_and_how_fast_the_model_is() -> None:
    made = Making("armour-surgery convert x --out '<y>'", "2026-01-02 03:04 UTC", {"torch": "2.15", "Python": "3.11"})
    speed = Table("where & how", ("model", "batch", "speed-up"), [("<a>", "16", "1.050")], frozenset((1, 2)))
    page = Page(html_report(surgery(), "x", made=made, speed=speed))
    assert (
        "command armour-surgery convert x --out '<y>' date 2026-01-02 03:04 UTC versions torch 2.15, Python"
        in page.text
    )
    assert "Speed model batch speed-up <a> 16 1.050 where & how." in page.text
    plain = Page(html_report(surgery(), "x")).text
    assert "How it was made" not in plain
    assert "Speed" not in plain


def test_bars_have_the_same_scale_on_every_page() -> None:
    def bars(residual: float, other: float) -> list[float]:
        plan = replace(surgery(), sites=(site(0, residual), site(1, other)))
        return [float(width) for width in re.findall(r'class="bar"><i style="width:([\d.]+)%', html_report(plan, "x"))]

    assert bars(0.25, 0.5) == [25.0, 50.0]
    assert bars(0.25, 0.01) == [25.0, 1.0]
    assert bars(1.5, 0.0) == [100.0, 0.0]
    losses = [Sensitivity("a", "qv", None, 1, 0.1, loss) for loss in (0.005, 0.05, 0.3, -1e-9)]
    html = html_report(replace(surgery(), sites=(site(0, None),)), "x", losses)
    assert re.findall(r"width:([\d.]+)%", html) == ["10.0", "100.0", "100.0", "0.0"]


def test_every_table_stands_in_a_frame_that_scrolls() -> None:
    html = html_report(surgery(), "x", sensitivities(), frontier(), "out", speed=Table("c", ("a",), [("b",)]))
    assert html.count("<table>") == html.count('<div class="wide"><table>') == 6
    assert ".wide { overflow-x: auto;" in html
