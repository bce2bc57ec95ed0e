"""The paper's throughput again, on small networks; its tables for people; and the recipes that it names."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import document, failed, good
from torch import nn

from armour_surgery.benchmarking.environment import environment
from armour_surgery.hosts import build
from armour_surgery.paper import reproduction, throughput
from armour_surgery.paper.printed import RECIPES, ROWS, PaperRow
from armour_surgery.paper.reproduction import Cell, ReproducedRow, Reproduction, regenerate
from armour_surgery.paper.throughput import RowSpeed, devices, time_group
from armour_surgery.paper.views import markdown_page, notes, remarks, views
from armour_surgery.records import Source
from armour_surgery.recover.recipe_files import load_recipe, recipe_names

# Two kinds of attention in one table, and something else to hold against the first.
SMALL = (
    PaperRow(1, "A", "test_vit", "qv", params="0.3", top1="71.0%", gpu="1,100", cpu="12.0"),
    PaperRow(1, "A base", "test_vit", params="0.4", top1="70.0%", gpu="1,000", cpu="10.0"),
    PaperRow(1, "Else", "test_efficientnet", params="0.4", gpu="1,500"),
    PaperRow(3, "B base", "test_vit2", params="0.4", gpu="500"),
    PaperRow(3, "B", "test_vit2", "qv", params="0.4", params_change="-9.9%", gpu="510", gpu_change="+9.0%"),
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "ROWS", SMALL)


@pytest.fixture(scope="module")
def timed() -> Reproduction:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduction, "ROWS", SMALL)
        return regenerate(budget_s=0.5, devices=("cpu",))


# Timing


def test_every_row_is_timed_with_what_it_is_held_against(timed: Reproduction) -> None:
    speeds = {row.name: row.speed["cpu"] for row in timed.rows}
    assert {name: speed.against for name, speed in speeds.items()} == {
        **dict.fromkeys(("A", "A base", "Else"), "test_vit"),
        **dict.fromkeys(("B", "B base"), "test_vit2"),
    }
    for name, speed in speeds.items():
        assert speed.images_per_s == pytest.approx(1000 * speed.batch_size / speed.latency_ms)
        assert speed.rounds >= 2
        assert speed.rounds % 2 == 0
        if name.endswith("base"):
            assert speed.ratio is speed.ratio_iqr is None
        else:
            assert speed.ratio is not None
            assert speed.ratio_iqr is not None
            assert 0 < speed.ratio_iqr[0] <= speed.ratio <= speed.ratio_iqr[1]
    # Rows of one group saw the same rounds.
    assert speeds["A"].rounds == speeds["A base"].rounds == speeds["Else"].rounds
    assert timed.environments == {"cpu": environment("cpu")}


def test_what_was_measured_stands_in_the_papers_cell(timed: Reproduction) -> None:
    first = timed.rows[0]
    cells = {cell.column: cell for cell in first.cells}
    assert cells["cpu"] == Cell("cpu", "12.0", f"{first.speed['cpu'].images_per_s:,.1f}", "measured")
    assert (cells["gpu"].ours, cells["gpu"].status) == ("not run", "paper")  # no CPU's number goes there
    assert (cells["top1"].ours, cells["top1"].status) == ("not run", "paper")
    assert first.paper_ratio == pytest.approx({"gpu": 1.1, "cpu": 1.2})
    assert first.macs_ratio is not None
    assert first.macs_ratio > 1
    data = timed.to_dict()
    assert data["environment"]["cpu"]["threads"] == torch.get_num_threads()
    row = data["tables"][0]["rows"][0]
    assert {"batch_size", "images_per_s", "latency_ms", "against", "ratio", "ratio_iqr", "rounds"} == set(
        row["speed"]["cpu"]
    )


class Noted(Exception):
    """Ends a comparison once its arguments are known."""


@pytest.mark.parametrize(("macs", "batch"), [(10**6, 16), (10**9, 16), (1_100_000_000, 8), (5 * 10**9, 2), (10**12, 1)])
def test_large_networks_get_small_batches(macs: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def compare(models: Any, make_input: Any, **options: Any) -> None:
        seen.update(names=list(models), shape=make_input().shape, **options)
        raise Noted

    monkeypatch.setattr(throughput, "compare", compare)
    networks = {("a", ""): nn.Linear(2, 2), ("a", "qv"): nn.Linear(2, 2)}
    with pytest.raises(Noted):
        time_group(networks, (3, 5, 7), macs, "cpu", 100.0)
    assert seen["names"] == ["a", "a qv"]
    assert tuple(seen["shape"]) == (batch, 3, 5, 7)
    # Warming up and the rounds have less than the whole.
    assert len(networks) * seen["warmup_s"] + seen["budget_s"] == pytest.approx(95.0)


def test_time_is_shared_by_networks_and_what_is_left_goes_on(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[tuple[str, float]] = []

    def instead(networks: Any, image: Any, macs: int, device: str, budget_s: float) -> tuple[dict[Any, Any], Any]:
        shares.append((device, budget_s))
        speed = RowSpeed(16, 10.0, 1600.0, "x", None, None, 2)
        return dict.fromkeys(networks, speed), environment("cpu")

    monkeypatch.setattr(reproduction, "time_group", instead)
    monkeypatch.setattr(reproduction, "_build", lambda *_: (nn.Identity(), reproduction._Cost(1, 1, 1)))
    monkeypatch.setattr(reproduction, "_image", lambda _: (3, 8, 8))
    regenerate(budget_s=100.0, devices=("cpu", "cuda"))
    # Five networks, three of them first, on two devices; no time passes.
    assert [device for device, _ in shares] == ["cpu", "cuda"] * 2
    wanted = [100 * 3 / 10, 100 * 3 / 7, 100 * 2 / 4, 100 * 2 / 2]
    assert [share for _, share in shares] == pytest.approx(wanted, rel=0.01)


def test_networks_without_weights_get_some() -> None:
    model = build(Source("timm", "test_vit"))
    networks = {("test_vit", ""): model}
    found, _ = time_group(networks, (3, 160, 160), 10**7, "cpu", 0.1)
    assert found["test_vit", ""].images_per_s > 0
    assert not any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        assert bool(model(torch.randn(1, 3, 160, 160)).isfinite().all())


def test_the_cpu_is_always_timed() -> None:
    assert devices()[0] == "cpu"
    assert ("cuda" in devices()) is torch.cuda.is_available()


# For people


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


# The command


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
