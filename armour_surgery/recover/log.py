"""What a run leaves to read: `log.jsonl` (every so many steps), `summary.csv` (every epoch), `curves.png`.

TensorBoard gets the same numbers where it is installed. After an interruption the files go on where the checkpoint was:
what was written later is dropped, so that no step is in them twice.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RunLog", "draw_curves", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a file so that at any time it has the old content or the new."""
    _write(path, text.encode())


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(content)
    os.replace(aside, path)


class RunLog:
    """The files of one run in `folder`, continued after `step`."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lines, self._summary = folder / "log.jsonl", folder / "summary.csv"
        # A run from the start leaves nothing of one that was here before.
        lines = _read_lines(self._lines) if step else []
        kept = [json.dumps(line) + "\n" for line in lines if line.get("step", 0) <= step]
        write_text(self._lines, "".join(kept))
        self.epochs = _read_epochs(self._summary, step) if step else []
        self._board = _tensorboard(folder, step)

    def step(self, values: Mapping[str, Any]) -> None:
        """One line of `log.jsonl`."""
        with self._lines.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dict(values)) + "\n")
        self._show("train", values)

    def epoch(self, values: Mapping[str, Any]) -> None:
        """One row of `summary.csv`."""
        self.epochs.append(dict(values))
        # Not every epoch is judged, so rows have different keys. They keep the order in which they first came.
        columns: dict[str, None] = {}
        for row in self.epochs:
            columns |= dict.fromkeys(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.epochs)
        write_text(self._summary, text.getvalue())
        self._show("epoch", values)

    def close(self) -> None:
        """Finish what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()

    def _show(self, kind: str, values: Mapping[str, Any]) -> None:
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, int | float) and key != "step":
                    self._board.add_scalar(f"{kind}/{key}", value, values["step"])


def draw_curves(folder: Path, epochs: Sequence[Mapping[str, Any]], start: Mapping[str, float]) -> Path | None:
    """`curves.png`, see `curves_figure`; None without a step."""
    lines = [line for line in _read_lines(folder / "log.jsonl") if "loss" in line]
    if not lines:
        return None
    # Only who draws waits for matplotlib.
    from armour_surgery.recover.curves import curves_figure
    from armour_surgery.report.style import save_figure

    return save_figure(folder / "curves.png", curves_figure(lines, epochs, start))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file; one that was cut short is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _read_epochs(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of `summary.csv` up to a step, without the columns that they leave empty."""
    if not path.is_file():
        return []
    epochs = []
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if int(row["step"]) <= step:
                epochs.append({key: _number(value) for key, value in row.items() if value})
    return epochs


def _number(text: str) -> Any:
    """What a CSV file holds as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _tensorboard(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # What the board has after the checkpoint is dropped there too.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)
