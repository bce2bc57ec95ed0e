"""`coverage`: a seeded sample of a library, and what cannot be asked."""

from pathlib import Path

from command_line import bad, document

SAMPLE = ("--library", "torchvision", "--sample", "2", "--seed", "225")


def test_a_sample_is_examined_and_written(here: Path) -> None:
    found = document("coverage", *SAMPLE, "--markdown", "page.md")
    assert set(found["libraries"]) == {"torchvision"}
    library = found["libraries"]["torchvision"]
    assert library["architectures"] == len(library["list"]) == 2
    assert library["errors"] == 0
    # Of torchvision 0.29 these are a ViT and a network of convolutions; others may have others.
    assert library["exact"] == library["convert_any"] <= library["with_attention"] <= 2
    page = Path("page.md").read_text(encoding="utf-8")
    assert f"`armour-surgery coverage {' '.join(SAMPLE)} --markdown page.md`" in page
    for entry in library["list"]:
        assert not entry["attention"] or f"| {entry['name']} |" in page


def test_what_cannot_be_asked_is_told_before_the_work(here: Path) -> None:
    assert "'jax'" in bad("coverage", "--library", "jax", code=2)
    assert "page.txt" in bad("coverage", "--markdown", "page.txt", code=2)
