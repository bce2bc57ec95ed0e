"""The report of a conversion: one page of HTML that opens anywhere, offline, and says what was won and what it cost."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from armour_surgery.records import Fidelity, FrontierPoint, Sensitivity, SitePlan, SurgeryPlan
from armour_surgery.report.figures import frontier_figure, sensitivity_figure
from armour_surgery.report.style import inline_svg
from armour_surgery.report.whole_file import check_target, write_whole

__all__ = ["check_report", "html_report", "write_html"]

_STYLE = Path(__file__).with_name("page.css")
_RESIDUAL = {
    "wq": "relative distance between the weight that the merged role had and the shared one, in the Frobenius norm",
    "calibrated": "relative error of the attention's output on images that nothing was fitted to",
}
_RESIDUAL_OF_WEIGHTS = "relative error of attention logits and values that the weights imply; no images were used"


def html_report(
    surgery: SurgeryPlan,
    name: str,
    sensitivities: Sequence[Sensitivity] = (),
    frontier: Sequence[FrontierPoint] = (),
    folder: str | None = None,
) -> str:
    """A whole page about a conversion: style and figures are inside, and it loads nothing.

    Everything in it follows from the arguments, and equal arguments give equal text. `name` is the title; `folder` is
    where the model was saved, None where it was not. Names may hold anything, they are escaped.
    """
    title = f"{name}: Armour surgery"
    sections = [
        _fidelity(surgery),
        _section("Before and after", _costs(surgery)),
        _section("Sites", _sites(surgery.sites)),
        _refused(surgery),
        _sensitivities(sensitivities),
        _frontier(surgery, frontier),
        _section("How to load it", _loading(folder)) if folder is not None else "",
        _section("What it came from", _origin(surgery)),
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
            *(section for section in sections if section),
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


def _section(title: str, *content: str) -> str:
    return "\n".join(["<section>", f"<h2>{title}</h2>", *content, "</section>"])


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _table(columns: Sequence[tuple[str, str]], rows: Iterable[tuple[Sequence[str], str]]) -> str:
    """A table; columns are (title, class), rows are (cells as HTML, class). A row's first cell is its heading."""
    head = "".join(f'<th scope="col"{_class(kind)}>{title}</th>' for title, kind in columns)
    body = []
    for cells, kind in rows:
        first, *rest = (f"{_class(column)}>{cell}" for cell, (_, column) in zip(cells, columns, strict=True))
        body.append(f'<tr{_class(kind)}><th scope="row"{first}</th>{"".join(f"<td{cell}</td>" for cell in rest)}</tr>')
    lines = "\n".join(body)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _change(before: float, after: float) -> str:
    # A true minus sign is as wide as a plus.
    return f"{100 * (after - before) / before:+.1f} %".replace("-", "\u2212") if before else ""


def _short(count: int) -> str:
    return f"{count / 1e9:,.3f} G" if count >= 1e9 else f"{count / 1e6:,.3f} M"


def _way(mode: str, rank: int | None) -> str:
    return _code(mode) + (f" rank {rank}" if rank is not None else "")


def _header(surgery: SurgeryPlan, name: str) -> str:
    total = len(surgery.sites) + len(surgery.refused)
    ways = Counter((site.mode, site.rank) for site in surgery.sites)
    shared = ", ".join(f"{count} \u00d7 {_way(*way)}" for way, count in ways.items())
    origin = _code(surgery.source.name) if surgery.source and surgery.source.name else "A model built in Python"
    return (
        f'<header>\n<p class="eyebrow">Armour surgery</p>\n<h1>{escape(name)}</h1>\n'
        f"<p>{origin} with {len(surgery.sites)} of {total} attentions converted ({shared}); weights chosen by "
        f"{_code(surgery.init)}.</p>\n</header>"
    )


def _tiles(surgery: SurgeryPlan) -> str:
    tiles = [
        ("parameters", surgery.params_before, surgery.params_after),
        ("MACs per image", surgery.macs_before, surgery.macs_after),
    ]
    shown = [
        (label, _change(before, after) or "\u2013", f"{_short(before)} \u2192 {_short(after)}")
        for label, before, after in tiles
    ]
    near = surgery.fidelity
    if near is not None:
        shown.append(("cosine to the original", f"{near.cosine:.4f}", f"{near.images} held-out images"))
        if near.agreement is not None:
            shown.append(("same first choice", f"{near.agreement:.1f} %", f"{near.images} held-out images"))
        else:
            shown.append(("signal to noise", f"{near.sqnr_db:.1f} dB", f"{near.images} held-out images"))
    body = "\n".join(f"<div><dt>{label}</dt><dd>{value}</dd><dd>{below}</dd></div>" for label, value, below in shown)
    return f'<dl class="tiles">\n{body}\n</dl>'


def _fidelity(surgery: SurgeryPlan) -> str:
    near = surgery.fidelity
    if near is None:
        return _section("How near it is to the original", f'<p class="verdict">{_unmeasured(surgery.init)}</p>')
    facts = [
        ("images", f"{near.images}, held out: nothing was fitted to them. Source: {_code(near.source)}"),
        ("cosine", f"{near.cosine:.4f}, mean over the final features\u2019 tokens; 1 is equal"),
        (
            "signal to noise",
            f"{near.sqnr_db:.1f} dB: the difference has {_share(10 ** (-near.sqnr_db / 10))} of the features\u2019 "
            "energy",
        ),
    ]
    if near.agreement is not None:
        facts.append(("same first choice", f"{near.agreement:.1f} % of the images get the class that they had"))
    return _section(
        "How near it is to the original",
        f'<p class="verdict">{_verdict(near)}</p>',
        _facts(facts),
    )


def _verdict(near: Fidelity) -> str:
    """In words. The bounds are a reader's aid; what they mean for a task, only its own test images tell."""
    if near.cosine >= 0.99:
        said = "It computes nearly the same features as the original."
    elif near.cosine >= 0.95:
        said = "Its features are close to the original\u2019s."
    elif near.cosine >= 0.8:
        said = "Its features resemble the original\u2019s; expect some accuracy to be lost until it is fine-tuned."
    else:
        return "Its features are far from the original\u2019s: it needs training."
    return f"{said} No labels were used: evaluate it on your own task before you rely on it."


def _unmeasured(init: str) -> str:
    if init == "wq":
        return (
            "<strong>It needs training.</strong> <code>wq</code> keeps one projection\u2019s weights for both "
            "purposes, which the network was not trained for: until it is fine-tuned, its accuracy is near chance."
        )
    return "It was not compared with the original on images. Evaluate it before you rely on it."


def _share(value: float) -> str:
    return f"{100 * value:.2g} %" if value >= 1e-6 else "less than 0.0001 %"


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return '<dl class="facts">' + "".join(f"\n<dt>{name}</dt><dd>{value}</dd>" for name, value in facts) + "\n</dl>"


def _costs(surgery: SurgeryPlan) -> str:
    sites = surgery.sites
    rows = [
        ("parameters", surgery.params_before, surgery.params_after),
        ("\u2003of the converted attentions", sum(s.params_before for s in sites), sum(s.params_after for s in sites)),
        ("MACs per image", surgery.macs_before, surgery.macs_after),
        ("\u2003of the converted attentions", sum(s.macs_before for s in sites), sum(s.macs_after for s in sites)),
    ]
    columns = [("", ""), ("before", "number"), ("after", "number"), ("change", "number")]
    return _table(
        columns,
        [((label, f"{before:,}", f"{after:,}", _change(before, after)), "") for label, before, after in rows],
    )


def _sites(sites: Sequence[SitePlan]) -> str:
    ranks = any(site.rank is not None for site in sites)
    steps = any(site.steps for site in sites)
    residuals = [site.residual for site in sites if site.residual is not None]
    largest = max(residuals, default=0.0)
    columns = [("attention", ""), ("mode", "")]
    columns += [("rank", "number")] if ranks else []
    columns += [("init", "")] + ([("fitted", "small")] if steps else [])
    columns += [("residual", "number")] if residuals else []
    columns += [("parameters", "number"), ("after", "number"), ("change", "number")]
    rows = []
    for site in sites:
        cells = [_code(site.fqn), _code(site.mode)]
        cells += [str(site.rank) if site.rank is not None else "all"] if ranks else []
        cells += [_code(site.init)] + ([escape(", ".join(site.steps)) or "\u2013"] if steps else [])
        cells += [_bar(site.residual, largest)] if residuals else []
        cells += [f"{site.params_before:,}", f"{site.params_after:,}", _change(site.params_before, site.params_after)]
        rows.append((cells, ""))
    meanings = dict.fromkeys(_meaning(site) for site in sites)
    note = f'<p class="note">Residual: {"; ".join(meanings)}. 0 means that nothing was lost. Bars are relative to the '
    return _table(columns, rows) + (f"\n{note}largest, {largest:.3f}.</p>" if residuals else "")


def _meaning(site: SitePlan) -> str:
    """What the residual of a site is; see `SitePlan`."""
    narrowed = site.init == "wq" and site.rank is not None
    return _RESIDUAL_OF_WEIGHTS if narrowed else _RESIDUAL.get(site.init, _RESIDUAL_OF_WEIGHTS)


def _bar(value: float | None, largest: float) -> str:
    if value is None:
        return "\u2013"
    share = 100 * value / largest if largest > 0 else 0.0
    return f'{value:.4f}<span class="bar"><i style="width:{share:.1f}%"></i></span>'


def _refused(surgery: SurgeryPlan) -> str:
    if not surgery.refused:
        return ""
    rows = [((_code(site.fqn), escape(site.reason)), "") for site in surgery.refused]
    return _section("Left as they were", _table([("attention", ""), ("reason", "")], rows))


def _sensitivities(sensitivities: Sequence[Sensitivity]) -> str:
    if not sensitivities:
        return ""
    columns = [
        ("attention", ""),
        ("mode", ""),
        ("parameters saved", "number"),
        ("residual", "number"),
        ("loss", "number"),
    ]
    largest = max(one.loss for one in sensitivities)
    rows = [
        (
            (
                _code(one.fqn),
                _way(one.mode, one.rank),
                f"{one.params_saved:,}",
                f"{one.residual:.4f}",
                _bar(one.loss, largest),
            ),
            "",
        )
        for one in sensitivities
    ]
    return _section(
        "What each site costs alone",
        "<p>Each attention converted by itself, all others as they were. Loss is 1 minus the mean cosine of the "
        "model\u2019s final features to the original\u2019s, residual the relative error of the attention\u2019s own "
        "output, both on held-out images.</p>",
        f"<figure>{inline_svg(sensitivity_figure(sensitivities, ''), 'Loss and residual of each site')}</figure>",
        f"<details><summary>Numbers</summary>{_table(columns, rows)}</details>",
    )


def _frontier(surgery: SurgeryPlan, points: Sequence[FrontierPoint]) -> str:
    if not points:
        return ""
    chosen = surgery.chosen(points)
    columns = [("parameters", "number"), ("change", "number"), ("predicted loss", "number"),
               ("measured loss", "number"), ("sites converted", "number")]  # fmt: skip
    ordered = sorted(points, key=lambda point: -point.params)
    rows = []
    for point in ordered:
        measured = f"{point.measured:.4f}" if point.measured is not None else "\u2013"
        rows.append(((f"{point.params:,}", _change(surgery.params_before, point.params), f"{point.predicted:.4f}",
                      measured, str(len(point.sites))), "chosen" if point is chosen else ""))  # fmt: skip
    figure = frontier_figure(points, surgery.params_before, surgery.max_loss, chosen)
    return _section(
        "Parameters against loss",
        "<p>Each point is a choice of attentions to convert. Its predicted loss is the sum of what they cost alone; "
        "where it was tried as a whole, its loss on held-out images stands beside.</p>",
        f"<figure>{inline_svg(figure, 'Parameters against loss')}</figure>",
        f"<details><summary>Numbers</summary>{_table(columns, rows)}</details>",
    )


def _loading(folder: str) -> str:
    text = f"from armour_surgery import load\n\nmodel = load({json.dumps(folder, ensure_ascii=False)})"
    return (
        f"<pre><code>{escape(text)}</code></pre>\n<p>A model of the class that it was before, in eval mode. It trains, "
        "exports and compiles like the original.</p>"
    )


def _origin(surgery: SurgeryPlan) -> str:
    source = surgery.source
    if source is None:
        return "<p>A model built in Python; nothing was recorded about how to build it again.</p>"
    facts = [("model", _code(source.name or source.architecture)), ("library", escape(source.library))]
    facts += [("architecture", _code(source.architecture))]
    if source.revision:
        facts.append(("revision", _code(source.revision)))
    facts.append(("license", escape(source.license or "unknown")))
    shapes = [(name, " \u00d7 ".join(map(str, shape[1:]))) for name, shape, _ in surgery.example]
    inputs = ", ".join(f"{_code(name)} {shape}" for name, shape in shapes)
    if inputs:
        facts.append(("input", inputs))
    return _facts(facts)
