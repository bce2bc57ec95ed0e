"""Tables for people, on records made by hand."""

import io
from dataclasses import replace

import pytest
from calibrated_plans import calibrated_plan, calibrated_site
from rich.console import Console  # noqa: TID251

from armour_surgery.cli.tables import Shown, cost_table, fidelity_lines, frontier_table, sensitivity_table
from armour_surgery.modes import MODES
from armour_surgery.records import AttentionSite, Fidelity, FrontierPoint, Sensitivity
from armour_surgery.views import site_table


def printed(table: Shown) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def body(table: Shown) -> list[str]:
    """The lines below the headers."""
    lines = printed(table)
    rule = next(place for place, line in enumerate(lines) if line and set(line) <= {"─", " "})
    return lines[rule + 1 :]


# Sensitivities


def test_sensitivities_name_a_site_once_and_show_every_way() -> None:
    costs = [
        Sensitivity("blocks.0.attn", "qv", None, 147_840, 0.1234, 0.00123),
        Sensitivity("blocks.0.attn", "qv", 48, 184_800, 0.2, 0.004),
        Sensitivity("blocks.1[x].attn", "concat-half", None, 7, 0.3, 0.002),
    ]
    first, second, third = (line.split() for line in body(sensitivity_table(costs)))
    assert first == ["blocks.0.attn", "qv", "147,840", "0.1234", "0.00123", "━" * 4]
    assert second == ["qv,", "rank", "48", "184,800", "0.2000", "0.00400", "━" * 12]
    assert third == ["blocks.1[x].attn", "concat-half", "7", "0.3000", "0.00200", "━" * 6]
    assert "parameters" in " ".join(printed(sensitivity_table(costs))[:3])


def test_sensitivities_without_a_loss_have_no_bars() -> None:
    zero = [Sensitivity("a", "qv", None, 1, 0.0, value) for value in (0.0, -1e-9)]
    assert "━" not in "".join(line.split("0.0000", 1)[-1] for line in body(sensitivity_table(zero)))
    assert printed(sensitivity_table([]))


def point(number: int, measured: float | None = None) -> FrontierPoint:
    ways = tuple((f"blocks.{n}.attn", "qv", 32 if n == 2 else None) for n in range(number))
    return FrontierPoint(2_000_000 - 10_000 * number, 0.01 * number, measured, ways)


# The frontier


def test_the_frontier_goes_from_large_to_small_and_marks_the_choice() -> None:
    points = [point(3), point(0, 0.0), point(2, 0.015), point(1)]
    lines = body(frontier_table(points, 2_000_000, chosen=points[2]))
    assert [line.split()[0] for line in lines] == ["2.000", "1.990", ">", "1.970"]
    assert lines[2].split() == [
        ">", "1.980", "M", "-1.0", "%", "0.02000", "0.01500", "blocks.0-1.attn", "(qv)", "━" * 4,
    ]  # fmt: skip
    assert "nothing" in lines[0]
    assert lines[1].split()[-4:] == ["-", "blocks.0.attn", "(qv)", "━" * 2]
    assert "blocks.0-1.attn (qv); blocks.2.attn (qv, rank 32)" in lines[3]
    assert not any(">" in line for line in printed(frontier_table(points, 2_000_000)))


def test_a_long_frontier_is_thinned_out_and_keeps_what_matters() -> None:
    points = [point(number, 0.5 if number == 31 else None) for number in range(97)]
    table = frontier_table(points, 2_000_000, chosen=points[42])
    shown = [row[1] for row in table.view.rows]
    assert len(shown) <= 28
    for number in (0, 31, 42, 96):
        assert f"{2 - 0.01 * number:.3f} M" in shown
    assert printed(frontier_table([], 2_000_000))


# Fidelity


def test_fidelity_in_lines() -> None:
    first, second = fidelity_lines(calibrated_plan(0.1, 0.4, 0.2, 0.3, 0.05))
    assert first == (
        "On 41 held-out images (photos): cosine to the original's features 0.9712, SQNR 13.5 dB, "
        "same first choice on 96.8 %."
    )
    assert second == (
        "Residual of the sites: median 0.200; the largest: blocks.1.attn 0.400, blocks.3.attn 0.300, "
        "blocks.2.attn 0.200."
    )


def test_fidelity_lines_say_only_what_is_known() -> None:
    plan = calibrated_plan(0.1, 0.2)
    assert fidelity_lines(replace(plan, init="wq", fidelity=None)) == []
    assert fidelity_lines(replace(calibrated_plan(None, None), fidelity=None)) == []
    headless = replace(calibrated_plan(0.1), fidelity=Fidelity(4, "synthetic", 0.5, 3.0, None))
    [line] = fidelity_lines(headless)
    assert "first choice" not in line
    [line] = fidelity_lines(replace(plan, init="joint-svd", fidelity=None))
    assert line.startswith("Residual of the sites: median 0.150")


# Any width


def at_width(table: Shown, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


LONG = "vision_tower.vision_model.encoder.layers.{}.self_attn"
FRONTIER = [
    FrontierPoint(2_000_000_000 - number, 0.01, 0.02, ((LONG.format(2 * number), "concat-half", 32),))
    for number in range(4)
]
TABLES = {
    "costs": cost_table(replace(calibrated_plan(), sites=(replace(calibrated_site(0, 0.1), fqn=LONG.format(0)),))),
    "sensitivities": sensitivity_table(
        [Sensitivity(LONG.format(0), "grouped-shuffled", 48, 1_234_567_890, 0.1234, 0.00123)]
    ),
    "frontier": frontier_table(FRONTIER, 3_000_000_000),
    "sites": Shown(
        site_table(
            [AttentionSite(LONG.format(n), "x", 16, 80, 160, None, None, None, modes=tuple(MODES)) for n in (0, 2)]
        )
    ),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit_and_neither_numbers_nor_words_are_broken(name: str, width: int) -> None:
    table = TABLES[name]
    text = at_width(table, width)
    numbers = {row[place] for row in table.view.rows for place in table.view.right if row[place]}
    assert max(map(len, text.splitlines())) <= width
    assert all(number in text for number in numbers)
    # Whatever is between spaces is a word of the table, or one that says itself that it lost its middle.
    cells = [table.view.caption, *table.view.headers, *(cell for row in table.view.rows for cell in row)]
    words = {word for cell in cells for word in cell.split()}
    assert ("━" in text) is (name in ("sensitivities", "frontier") and width > 60)
    for word in text.split():
        assert word in words or "\u2026" in word or set(word) == {"─"}, word
    if width == 200:
        assert "\u2026" not in text
