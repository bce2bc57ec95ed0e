"""How all figures look, and how they are written: to a file, or into a page."""

import io
import re
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from armour_surgery.errors import UsageError
from armour_surgery.report.whole_file import check_target, write_whole

__all__ = [
    "INK",
    "LEGEND",
    "MUTED",
    "PAPER",
    "RULE",
    "SERIES",
    "blank_figure",
    "check_figure",
    "inline_svg",
    "plain",
    "save_figure",
    "tidy",
]

# Each color has a name that a page may give another value to, for dark backgrounds; see `inline_svg`.
INK, MUTED, RULE, PAPER = "#1d2733", "#66727f", "#d8dee4", "#ffffff"
_VARIABLES = {
    PAPER: "paper",
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    "#2b6c8f": "series-1",
    "#c76f2a": "series-2",
    "#5b8c4a": "series-3",
    "#8a5a9e": "series-4",
    "#b0464f": "series-5",
}
SERIES = tuple(color for color, name in _VARIABLES.items() if name.startswith("series"))
LEGEND = {"frameon": False, "fontsize": 8.5, "labelcolor": INK, "handlelength": 1.6}
_FORMATS = (".png", ".svg", ".pdf")
_UNSIGNED = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def check_figure(path: str | Path) -> None:
    """Make sure that a figure may be written at `path`, before the work that it is about begins.

    Raises:
        UsageError: its name does not end in a format that figures have.
        FolderError: it is a folder or a device, or its folder is missing or cannot be written to.
    """
    if Path(path).suffix.lower() not in _FORMATS:
        raise UsageError(f"a figure cannot be written to {str(path)!r}; name a file that ends in {', '.join(_FORMATS)}")
    check_target(path, "figure")


def save_figure(path: str | Path, figure: Figure) -> Path:
    """Write a figure in the format that its name ends in (.png, .svg, .pdf), whole or not at all.

    Raises:
        UsageError, FolderError: see `check_figure`.
    """
    check_figure(path)
    kind = Path(path).suffix.lower()
    stream = io.BytesIO()
    # What matplotlib would write of itself and of the time differs between equal figures.
    nothing = {".png": {}, ".svg": _UNSIGNED, ".pdf": {"CreationDate": None}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "armour-surgery"}):
        figure.savefig(stream, format=kind[1:], dpi=160, facecolor=PAPER, metadata=nothing)
    return write_whole(path, stream.getvalue(), "figure")


def inline_svg(figure: Figure, label: str) -> str:
    """A figure as an `<svg>` element for a page: no identifiers that could clash, nothing loaded from elsewhere.

    Equal figures give equal text. Colors follow the page's `--paper`, `--ink`, `--muted`, `--rule` and `--series-1` to
    `-5` where it sets them. `label` is what a screen reader says; it must be escaped.
    """
    stream = io.StringIO()
    # The salt and the kind of text are read from matplotlib's settings only; they are put back at once.
    with matplotlib.rc_context({"svg.hashsalt": label, "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata=_UNSIGNED)
    text = stream.getvalue()
    # Without the XML head, which may only stand at the start of a file.
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Every drawing names its parts anew, and two of them on one page would share names. What refers to a part needs its
    # name, and that one is made with the salt.
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", text)
    # The page's own font instead of matplotlib's, which a reader may not have.
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name}, {color})")
    # As wide as its place, within reason: letters should not outgrow the page's own.
    size = f'style="max-width: {76 * figure.get_figwidth():.0f}pt"'
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{label}" {size}', text, count=1)


def blank_figure(width: float, height: float) -> Figure:
    """A figure of so many inches without a background, whose parts find their own room."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def tidy(axes: Axes) -> None:
    """The look of all axes with lines or bars."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axes.tick_params(axis="y", which="minor", length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9.5)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def plain(text: str) -> str:
    """Text in which a dollar sign is a dollar sign and not the start of a formula."""
    return text.replace("$", r"\$")
