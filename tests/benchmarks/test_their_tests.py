"""What differs between two runs of a library's tests is told, with the reason or as not known."""

import json
from pathlib import Path

from their_tests import Outcome, compare, page, run_tests


def written(path: Path, told: list[tuple[str, str, str, int]]) -> Path:
    lines = [
        json.dumps({"test": test, "outcome": outcome, "message": message, "converted": converted, "sites": converted})
        for test, outcome, message, converted in told
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_one_part_that_fails_is_what_became_of_a_test(tmp_path: Path) -> None:
    record = written(
        tmp_path / "kept.jsonl",
        [
            ("parts", "passed", "", 1),
            ("parts", "failed", "the second", 2),
            ("parts", "failed", "the third", 3),
            ("parts", "passed", "", 4),
            ("skipped", "skipped", "why", 0),
        ],
    )
    # It is there already, so no test runs.
    outcomes = run_tests("timm", tmp_path / "nowhere", True, "", record)
    assert outcomes == {
        "parts": Outcome("failed", "the second", 4, 4),
        "skipped": Outcome("skipped", "why", 0, 0),
    }


def test_differences_are_explained_or_not() -> None:
    script = "UsageError: torch.jit.script cannot read ArmourAttention, whose forward was generated"
    before = {name: Outcome() for name in ("same", "script", "broken", "resnet")} | {
        "both": Outcome("failed", "no hub")
    }
    after = {
        "same": Outcome(converted=1, sites=12),
        "script": Outcome("failed", script, 2, 24),
        "broken": Outcome("failed", "KeyError: 'a|b'", 1, 5),
        "resnet": Outcome(),
        "both": Outcome("failed", "no hub", 1, 3),
    }
    compared = compare("timm", before, after)
    assert compared.alike == {"passed": 1, "failed": 1}
    assert (compared.untouched, compared.models, compared.sites) == (1, 5, 44)
    assert compared.unexplained == ["broken"]
    text = page([compared], "command")
    assert "| timm | 4 | 5 | 44 | 1 | 1 | 2 |" in text
    assert r"| passed → failed | not known: KeyError: 'a\|b' | `broken` |" in text
    assert "- `both`: no hub" in text
