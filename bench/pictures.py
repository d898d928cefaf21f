"""Pictures of what was measured: waves, latency and c(rows). They need matplotlib, the extra `plot`.

pyplot is not used: it would choose a window system for the whole process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

# each has a colour of matplotlib's cycle of ten
FAMILIES = (
    "collocation", "srds", "parataa", "paradigms", "chords", "stock", "by hand", "sequential", "diffusers", "auto"
)  # fmt: skip
# the members of a family have one colour and differ in these
STYLES, MARKERS = ("-", "--", ":", "-."), "osD^v"
OFF = "difference to sequential, grey levels, 95th percentile of samples"
BOUNDS = {0.5: "half a grey level", 0.05: "a twentieth"}
# grey levels: larger differences are left out, smaller ones have the same samples but for rounding
WORST, BEST, SAME = 10.0, 0.02, 1e-3


def styles(names: Iterable[str]) -> Iterator[tuple[str, str, int]]:
    """(name, colour of its family, number in its family)."""
    members: dict[str, int] = {}
    for name in names:
        family = next(each for each in FAMILIES if name.startswith(each))
        members[family] = members.get(family, -1) + 1
        yield name, f"C{FAMILIES.index(family)}", members[family]


def waves_picture(title: str, steps: int, lines: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draw the waves of each method over its difference.

    Args:
        lines: method -> (difference, waves), the difference falling.
    """
    figure, ((axes,),) = _figure(1, 1, (8.6, 5.2), title)
    for name, colour, number in styles(lines):
        shown: dict[float, float] = {}
        for off, waves in reversed(lines[name]):  # no point counts for more than those behind it
            shown[max(off, BEST / 10, *shown)] = waves
        style = {"color": colour, "linestyle": STYLES[number % len(STYLES)], "marker": "o", "markersize": 3}
        axes.plot(list(shown), list(shown.values()), label=name, **style)
    axes.set(xscale="log", xlim=(WORST, BEST), xlabel=OFF, yscale="log", ylim=(4, steps))
    axes.set_ylabel("waves (network calls one after another)")
    axes.set_yticks([tick for tick in (5, 10, 20, 50, 100, 200) if tick <= steps], minor=False)
    axes.set_yticks([], minor=True)
    for bound, text in BOUNDS.items():
        _bound(axes, bound, text)
    _finish(figure, path)


def latency_picture(title: str, results: Sequence[Mapping[str, Any]], bound: float, path: Path) -> None:
    """Draw a panel for every workload and number of steps: milliseconds of each peer over its difference.

    Args:
        results: rows of `runner`; those without a difference, and those that did not run, are not drawn.
        bound: grey levels, the equal difference.

    Raises:
        SystemExit: there is nothing to draw.
    """
    drawn = [each for each in results if each["left_out"] is None and each["difference"] is not None]
    if not drawn:
        raise SystemExit(
            "There is nothing to draw. A picture shows differences, which workloads with random weights do not have. "
            "Run digits or policy, or leave --picture out."
        )
    workloads, steps = (list(dict.fromkeys(each[name] for each in drawn)) for name in ("workload", "steps"))
    heading = f"{title}\nlower is faster, left is nearer to the sequential sample; hollow: it stops by another test"
    figure, panels = _figure(len(steps), len(workloads), (8.2 * len(workloads), 5.2 * len(steps)), heading)
    for axes, (number, workload) in zip(panels.flat, product(steps, workloads), strict=True):
        here = {each["peer"]: each for each in drawn if (each["workload"], each["steps"]) == (workload, number)}
        axes.set_visible(bool(here))
        for peer, colour, member in styles(sorted(here)):
            each = here[peer]
            times = f"{each['over_stock']:.2f}x  " if each["over_stock"] else ""
            ms, lower, upper = (1e3 * each[name] for name in ("seconds", "lower", "upper"))
            full = each["within"] or peer.startswith(("stock", "by hand", "sequential", "diffusers", "auto"))
            style = {"color": colour, "ecolor": (colour, 0.4), "linestyle": "", "marker": MARKERS[member % 5]}
            style |= {"markerfacecolor": colour if full else "white", "label": f"{times}{peer}"}
            axes.errorbar(max(each["difference"], SAME), ms, yerr=[[ms - lower], [upper - ms]], **style)
        axes.set(title=f"{workload}, {number} steps", xscale="log", yscale="log", xlabel=OFF)
        axes.set_ylabel("ms a call, median and quartiles")
        _bound(axes, bound, f"equal difference: {bound:g}")
    _finish(figure, path)


def rows_picture(title: str, curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw c(rows) / c(1), a panel for eager calls and one for replayed ones.

    Args:
        curves: as `rows.curve` returns them.
    """
    hows = {"eager": "called from Python", "replayed": "replayed from a graph"}
    shown = [how for how in hows if any(curve[how] for curve in curves)]
    most = max((max(curve["rows"]) for curve in curves if curve["rows"]), default=1)
    figure, (panels,) = _figure(1, len(shown), (6.6 * len(shown), 4.6), title)
    for how, axes in zip(shown, panels, strict=True):
        axes.plot([1, most], [1, 1], color="0.4", linestyle="--", label="rows are free")
        axes.plot([1, most], [1, most], color="0.4", linestyle=":", label="rows cost as much as one by one")
        for number, curve in enumerate(curves):
            if curve[how]:
                first = curve[how][0] / curve["rows"][0]
                label = f"{curve['network']}, {1e3 * first:.3g} ms a row"
                times = [seconds / first for seconds in curve[how]]
                axes.plot(curve["rows"], times, "o-", label=label, color=f"C{number}", markersize=4)
        axes.set(title=hows[how], xlabel="rows of a call", ylabel="c(rows) / c(1)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    _finish(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float], title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _bound(axes: Any, bound: float, text: str) -> None:
    axes.axvline(bound, color="0.4", linestyle="--", linewidth=1, zorder=0)
    where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "rotation": 90, "va": "top"}
    axes.annotate(text, (bound, 1), xytext=(3, -6), fontsize=8, color="0.3", **where)


def _finish(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        axes.grid(True, which="major", color="0.92", linewidth=0.6)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}" if axis is axes.yaxis else "")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8)
    figure.savefig(path)
