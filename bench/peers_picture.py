"""Latency against difference, a point for each peer. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .peers_result import Result
from .picture import FAMILIES

# grey levels: what is nearer has the same samples but for rounding
SAME = 1e-3
COLOURS = {
    **FAMILIES,
    "stock": "#111111",
    "by hand": "#111111",
    "sequential": "#6b7280",
    "diffusers": "#db2777",
    "auto": "#0891b2",
}
LEADER = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.45, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
MARKERS = {"stock": "s", "by hand": "s", "sequential": "s", "diffusers": "D", "auto": "*"}


def picture(title: str, results: Sequence[Result], bound: float, path: Path) -> None:
    """Draw a panel for every workload and number of steps, and write it as PNG.

    Args:
        results: those without a difference, and those that did not run, are not drawn.
        bound: grey levels, the equal difference.

    Raises:
        ImportError: matplotlib is not installed.
        SystemExit: there is nothing to draw.
    """
    from matplotlib.figure import Figure

    drawn = [each for each in results if each.left_out is None and each.difference is not None]
    if not drawn:
        raise SystemExit(
            "There is nothing to draw. A picture shows differences, which workloads with random weights do not have. "
            "Run digits or policy, or leave --picture out."
        )
    workloads = list(dict.fromkeys(each.workload for each in drawn))
    steps = list(dict.fromkeys(each.steps for each in drawn))
    figure = Figure(figsize=(7.6 * len(workloads), 5.6 * len(steps)), dpi=120)
    figure.subplots_adjust(
        left=0.6 / (7.6 * len(workloads)),
        right=1 - 2.85 / (7.6 * len(workloads)),
        wspace=3.5 / 4.2,
        top=1 - 0.75 / (5.6 * len(steps)),
        bottom=0.6 / (5.6 * len(steps)),
        hspace=0.25,
    )
    panels = figure.subplots(len(steps), len(workloads), squeeze=False)
    for row, number in enumerate(steps):
        for column, workload in enumerate(workloads):
            here = [each for each in drawn if (each.workload, each.steps) == (workload, number)]
            if here:
                _panel(panels[row][column], f"{workload}, {number} steps", here, bound)
            else:
                panels[row][column].set_axis_off()
    legend = "lower is faster, left is nearer to the sequential sample; hollow: it stops by another test"
    figure.suptitle(f"{title}\n{legend}", fontsize=10)
    figure.savefig(path)


def _panel(axes: Any, title: str, results: Sequence[Result], bound: float) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xscale("log")
    axes.set_yscale("log")
    points = [(max(each.difference or 0.0, SAME), 1e3 * (each.seconds or 0.0), each) for each in results]
    axes.set_xlim(SAME / 1.6, 2 * max(bound, *(x for x, _, _ in points)))
    axes.set_ylim(min(y for _, y, _ in points) / 1.15, max(y for _, y, _ in points) * 1.15)
    for x, y, each in points:
        family = _family(each.peer)
        whiskers = [[max(0.0, y - 1e3 * (each.lower or 0.0))], [max(0.0, 1e3 * (each.upper or 0.0) - y)]]
        axes.errorbar(
            x,
            y,
            yerr=whiskers,
            color=COLOURS[family],
            marker=MARKERS.get(family, "o"),
            markersize=11 if family == "auto" else 6,
            markerfacecolor=COLOURS[family] if each.within or family in MARKERS else "white",
            ecolor=(COLOURS[family], 0.4),
            elinewidth=1,
            zorder=3,
        )
    axes.set_xlabel("difference to sequential, grey levels, 95th percentile (left edge: none but rounding)", fontsize=8)
    axes.set_ylabel("ms a call, median and quartiles", fontsize=8)
    axes.xaxis.set_major_formatter("{x:g}")
    for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        each("{x:g}")
    axes.tick_params(which="both", labelsize=7.5)
    axes.grid(True, which="major", color="0.92", linewidth=0.6)
    axes.axvline(bound, color="0.4", linestyle="--", linewidth=1, zorder=0)
    axes.annotate(
        f"equal difference: {bound:g}",
        (bound, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -4),
        textcoords="offset points",
        rotation=90,
        va="top",
        fontsize=7.5,
        color="0.35",
    )
    _label(axes, points)


def _label(axes: Any, points: Sequence[tuple[float, float, Result]]) -> None:
    """Names in a column beside the panel, slowest on top, each with a line to its point."""
    ordered = sorted(points, key=lambda point: point[1])
    heights = axes.transAxes.inverted().transform(axes.transData.transform([(x, y) for x, y, _ in ordered]))[:, 1]
    gap = min(0.052, 1 / max(1, len(ordered) - 1))
    for (x, y, each), height in zip(ordered, spread(list(heights), gap), strict=True):
        axes.annotate(
            f"{'' if each.over_stock is None else f'{each.over_stock:.2f}x  '}{each.peer}",
            (x, y),
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=COLOURS[_family(each.peer)],
            arrowprops={**LEADER, "color": COLOURS[_family(each.peer)]},
            annotation_clip=False,
            zorder=1,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights apart by as little as possible, and to within 0 and 1 if they have room there."""
    # neighbours that are too near move as one, about their mean
    groups: list[list[float]] = []
    for number, height in enumerate(heights):
        groups.append([height - number * gap])
        while len(groups) > 1 and mean(groups[-2]) > mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    top = 1 - (len(heights) - 1) * gap
    bases = [max(0.0, min(top, mean(group))) for group in groups for _ in group]
    return [base + number * gap for number, base in enumerate(bases)]


def _family(peer: str) -> str:
    return next(family for family in COLOURS if peer.startswith(family))
