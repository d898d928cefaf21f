"""Difference against speed, a line for each method. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .contestants import DEFAULT, PAPER
from .curves import Curve
from .reaching import Line, Point

BOUNDS = {0.5: "half a grey level", 0.05: "a twentieth"}
# a larger difference is another picture, a smaller one nobody sees
WORST, BEST = 10.0, 0.02
# a family of methods has a colour, its members have their line styles
FAMILIES = {
    "collocation": "#0064b4",
    "srds": "#c2410c",
    "parataa": "#15803d",
    "paradigms": "#7e22ce",
    "chords": "#a16207",
}
STYLES = ("-", "--", ":", "-.")


def picture(title: str, steps: int, lines: Mapping[str, Line], curves: Sequence[Curve], path: Path) -> None:
    """Draw waves, and the speed-up by each measured curve, over the difference to sequential, and write it as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # not pyplot: it would pick a window system for the whole process
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    panels = 1 + len(curves)
    figure = Figure(figsize=(6.2 * panels + 2.4, 5.2), dpi=130, layout="constrained")
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    styles = _styles(list(lines))
    for name, points in lines.items():
        shown = _from_there_on(points)
        x = [off for off, _ in shown]
        speeds = [[point.waves for _, point in shown]]
        speeds += [[curve.speed_up(steps, point.widths) for _, point in shown] for curve in curves]
        for axes, y in zip(all_axes, speeds, strict=True):
            axes.plot(x, y, label=name, **styles[name])
    _dress(all_axes[0], "waves (network calls one after another)")
    all_axes[0].set_yscale("log")
    all_axes[0].set_ylim(top=steps)
    all_axes[0].yaxis.set_major_locator(FixedLocator([5, 10, 20, 50, 100, 200]))
    all_axes[0].yaxis.set_minor_locator(NullLocator())
    all_axes[0].yaxis.set_major_formatter("{x:g}")
    for axes, curve in zip(all_axes[1:], curves, strict=True):
        _dress(axes, f"times faster than {steps} sequential calls, {curve.name}")
        axes.axhline(1.0, color="0.4", linewidth=1)
        axes.set_ylim(bottom=0)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path)


def _from_there_on(points: Line) -> list[tuple[float, Point]]:
    """The points that show, each with the largest difference from it on: what `cheapest` goes by."""
    found: list[tuple[float, Point]] = []
    off = 0.0
    for point in reversed(points):
        off = max(off, point.difference, BEST / 10)
        if found and found[-1][0] == off:
            found.pop()  # this one is there with fewer waves
        found.append((off, point))
        if off > WORST:  # the line leaves the picture
            break
    return found[::-1]


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    members = dict.fromkeys(FAMILIES, 0)
    for name in names:
        family = next(each for each in FAMILIES if name.startswith(each))
        first = name in (DEFAULT, PAPER)
        found[name] = {
            "color": FAMILIES[family],
            "linestyle": STYLES[members[family] % len(STYLES)],
            "linewidth": 2.4 if first else 1.4,
            "marker": "o",
            "markersize": 4.5 if first else 2.5,
            "zorder": 3 if first else 2,
        }
        members[family] += 1
    return found


def _dress(axes: Any, speed: str) -> None:
    axes.set_xscale("log")
    axes.set_xlim(WORST, BEST)  # better to the right
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("difference to sequential, grey levels, 95th percentile of samples")
    axes.set_ylabel(speed)
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    for bound, text in BOUNDS.items():
        axes.axvline(bound, color="0.4", linestyle="--", linewidth=1, zorder=0)
        axes.annotate(
            text,
            (bound, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3, -6),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=8,
            color="0.3",
        )
