"""c(rows) / c(1) against rows, a line for each network. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"digits": "#0064b4", "policy": "#15803d", "sd15": "#c2410c", "dit": "#7e22ce", "sdxl": "#a16207"}
HOW = {"eager": "called from Python", "replayed": "replayed from a graph"}
FREE, IN_PROPORTION = "rows are free", "rows cost as much as one by one"


def picture(title: str, curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel for eager calls and one for replayed ones, and write it as PNG.

    Args:
        curves: as `rows.curve` returns them.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # not pyplot: it would pick a window system for the whole process
    from matplotlib.figure import Figure

    ways = [how for how in HOW if any(curve[how] for curve in curves)]
    most = max((max(curve["rows"]) for curve in curves if curve["rows"]), default=1)
    figure = Figure(figsize=(5.4 * max(1, len(ways)), 5.8), dpi=130, layout="constrained")
    panels = figure.subplots(1, max(1, len(ways)), squeeze=False, sharex=True, sharey=True)[0]
    for axes, how in zip(panels, ways, strict=False):
        _panel(axes, how, curves, max(2, most))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def _panel(axes: Any, how: str, curves: Sequence[dict[str, Any]], most: int) -> None:
    axes.set_title(HOW[how], fontsize=11, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(0.85, 1.2 * most)
    axes.set_ylim(0.7, 1.4 * most)
    axes.set_aspect("equal")  # in proportion is 45 degrees
    axes.plot([1, most], [1, 1], color="0.4", linestyle="--", linewidth=1)
    axes.plot([1, most], [1, most], color="0.4", linestyle="--", linewidth=1)
    for text, end, below in ((FREE, 1, True), (IN_PROPORTION, most, False)):
        axes.annotate(
            text,
            (most**0.5, end**0.5),
            xytext=(0, -4 if below else 4),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            rotation=0 if below else 45,
            rotation_mode="anchor",
            fontsize=8,
            color="0.3",
        )
    for curve in curves:
        if curve[how]:
            first = curve[how][0] / curve["rows"][0]
            label = f"{curve['network']}, {1e3 * first:.3g} ms a row"
            colour = COLOURS.get(curve["network"], "#111111")
            times = [seconds / first for seconds in curve[how]]
            axes.plot(curve["rows"], times, label=label, color=colour, marker="o", markersize=4, linewidth=1.6)
    axes.set_xlabel("rows of a call")
    axes.set_ylabel("c(rows) / c(1)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(True, which="major", color="0.92", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
