"""The report of a conversion: one page of HTML that opens anywhere, offline, and says what was won and what it cost."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from armour_surgery.records import Fidelity, FrontierPoint, MlpPlan, Sensitivity, SitePlan, SurgeryPlan
from armour_surgery.report.elements import NONE, Row, bar, code, facts, figure, numbers, section, table, tile
from armour_surgery.report.figures import frontier_figure, sensitivity_figure
from armour_surgery.report.style import inline_svg
from armour_surgery.report.whole_file import check_target, write_whole
from armour_surgery.report.wording import (
    GRADES,
    NEEDS_TRAINING,
    UNTIL_TRAINED,
    fidelity_figures,
    measured_on,
    needs_training,
    verdict,
)
from armour_surgery.spelled import change, millions, names_only, way
from armour_surgery.tabular import Table

__all__ = ["Making", "check_report", "html_report", "write_html"]

_STYLE = Path(__file__).with_name("page.css")
# Where bars are full, on every page alike.
_FULL_RESIDUAL, _FULL_LOSS = 1.0, round(1 - GRADES[1].cosine, 4)
_RESIDUAL = {
    "wq": "relative distance between the weight that the merged role had and the shared one, in the Frobenius norm",
    "calibrated": "relative error of the attention's output on images that nothing was fitted to",
}
_RESIDUAL_OF_WEIGHTS = "relative error of attention logits and values that the weights imply; no images were used"


class Making(NamedTuple):
    """How a page came about: the command line, when it ran, and the versions of what it ran with."""

    command: str
    date: str
    versions: Mapping[str, str]


def html_report(
    surgery: SurgeryPlan,
    name: str,
    sensitivities: Sequence[Sensitivity] = (),
    frontier: Sequence[FrontierPoint] = (),
    folder: str | None = None,
    made: Making | None = None,
    speed: Table | None = None,
) -> str:
    """A whole page about a conversion: style and figures are inside, and it loads nothing.

    Everything in it follows from the arguments, and equal arguments give equal text. `name` is the title; `folder` is
    where the model was saved, None where it was not. `made` says how the page came about, and `speed` is a benchmark's
    table, where there is one. Names may hold anything, they are escaped; of paths the page has the last names alone,
    for it is there to be handed on.
    """
    name = names_only(name)
    title = f"{name}: Armour surgery"
    sections = [
        _fidelity(surgery),
        section("Before and after", _costs(surgery)),
        _speed(speed),
        section("Sites", _sites(surgery.sites)),
        _mlps(surgery.mlps),
        _refused(surgery),
        _sensitivities(sensitivities),
        _frontier(surgery, frontier),
        section("How to load it", _loading(folder)) if folder is not None else "",
        section("What it came from", _origin(surgery)),
        _making(made),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # The page says itself that nothing may be loaded or run.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title>",
            f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>",
            "</head>",
            "<body>",
            "<main>",
            _header(surgery, name),
            _tiles(surgery),
            *filter(None, sections),  # one that has nothing to show is empty
            "<footer>Written by armour-surgery. The method: Armour, arXiv 2108.01778. MACs are multiply-accumulates of "
            "one forward pass on one image.</footer>",
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def check_report(path: str | Path) -> None:
    """Make sure that a report may be written at `path`, before the work that it is about begins.

    Raises:
        FolderError: `path` is a folder or a device, or its folder is missing or cannot be written to.
    """
    check_target(path, "report")


def write_html(path: str | Path, text: str) -> Path:
    """Write a page, whole or not at all.

    Raises:
        FolderError: it cannot be written there, see `check_report`, or the disk refuses.
    """
    # A name that came from a file system may hold what UTF-8 cannot.
    return write_whole(path, text.encode("utf-8", "replace"), "report")


def _change(before: float, after: float) -> str:
    # A true minus sign is as wide as a plus.
    return change(before, after, of_nothing="").replace("-", "\u2212")


def _short(count: int) -> str:
    return millions(count, digits_of_billions=3)


def _way(mode: str, rank: int | None) -> str:
    return way(code(mode), rank, separator=" ")


def _header(surgery: SurgeryPlan, name: str) -> str:
    total = len(surgery.sites) + len(surgery.refused)
    ways = Counter((site.mode, site.rank) for site in surgery.sites)
    shared = ", ".join(f"{count} \u00d7 {_way(mode, rank)}" for (mode, rank), count in ways.items()) or "none"
    narrower = f", {len(surgery.mlps)} MLPs narrowed" if surgery.mlps else ""
    origin = (
        code(names_only(surgery.source.name)) if surgery.source and surgery.source.name else "A model built in Python"
    )
    return (
        f'<header>\n<p class="eyebrow">Armour surgery</p>\n<h1>{escape(name)}</h1>\n'
        f"<p>{origin} with {len(surgery.sites)} of {total} attentions converted ({shared}){narrower}; weights chosen "
        f"by {code(surgery.init)}.</p>\n</header>"
    )


def _tiles(surgery: SurgeryPlan) -> str:
    """The few numbers that most readers came for, in large letters."""
    tiles = [
        _cost_tile("parameters", surgery.params_before, surgery.params_after),
        _cost_tile("MACs per image", surgery.macs_before, surgery.macs_after),
    ]
    if surgery.fidelity is not None:
        figures = fidelity_figures(surgery.fidelity)
        tiles.append(_fidelity_tile("cosine to the original", figures.cosine, surgery.fidelity))
        if figures.agreement is not None:
            tiles.append(_fidelity_tile("same first choice", figures.agreement, surgery.fidelity))
        else:
            tiles.append(_fidelity_tile("signal to noise", figures.sqnr, surgery.fidelity))
    body = "\n".join(tiles)
    return f'<dl class="tiles">\n{body}\n</dl>'


def _cost_tile(label: str, before: int, after: int) -> str:
    return tile(label, _change(before, after) or NONE, f"{_short(before)} \u2192 {_short(after)}")


def _fidelity_tile(label: str, value: str, near: Fidelity) -> str:
    return tile(label, value, f"{near.images} held-out images")


def _fidelity(surgery: SurgeryPlan) -> str:
    title = "How near it is to the original"
    near = surgery.fidelity
    if near is None:
        return section(title, f'<p class="verdict">{_unmeasured(surgery)}</p>')
    figures = fidelity_figures(near)
    noise = _share(10 ** (-near.sqnr_db / 10))
    named = [
        ("measured on", f"{escape(measured_on(near))}: nothing was fitted to them"),
        ("cosine", f"{figures.cosine}, mean over the final features\u2019 tokens; 1 is equal"),
        ("signal to noise", f"{figures.sqnr}: the difference has {noise} of the features\u2019 energy"),
    ]
    if figures.agreement is not None:
        named.append(("same first choice", f"{figures.agreement} of the images get the class that they had"))
    return section(title, f'<p class="verdict">{escape(verdict(near))} No labels were used.</p>', facts(named))


def _unmeasured(surgery: SurgeryPlan) -> str:
    if needs_training(surgery):
        return (
            f"<strong>{NEEDS_TRAINING}</strong> <code>wq</code> keeps one projection\u2019s weights for both "
            f"purposes, which the network was not trained for: {UNTIL_TRAINED}"
        )
    return "It was not compared with the original on images. Evaluate it before you rely on it."


def _share(value: float) -> str:
    return f"{100 * value:.2g} %" if value >= 1e-6 else "less than 0.0001 %"


def _costs(surgery: SurgeryPlan) -> str:
    params_before = params_after = macs_before = macs_after = 0
    for site in surgery.sites:
        params_before += site.params_before
        params_after += site.params_after
        macs_before += site.macs_before
        macs_after += site.macs_after
    # An em space sets the line under the one that it is a part of.
    part = "\u2003of the converted attentions"
    rows = [
        _cost_row("parameters", surgery.params_before, surgery.params_after),
        _cost_row(part, params_before, params_after),
        _cost_row("MACs per image", surgery.macs_before, surgery.macs_after),
        _cost_row(part, macs_before, macs_after),
    ]
    return table({"": "", "before": "number", "after": "number", "change": "number"}, rows)


def _cost_row(label: str, before: int, after: int) -> Row:
    return Row((label, f"{before:,}", f"{after:,}", _change(before, after)))


def _speed(measured: Table | None) -> str:
    """A benchmark as it was measured; its caption says where and how."""
    if measured is None:
        return ""
    columns = {title: "number" if place in measured.right else "" for place, title in enumerate(measured.headers)}
    rows = [Row([escape(names_only(cell)) for cell in row]) for row in measured.rows]
    return section("Speed", table(columns, rows), f'<p class="note">{escape(measured.caption)}.</p>')


def _mlps(mlps: Sequence[MlpPlan]) -> str:
    """A row for each MLP that got narrower."""
    if not mlps:
        return ""
    rows = []
    for mlp in mlps:
        residual = NONE if mlp.residual is None else f"{mlp.residual:.4f}"
        hidden = f"{mlp.hidden_after:,} of {mlp.hidden_before:,}"
        numbers = _cost_row("", mlp.params_before, mlp.params_after).cells[1:]
        rows.append(Row((code(mlp.fqn), hidden, residual, *numbers)))
    names = ("hidden channels", "residual", "parameters", "after", "change")
    return section("MLPs", table({"MLP": "", **dict.fromkeys(names, "number")}, rows))


def _sites(sites: Sequence[SitePlan]) -> str:
    """A row for each site; ranks, fitted steps and residuals have a column where any site has them."""
    ranks = any(site.rank is not None for site in sites)
    steps = any(site.steps for site in sites)
    residuals = [site.residual for site in sites if site.residual is not None]
    columns = {"attention": "", "mode": ""}
    if ranks:
        columns["rank"] = "number"
    columns["init"] = ""
    if steps:
        columns["fitted"] = "small"
    if residuals:
        columns["residual"] = "number"
    columns |= {"parameters": "number", "after": "number", "change": "number"}
    rows = []
    for site in sites:
        cells = [code(site.fqn), code(site.mode)]
        if ranks:
            cells.append(str(site.rank) if site.rank is not None else "all")
        cells.append(code(site.init))
        if steps:
            cells.append(escape(", ".join(site.steps)) or NONE)
        if residuals:
            cells.append(bar(site.residual, _FULL_RESIDUAL))
        cells += [f"{site.params_before:,}", f"{site.params_after:,}", _change(site.params_before, site.params_after)]
        rows.append(Row(cells))
    listed = table(columns, rows)
    if not residuals:
        return listed
    meanings = "; ".join(dict.fromkeys(map(_meaning, sites)))
    return (
        f'{listed}\n<p class="note">Residual: {meanings}. 0 means that nothing was lost. A bar is full at '
        f"{_FULL_RESIDUAL:g}, where the difference is as large as the output.</p>"
    )


def _meaning(site: SitePlan) -> str:
    """What the residual of a site is; see `SitePlan`."""
    narrowed = site.init == "wq" and site.rank is not None
    return _RESIDUAL_OF_WEIGHTS if narrowed else _RESIDUAL.get(site.init, _RESIDUAL_OF_WEIGHTS)


def _refused(surgery: SurgeryPlan) -> str:
    if not surgery.refused:
        return ""
    rows = [Row((code(site.fqn), escape(site.reason))) for site in surgery.refused]
    return section("Left as they were", table({"attention": "", "reason": ""}, rows))


def _sensitivities(sensitivities: Sequence[Sensitivity]) -> str:
    if not sensitivities:
        return ""
    columns = {
        "attention": "",
        "mode": "",
        "parameters saved": "number",
        "residual": "number",
        "loss": "number",
    }
    rows = []
    for trial in sensitivities:
        cells = (
            code(trial.fqn),
            _way(trial.mode, trial.rank),
            f"{trial.params_saved:,}",
            f"{trial.residual:.4f}",
            bar(trial.loss, _FULL_LOSS),
        )
        rows.append(Row(cells))
    return section(
        "What each site costs alone",
        "<p>Each attention converted by itself, all others as they were. Loss is 1 minus the mean cosine of the "
        "model\u2019s final features to the original\u2019s, residual the relative error of the attention\u2019s own "
        "output, both on held-out images. A bar is full at a loss "
        f"of {_FULL_LOSS:g}, from where on features are no longer close.</p>",
        # The page has titles of its own.
        figure(inline_svg(sensitivity_figure(sensitivities, title=""), "Loss and residual of each site")),
        numbers(columns, rows),
    )


def _frontier(surgery: SurgeryPlan, points: Sequence[FrontierPoint]) -> str:
    if not points:
        return ""
    chosen = surgery.chosen(points)
    columns = {
        "parameters": "number",
        "change": "number",
        "predicted loss": "number",
        "measured loss": "number",
        "sites converted": "number",
    }
    rows = []
    for point in sorted(points, key=lambda point: -point.params):
        cells = (
            f"{point.params:,}",
            _change(surgery.params_before, point.params),
            f"{point.predicted:.4f}",
            f"{point.measured:.4f}" if point.measured is not None else NONE,
            str(len(point.sites)),
        )
        rows.append(Row(cells, "chosen" if point is chosen else ""))
    drawn = frontier_figure(points, surgery.params_before, surgery.max_loss, chosen)
    return section(
        "Parameters against loss",
        "<p>Each point is a choice of attentions to convert. Its predicted loss is the sum of what they cost alone; "
        "where it was tried as a whole, its loss on held-out images stands beside.</p>",
        figure(inline_svg(drawn, "Parameters against loss")),
        numbers(columns, rows),
    )


def _loading(folder: str) -> str:
    text = f"from armour_surgery import load\n\nmodel = load({json.dumps(Path(folder).name, ensure_ascii=False)})"
    return (
        f"<pre><code>{escape(text)}</code></pre>\n<p>A model of the class that it was before, in eval mode. It trains, "
        "exports and compiles like the original.</p>"
    )


def _origin(surgery: SurgeryPlan) -> str:
    source = surgery.source
    if source is None:
        return "<p>A model built in Python; nothing was recorded about how to build it again.</p>"
    named = [
        ("model", code(names_only(source.name or source.architecture))),
        ("library", escape(source.library)),
        ("architecture", code(source.architecture)),
    ]
    if source.revision:
        named.append(("revision", code(source.revision)))
    named.append(("license", escape(source.license or "unknown")))
    inputs = []
    for name, shape, _ in surgery.example:
        # The first axis is the batch, which is the caller's to choose.
        sizes = " \u00d7 ".join(map(str, shape[1:]))
        inputs.append(f"{code(name)} {sizes}")
    if inputs:
        named.append(("input", ", ".join(inputs)))
    return facts(named)


def _making(made: Making | None) -> str:
    if made is None:
        return ""
    versions = ", ".join(f"{name} {number}" for name, number in made.versions.items())
    named = [("command", code(made.command)), ("date", escape(made.date)), ("versions", escape(versions))]
    return section("How it was made", facts(named))
