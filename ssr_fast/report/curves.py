"""Curves over training steps as PNG bytes, drawn with matplotlib's Agg canvas (no display, no global state)."""

import io
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

# Readable on a light and on a dark page. The stages of the usual comparison keep their colours in every report.
_STAGE_COLORS = {"Source only": "#8b93a3", "Self-training": "#d98a2b", "SSR": "#1b9e84"}
_OTHER_COLORS = ("#6a6ee0", "#c2548f", "#7a9c2e", "#3f8fc4", "#a5713c")

_INK = "#808896"  # grey text and axes, for both kinds of page
_MOST_POINTS = 250


def stage_color(title: str, number: int) -> str:
    """The colour of a stage by its title, for titles without one by its position in the run."""
    return _STAGE_COLORS.get(title) or _OTHER_COLORS[number % len(_OTHER_COLORS)]


def curve_plot(y_label: str, lines: Mapping[str, Points], colors: Mapping[str, str]) -> bytes:
    """One panel with a line for each name.

    Args:
        y_label: what the values are, with their unit.
        lines: name -> (step, value) in order; values that are not finite leave gaps, more than 250 points are
            averaged in groups.
        colors: name -> colour.

    Returns:
        a PNG with transparent background.
    """
    # matplotlib takes seconds to import, and only a finished run draws
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.4), dpi=160, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    for name, points in lines.items():
        thinned = _thinned(points)
        marker = "o" if len(thinned) <= 20 else None
        axes.plot(
            *zip(*thinned, strict=True), label=name, color=colors[name], marker=marker, markersize=4, linewidth=1.8
        )
    axes.set_xlabel("training step", color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.tick_params(colors=_INK)
    axes.grid(True, color=_INK, alpha=0.25, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _thinned(points: Points) -> list[tuple[float, float]]:
    """At most _MOST_POINTS points: means of equal groups. A group with a value that is not finite becomes nan."""
    size = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), max(size, 1))]
    return [(sum(x for x, _ in group) / len(group), _mean([y for _, y in group])) for group in groups]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if all(math.isfinite(value) for value in values) else math.nan
