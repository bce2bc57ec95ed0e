"""Records of sizes: what is measured again takes its old row's place, and what was not asked for is not made."""

from typing import Any

from equal_sizes import Once, beside, markdown


def record(command: str, seconds: float | None, *rows: tuple[float, str, float]) -> dict[str, Any]:
    return {
        "command": command,
        "environment": {"torch": "2", "timm": "1", "system": "one"},
        "parameters": 100,
        "images": 4,
        "test_crops": 2,
        "seconds_of_measuring": seconds,
        "rows": [
            {
                "size": size,
                "method": method,
                "parameters": round(100 - size),
                "class": value,
                "patches": value,
                "seconds": 1.0,
            }
            for size, method, value in rows
        ],
    }


def test_rows_measured_again_take_their_place_and_new_ones_come_after() -> None:
    old = record("all", 300.0, (8.5, "a", 0.9), (8.5, "b", 0.8), (15.0, "a", 0.7), (15.0, "b", 0.6))
    new = record("some", None, (8.5, "b", 0.85), (8.5, "c", 0.5), (15.0, "b", 0.65), (15.0, "c", 0.4))
    both = beside(old, {**new, "seconds_of_searching": 60.0})
    assert [(row["size"], row["method"], row["class"]) for row in both["rows"]] == [
        (8.5, "a", 0.9),
        (8.5, "b", 0.85),
        (8.5, "c", 0.5),
        (15.0, "a", 0.7),
        (15.0, "b", 0.65),
        (15.0, "c", 0.4),
    ]
    assert (both["seconds_of_measuring"], both["seconds_of_searching"]) == (300.0, 60.0)
    assert (both["command"], both["again"]) == ("all", "some")
    page = markdown(both)
    assert "(300 s, not in the rows below)" in page
    assert "(60 s, not in the rows below)" in page
    assert "by `some`" in page
    assert "was measured" not in markdown(new)


def test_what_all_sizes_share_is_made_once_and_when_asked_for() -> None:
    made: list[int] = []
    once = Once("counting", lambda: made.append(1) or len(made))
    assert made == []
    assert once.seconds is None
    assert (once(), once()) == (1, 1)
    assert once.seconds is not None
