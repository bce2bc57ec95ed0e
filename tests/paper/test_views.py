"""The paper's tables for people, and the recipes that they name."""

import re
from dataclasses import replace
from pathlib import Path

from small_paper import SMALL

from armour_surgery.benchmarking.environment import environment
from armour_surgery.paper.printed import RECIPES, ROWS
from armour_surgery.paper.reproduction import Cell, ReproducedRow, Reproduction
from armour_surgery.paper.views import markdown_page, notes, remarks, views
from armour_surgery.recover.recipe_files import load_recipe, recipe_names


def test_every_table_has_its_columns(timed: Reproduction) -> None:
    found = views(timed)
    assert [view.caption.partition(".")[0].partition(",")[0] for view in found] == [
        "Table 1", "Table 1", "Table 3", "Table 3", "ImageNet top-1",
    ]  # fmt: skip
    assert all(len(row) == len(view.headers) for view in found for row in view.rows)
    sizes, speeds = found[2], found[3]
    assert sizes.headers == ("model", "mode", "parameters", "paper, M", "change", "MACs, M", "ratio")
    assert speeds.headers == ("model", "batch", "CPU im/s", "ratio", "quartiles", "MACs", "paper's GPU")
    base, armour = speeds.rows
    assert base[3:] == ("-", "-", "-", "500")
    assert f"{timed.rows[-1].speed['cpu'].ratio:.3f}" == armour[3]
    told = "the paper prints +9.0%: the paper's own throughputs, 500 and 510, give +2.0%"
    [number] = [number for number, note in enumerate(notes(timed), 1) if note.startswith(told)]
    assert armour[-1] == f"510 1.020 [{number}]"


def test_two_devices_have_a_table_each_that_fits_a_terminal(timed: Reproduction) -> None:
    rows = [replace(row, speed=dict.fromkeys(("cpu", "cuda"), row.speed["cpu"])) for row in timed.rows]
    speeds = [view for view in views(replace(timed, rows=tuple(rows))) if "throughput" in view.caption]
    assert [view.caption.rpartition(", ")[2] for view in speeds] == ["CPU", "GPU"] * 2
    assert "GPU im/s" in speeds[1].headers
    assert not any("CPU" in header for header in speeds[1].headers)
    for view in speeds:
        assert max(map(len, view.table().text(80, 99).splitlines())) <= 80


def test_without_timing_the_papers_numbers_are_alone() -> None:
    row = ReproducedRow(2, "X", "x", "", 10, 9, 1000, None, (Cell("cpu", "77.6", "not run", "paper"),))
    result = Reproduction((row,))
    assert views(result)[1].headers == ("model", "MACs", "paper's CPU")
    text = " ".join(remarks(result))
    assert "it was not run here" in text
    assert "No GPU was used" in text


def test_the_page_is_sound_markdown(timed: Reproduction) -> None:
    page = markdown_page(timed, "armour-surgery paper --budget 1")
    assert page.startswith("# ")
    assert "```\narmour-surgery paper --budget 1\n```" in page
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert len(re.findall(r"^## ", page, re.MULTILINE)) == 6
    assert environment("cpu").processor in page
    assert all(row.name in page for row in SMALL)


def test_the_page_links_to_recipes_that_are_there() -> None:
    rows = tuple(
        ReproducedRow(1, name, "x", "", 1, 1, 1, None, (Cell("top1", "72.0%", "not run", "paper"),), recipe)
        for name, recipe in [*RECIPES.items(), ("EfficientNet-B0", "")]
    )
    page = markdown_page(Reproduction(rows), "x")
    links = re.findall(r"\((\S+\.yaml)\)", page)
    docs = Path(__file__).parents[2] / "docs"
    assert len(links) == len(RECIPES)
    assert all((docs / link).is_file() for link in links)
    assert "| EfficientNet-B0 | 72.0% | not run | - |" in page


def test_recipes_train_what_their_rows_are() -> None:
    trained = [row for row in ROWS if row.top1 and row.name != "EfficientNet-B0"]
    assert {row.name for row in trained} == set(RECIPES) <= {row.name for row in ROWS}
    assert set(RECIPES.values()) <= set(recipe_names())
    for row in trained:
        recipe = load_recipe(RECIPES[row.name])
        assert recipe.written_for == row.model
        assert (recipe.model.mode or "") == row.mode
