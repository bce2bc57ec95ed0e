"""A file of results that grows by runs, so that they can be made one by one, and side by side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from armour_surgery.benchmarking.environment import environment

Run = dict[str, Any]


def add_run(
    out: Path, found: Run, key: Callable[[Run], tuple[Any, ...]], markdown: Callable[[Run], str], **told: Any
) -> None:
    """Put a run among those that the file holds, in place of an earlier one of the same `key`, and sort by it.

    `markdown` makes a page of the whole record, which is written beside the file; `told` goes into the record.
    """
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"] if out.exists() else []
    runs = sorted([*(run for run in runs if key(run) != key(found)), found], key=key)
    record = {"environment": environment().to_dict(), **told, "runs": runs}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
