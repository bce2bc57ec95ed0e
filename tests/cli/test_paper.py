"""`paper` tells a person and a script the same tables, and writes them as a page."""

import re
from pathlib import Path
from typing import Any

import pytest
from command_line import document, failed, good
from typer.testing import CliRunner  # noqa: TID251

from armour_surgery.cli import app
from armour_surgery.paper import reproduction
from armour_surgery.paper import reproduction as measured
from armour_surgery.paper.reproduction import Reproduction
from armour_surgery.paper.throughput import devices


@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    """What `paper --no-speed --json` prints, for rows of every table that are quick to count.

    paper/test_reproduction.py counts them all, paper/test_throughput.py times small ones.
    """
    quick = [("deit_tiny_patch16_224", ""), ("deit_tiny_patch16_224", "qv"), ("efficientnet_b0", "")]
    quick += [("levit_128s", ""), ("levit_192", "")]
    rows = tuple(row for row in measured.ROWS if (row.model, row.mode) in quick)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "ROWS", rows)
        found = document("paper", "--no-speed")
    assert sum(len(table["rows"]) for table in found["tables"]) == len(rows)
    return found


# Without timing


def test_paper_json_counts_rows(paper: dict[str, Any]) -> None:
    assert [table["table"] for table in paper["tables"]] == [1, 2, 3, 4]
    assert all(table["caption"] and table["rows"] for table in paper["tables"])
    rows = [row for table in paper["tables"] for row in table["rows"]]
    assert all(row["params"] > 0 and row["macs"] > 0 for row in rows)
    tiny = {row["mode"]: row["params"] for row in rows if row["model"] == "deit_tiny_patch16_224"}
    assert (tiny[""], tiny["qv"]) == (5_717_416, 5_272_744)
    cells = [cell for row in rows for cell in row["cells"].values()]
    assert {cell["status"] for cell in cells} <= {"same", "explained", "differs", "paper"}
    assert all(cell["note"] for cell in cells if cell["status"] in ("explained", "differs"))
    assert any(row["model"] == "efficientnet_b0" for row in rows)


def test_paper_for_a_person(paper: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuple(
        measured.ReproducedRow(
            table=table["table"],
            **{key: value for key, value in row.items() if key != "cells"},
            cells=tuple(measured.Cell(column=column, **cell) for column, cell in row["cells"].items()),
        )
        for table in paper["tables"]
        for row in table["rows"]
    )
    monkeypatch.setattr(measured, "regenerate", lambda progress, **_: measured.Reproduction(rows))
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["paper", "--no-speed"])
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stderr == ""
    for number in range(1, 5):
        assert f"Table {number}." in result.stdout
    assert "5,272,744" in result.stdout
    assert "5,717,416" in result.stdout
    assert "it was not run here" in " ".join(result.stdout.split())
    assert "deit_tiny_qv_300ep" in result.stdout


# With it


def test_the_command_times_and_writes_a_page(
    timed: Reproduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    asked: dict[str, Any] = {}

    def instead(progress: Any, **options: Any) -> Reproduction:
        asked.update(options)
        return timed

    monkeypatch.setattr(reproduction, "regenerate", instead)
    # This process goes on.
    monkeypatch.setattr("armour_surgery.benchmarking.speed.keep_memory", lambda: kept.append(True))
    page = tmp_path / "paper.md"
    found = document("paper", "--budget", "7", "--markdown", str(page))
    assert kept == [True]
    assert asked == {"budget_s": 7.0, "devices": devices()}
    rows = [row for table in found["tables"] for row in table["rows"]]
    assert all(row["speed"]["cpu"]["images_per_s"] > 0 for row in rows)
    text = page.read_text(encoding="utf-8")
    assert "armour-surgery paper --budget 7 --markdown paper.md" in text
    assert str(tmp_path) not in text
    document("paper", "--no-speed")
    assert asked["devices"] == ()


def test_a_page_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    error = failed("paper", "--markdown", str(tmp_path / "absent" / "paper.md")).stderr
    assert "so the page paper.md cannot be written there; create it" in error
    error = failed("paper", "--markdown", str(tmp_path / "paper.txt"), code=2).stderr
    assert "does not end in .md; name it so" in error


def test_the_tables_fit_a_terminal(timed: Reproduction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "regenerate", lambda *_, **__: timed)
    result = good("paper", "--no-speed")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert re.search(r"510 1\.020 \[\d]", result.stdout)
