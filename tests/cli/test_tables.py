"""Tables for people, on records made by hand."""

import io
from dataclasses import replace

from calibrated_plans import calibrated_plan
from rich.console import Console  # noqa: TID251
from rich.table import Table  # noqa: TID251

from armour_surgery.cli.tables import fidelity_lines, frontier_table, sensitivity_table
from armour_surgery.records import Fidelity, FrontierPoint, Sensitivity


def printed(table: Table) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def body(table: Table) -> list[str]:
    """The lines below the headers."""
    lines = printed(table)
    rule = next(place for place, line in enumerate(lines) if set(line.strip()) == {"─"})
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
        ">", "1.980", "M", "-1.0", "%", "0.02000", "0.01500", "blocks.0-1.attn", "(qv)",
    ]  # fmt: skip
    assert "nothing" in lines[0]
    assert lines[1].split()[-3:] == ["-", "blocks.0.attn", "(qv)"]
    assert "blocks.0-1.attn (qv); blocks.2.attn (qv, rank 32)" in lines[3]
    assert not any(">" in line for line in printed(frontier_table(points, 2_000_000)))


def test_a_long_frontier_is_thinned_out_and_keeps_what_matters() -> None:
    points = [point(number, 0.5 if number == 31 else None) for number in range(97)]
    table = frontier_table(points, 2_000_000, chosen=points[42])
    shown = list(map(str, table.columns[1].cells))
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
