"""The figure of a benchmark: speed against parameters."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from armour_surgery.report.style import LEGEND, RULE, SERIES, blank_figure, plain, tidy

__all__ = ["speed_figure"]

_MARKERS = "os^Dv"


def speed_figure(
    names: Sequence[str],
    params: Sequence[int],
    images_per_s: Sequence[float],
    intervals: Sequence[tuple[float, float] | None],
    title: str,
) -> Figure:
    """Speed against parameters, a dot for each model; its interval is a line where there is one."""
    figure = blank_figure(7.6, 4.4)
    axes = figure.subplots()
    # The figure has no background, and its axes should not bring one.
    axes.patch.set_alpha(0)
    dots = []
    for place, (name, count, speed, ends) in enumerate(zip(names, params, images_per_s, intervals, strict=True)):
        # Where the colors are used up they start again, with another marker.
        color, marker = SERIES[place % len(SERIES)], _MARKERS[place // len(SERIES) % len(_MARKERS)]
        if ends is not None:
            axes.plot([count / 1e6] * 2, ends, color=color, linewidth=1.6, solid_capstyle="butt")
        dots += axes.plot(
            [count / 1e6], [speed], color=color, linestyle="none", marker=marker, markersize=7, label=plain(name)
        )
    axes.margins(x=0.12)
    # From zero, a difference of a few percent looks like what it is.
    highest = max([*images_per_s, *(ends[1] for ends in intervals if ends is not None)])
    axes.set_ylim(0, 1.12 * highest)
    axes.set_title(plain(title), loc="left", fontsize=9.5)
    axes.set_xlabel("parameters, M")
    axes.set_ylabel("images per second")
    tidy(axes)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    figure.legend(handles=dots, **LEGEND, loc="outside lower left", ncols=min(3, len(dots)))
    return figure
