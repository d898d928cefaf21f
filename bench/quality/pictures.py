"""Two pictures: waves, and latency, against the difference. Need matplotlib, the extra `plot`.

Neither uses pyplot, which would choose a window system for the whole process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .contestants import DEFAULT, PAPER
from .runner import Result
from .search import Line

BOUNDS = {0.5: "half a grey level", 0.05: "a twentieth"}
# of the picture of waves: larger differences are left out, smaller ones nobody sees
WORST, BEST = 10.0, 0.02
# of the picture of latencies: what is nearer has the same samples but for rounding
SAME = 1e-3
# a family of methods has a colour, its members have their line styles
FAMILIES = {
    "collocation": "#0064b4",
    "srds": "#c2410c",
    "parataa": "#15803d",
    "paradigms": "#7e22ce",
    "chords": "#a16207",
}
STYLES = ("-", "--", ":", "-.")
COLOURS = {
    **FAMILIES,
    "stock": "#111111",
    "by hand": "#111111",
    "sequential": "#6b7280",
    "diffusers": "#db2777",
    "auto": "#0891b2",
}
MARKERS = {"stock": "s", "by hand": "s", "sequential": "s", "diffusers": "D", "auto": "*"}
LEADER = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.45, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}


def waves_picture(title: str, steps: int, lines: Mapping[str, Line], path: Path) -> None:
    """Draw the waves of each method over its difference, and write it as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(8.6, 5.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    members = dict.fromkeys(FAMILIES, 0)
    for name, points in lines.items():
        family = next(each for each in FAMILIES if name.startswith(each))
        first = name in (DEFAULT, PAPER)
        shown = _from_there_on(points)
        axes.plot(
            [off for off, _ in shown],
            [waves for _, waves in shown],
            label=name,
            color=FAMILIES[family],
            linestyle=STYLES[members[family] % len(STYLES)],
            linewidth=2.4 if first else 1.4,
            marker="o",
            markersize=4.5 if first else 2.5,
            zorder=3 if first else 2,
        )
        members[family] += 1
    axes.set_xscale("log")
    axes.set_xlim(WORST, BEST)  # better to the right
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("difference to sequential, grey levels, 95th percentile of samples")
    axes.set_ylabel("waves (network calls one after another)")
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    for bound, text in BOUNDS.items():
        _bound(axes, bound, text, (-3, -6), rotation=90, ha="right", va="top", fontsize=8, color="0.3")
    axes.set_yscale("log")
    axes.set_ylim(top=steps)
    axes.yaxis.set_major_locator(FixedLocator([5, 10, 20, 50, 100, 200]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path)


def _from_there_on(points: Line) -> list[tuple[float, float]]:
    """Waves by the largest difference from a point on, which is what `cheapest` goes by; without what is too far."""
    found: list[tuple[float, float]] = []
    off = 0.0
    for point in reversed(points):
        off = max(off, point.difference, BEST / 10)
        if found and found[-1][0] == off:
            found.pop()  # this point has fewer waves
        found.append((off, point.waves))
        if off > WORST:
            break
    return found[::-1]


def latency_picture(title: str, results: Sequence[Result], bound: float, path: Path) -> None:
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
    width, height = 7.6 * len(workloads), 5.6 * len(steps)
    figure = Figure(figsize=(width, height), dpi=120)
    figure.subplots_adjust(
        left=0.6 / width,
        right=1 - 2.85 / width,
        wspace=3.5 / 4.2,
        top=1 - 0.75 / height,
        bottom=0.6 / height,
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
    text = f"equal difference: {bound:g}"
    _bound(axes, bound, text, (3, -4), rotation=90, va="top", fontsize=7.5, color="0.35")
    _label(axes, points)


def _bound(axes: Any, bound: float, text: str, offset: tuple[int, int], **style: Any) -> None:
    """A vertical line with its meaning beside it."""
    axes.axvline(bound, color="0.4", linestyle="--", linewidth=1, zorder=0)
    at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(text, (bound, 1), xytext=offset, **at, **style)


def _label(axes: Any, points: Sequence[tuple[float, float, Result]]) -> None:
    """Names in a column beside the panel, slowest on top, each with a line to its point."""
    ordered = sorted(points, key=lambda point: point[1])
    heights = axes.transAxes.inverted().transform(axes.transData.transform([(x, y) for x, y, _ in ordered]))[:, 1]
    gap = min(0.052, 1 / max(1, len(ordered) - 1))
    for (x, y, each), height in zip(ordered, spread(list(heights), gap), strict=True):
        colour = COLOURS[_family(each.peer)]
        axes.annotate(
            f"{'' if each.over_stock is None else f'{each.over_stock:.2f}x  '}{each.peer}",
            (x, y),
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour,
            arrowprops={**LEADER, "color": colour},
            annotation_clip=False,
            zorder=1,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights apart by as little as possible, and to within 0 and 1 if they have room there."""
    # neighbours that are too near move together, about their mean
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
