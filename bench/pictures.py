"""Pictures of what was measured: waves, latency, quality and c(rows). They need matplotlib, the extra `plot`.

Every line and point has its name beside it, and no two names overlap. Text is readable at half size. pyplot is not
used: it would choose a window system for the whole process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from srds_fast.cli.labels import place, spread
from srds_fast.cli.output import small

# each has a colour of matplotlib's cycle of ten
FAMILIES = (
    "collocation", "srds", "parataa", "paradigms", "chords", "stock", "by hand", "sequential", "diffusers", "auto"
)  # fmt: skip
# the members of a family have one colour and differ in these
STYLES = ("-", "--", ":", "-.")
OFF = "difference to sequential, grey levels, 95th percentile of samples"
BOUNDS = {0.5: "half a grey level", 0.05: "a twentieth"}
# grey levels: larger differences are left out, and lines end at the smaller one
WORST, BEST = 10.0, 0.02
# what is not ours, of the entrants of `bench.quality.peers`
THEIRS = ("stock", "by hand", "diffusers")
OURS, OTHERS, CHOSEN = "#0064b4", "0.25", "#c2410c"
# points
FONT = 14
# a difference this small is none: the same image but for rounding
SAME = 1e-3
# of the ways of `bench.quality.tradeoff`, by how the names of theirs begin
WAYS: dict[str, dict[str, Any]] = {
    "fewer steps": {"color": "0.35", "marker": "o", "linestyle": "-"},
    "DPM-Solver": {"color": "#8a6d00", "marker": "s", "linestyle": "-"},
    "DDIM, torch.compile": {"color": "0.35", "marker": "v", "linestyle": ":"},
    "srds_fast, SRDS": {"color": OURS, "marker": "o", "linestyle": "-"},
    "srds_fast, auto": {"color": CHOSEN, "marker": "D", "linestyle": "none"},
}


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
    figure, ((axes,),) = _figure(1, 1, (12.5, 8.0), title)
    ends = []
    for name, colour, number in styles(lines):
        shown: dict[float, float] = {}
        for off, waves in reversed(lines[name]):  # no point counts for more than those behind it
            shown[max(off, BEST / 10, *shown)] = waves
        axes.plot(list(shown), list(shown.values()), color=colour, linestyle=STYLES[number % 4], linewidth=2)
        ends.append((name, colour, *_end(list(shown.items()))))
    axes.set(xscale="log", xlim=(WORST, BEST), xlabel=OFF, yscale="log", ylim=(4, steps))
    axes.set_ylabel("waves (network calls one after another)")
    axes.set_yticks([tick for tick in (5, 10, 20, 50, 100, 200) if tick <= steps], minor=False)
    axes.set_yticks([], minor=True)
    for bound in BOUNDS:
        axes.axvline(bound, color="0.35", linestyle="--", linewidth=1.2, zorder=0)
    _numbers(axes.xaxis, axes.yaxis)
    _name_lines(axes, ends)
    _names_above(axes, BOUNDS)
    figure.savefig(path)


def _end(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where a line leaves the picture at `BEST`, or else its last point; points: (difference, waves), rising."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= BEST < x1:
            share = math.log(BEST / x0) / math.log(x1 / x0)
            return BEST, math.exp(math.log(y0) + share * math.log(y1 / y0))
    return points[0]


def latency_picture(title: str, results: Sequence[Mapping[str, Any]], bound: float, path: Path) -> None:
    """Draw a line for every peer and a panel for every workload and number of steps: times faster than the stock loop.

    Args:
        results: rows of `runner`; those without a difference are not drawn.
        bound: grey levels, the equal difference.

    Raises:
        SystemExit: there is nothing to draw.
    """
    drawn = [each for each in results if each["left_out"] is None and each["difference"] is not None]
    stock = {_panel(each): each["seconds"] for each in drawn if each["over_stock"] == 1.0}
    drawn = [each for each in drawn if _panel(each) in stock]
    if not drawn:
        raise SystemExit(
            "There is nothing to draw. A picture shows differences, which workloads with random weights do not have. "
            "Run digits or policy, or leave --picture out."
        )
    workloads, steps = (list(dict.fromkeys(each[name] for each in drawn)) for name in ("workload", "steps"))
    peers = {workload: _ranked(each for each in drawn if each["workload"] == workload) for workload in workloads}
    heights = [1 + len(peers[workload]) for workload in workloads]
    heading = (
        f"{title}\ntimes faster than the stock loop, median and quartiles; at the right the difference to its sample,\n"
        f"grey levels, 95th percentile: all that have a setting have the fastest within {bound:g}"
    )
    size = 6.0 + 3.6 * len(steps), 1.6 + 0.34 * sum(heights)
    figure, panels = _figure(len(workloads), len(steps), size, heading, {"height_ratios": heights})
    for workload, line in zip(workloads, panels, strict=True):
        for number, axes in zip(steps, line, strict=True):
            here = {each["peer"]: each for each in drawn if _panel(each) == (workload, number)}
            _ranking(axes, peers[workload], here, stock.get((workload, number), 0.0))
            axes.set_title(f"{workload}, {number} steps", fontsize=FONT)
            if axes is not line[0]:
                axes.tick_params(labelleft=False)
    figure.savefig(path)


def _panel(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["workload"], row["steps"]


def _ranked(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the peers, the slowest first: by the mean logarithm of their ratios to the stock loop."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row["peer"], []).append(math.log(row["over_stock"]))
    return sorted(ratios, key=lambda peer: sum(ratios[peer]) / len(ratios[peer]))


def _ranking(axes: Any, peers: Sequence[str], here: Mapping[str, Mapping[str, Any]], stock: float) -> None:
    for row, peer in enumerate(peers):
        found = here.get(peer)
        text = "-" if found is None else "same" if found["difference"] < SAME else small(found["difference"])
        axes.text(0.98, row, text, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=FONT - 3)
        if found is not None:
            colour = CHOSEN if peer == "auto" else OTHERS if peer.startswith(THEIRS) else OURS
            low, ratio, high = (stock / found[name] for name in ("upper", "seconds", "lower"))
            axes.plot([low, high], [row, row], color=colour, linewidth=2, alpha=0.5)
            axes.plot(ratio, row, "o", color=colour, markersize=7)
    axes.axvline(1.0, color="0.35", linestyle="--", linewidth=1.2, zorder=0)
    axes.set_yticks(range(len(peers)), peers, fontsize=FONT - 2)
    ratios = [stock / each[name] for each in here.values() for name in ("upper", "lower")] or [1.0]
    low, high = 0.9 * min(ratios), max(ratios)
    # room for the differences, at the right
    axes.set(xscale="log", ylim=(-0.7, len(peers) - 0.3), xlim=(low, 2 * high))
    axes.set_xticks([tick for tick in (0.25, 0.5, 1, 2, 4, 8) if low <= tick <= high])
    axes.set_xticks([], minor=True)
    _numbers(axes.xaxis)


def tradeoff_picture(document: Mapping[str, Any], path: Path) -> None:
    """Draw difference over seconds: a line for each way to make an image sooner.

    What gives the same image lies at the lower edge, and no line leads there: nothing lies between.

    Args:
        document: as `bench.quality.tradeoff` writes it.
    """
    title = f"One image of {document['steps']} DDIM steps, sooner: bundled digits, {document['where']}, medians"
    figure, ((axes,),) = _figure(1, 1, (12.5, 8.5), title)
    rows = [row for row in document["results"] if row["left_out"] is None]
    labels: list[tuple[str, tuple[float, float], str]] = []
    lines = []
    for name in dict.fromkeys(row["line"] for row in rows):
        style = next(style for begins, style in WAYS.items() if name.startswith(begins))
        here = sorted((row for row in rows if row["line"] == name), key=lambda row: row["seconds"])
        points = [(row["seconds"], max(row["grey_levels"]["mean"], SAME)) for row in here]
        labels += [(row["setting"], point, style["color"]) for row, point in zip(here, points, strict=True)]
        line = [point for point in points if point[1] > SAME]
        same = [point for point in points if point[1] <= SAME]
        for some, linestyle in ((line, style["linestyle"]), (same, "none")):
            if some:
                label = name if some is line or not line else None
                shown = {**style, "linestyle": linestyle, "label": label}
                axes.plot(*zip(*some, strict=True), linewidth=2.2, markersize=10, **shown)
        lines += [line, *([point] for point in same)]
    axes.axhline(0.5, color="0.35", linestyle="--", linewidth=1.2, zorder=0, label="half a grey level")
    axes.set(yscale="log", xlim=(0, None), xlabel="seconds an image", ylim=(SAME / 2, None))
    axes.set_ylabel(f"grey levels from the {document['steps']}-step image")
    axes.margins(y=0.1)
    ticks = [tick for tick in (0.01, 0.1, 1, 10) if tick > SAME]
    axes.set_yticks([SAME, *ticks], ["the same", *(f"{tick:g}" for tick in ticks)])
    axes.set_yticks([], minor=True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=FONT - 1)
    place(axes, labels, lines, fontsize=FONT - 2)
    figure.savefig(path)


def rows_picture(title: str, curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw c(rows) / c(1), a panel for eager calls and one for replayed ones.

    Args:
        curves: as `rows.curve` returns them.
    """
    hows = {"eager": "called from Python", "replayed": "replayed from a graph"}
    shown = [how for how in hows if any(curve[how] for curve in curves)]
    most = max((max(curve["rows"]) for curve in curves if curve["rows"]), default=1)
    figure, (panels,) = _figure(1, len(shown), (10.5 * len(shown), 6.5), title)
    for how, axes in zip(shown, panels, strict=True):
        ends = [("rows are free", "0.4", most, 1.0), ("rows cost as one by one", "0.4", most, float(most))]
        axes.plot([1, most], [1, 1], color="0.4", linestyle="--")
        axes.plot([1, most], [1, most], color="0.4", linestyle=":")
        for number, curve in enumerate(curves):
            if curve[how]:
                first = curve[how][0] / curve["rows"][0]
                times = [seconds / first for seconds in curve[how]]
                axes.plot(curve["rows"], times, "o-", color=f"C{number}", markersize=5)
                ends.append((f"{curve['network']}, {1e3 * first:.3g} ms", f"C{number}", curve["rows"][-1], times[-1]))
        axes.set(title=hows[how], xlabel="rows of a call", ylabel="c(rows) / c(1)", xlim=(1, most))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        _numbers(axes.xaxis, axes.yaxis)
        _name_lines(axes, ends)
    figure.savefig(path)


def scaling_picture(title: str, found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw how many times faster than on one device a call is predicted to be, a panel for each network and steps.

    Args:
        found: network, steps, and rows with method and predicted_seconds on 1, 2, .. devices; the first is sequential.
    """
    networks, steps = (list(dict.fromkeys(each[name] for each in found)) for name in ("network", "steps"))
    size = 10.5 * len(steps), 6.8 * len(networks)
    figure, panels = _figure(len(networks), len(steps), size, title)
    ends: dict[Any, list[tuple[str, str, float, float]]] = {}
    for each in found:
        axes = panels[networks.index(each["network"])][steps.index(each["steps"])]
        rows = {row["method"]: row["predicted_seconds"] for row in each["rows"]}
        alone = each["rows"][0]["predicted_seconds"][0]
        devices = list(range(1, 1 + len(each["rows"][0]["predicted_seconds"])))
        axes.plot(devices, devices, color="0.4", linestyle=":", linewidth=1)
        for name, colour, number in styles(rows):
            times = [alone / seconds for seconds in rows[name]]
            axes.plot(devices, times, color=colour, linestyle=STYLES[number % 4], linewidth=2)
            ends.setdefault(axes, []).append((name, colour, devices[-1], times[-1]))
        axes.set_title(f"{each['network']}, {each['steps']} steps", fontsize=FONT)
        axes.set(xlabel="devices", ylabel="predicted times faster", xlim=(1, devices[-1]), ylim=(0.15, devices[-1]))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        _numbers(axes.xaxis, axes.yaxis)
    figure.draw_without_rendering()  # names are placed by where the layout puts the axes
    for axes, of_lines in ends.items():
        _name_lines(axes, of_lines, 0.8 / len(networks))
    figure.savefig(path)


def load_picture(title: str, found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw latency over load, a column for each place, and a row for p50 and one for p95.

    Args:
        found: as `serving_load.row` returns them.
    """
    places, policies = (list(dict.fromkeys(each[name] for each in found)) for name in ("where", "policy"))
    figure, panels = _figure(2, len(places), (9.5 * len(places), 11.5), title)
    for column, place_name in enumerate(places):
        here = [each for each in found if each["where"] == place_name]
        for number, statistic in enumerate(("p50", "p95")):
            axes, ends = panels[number][column], []
            for policy, colour, style in zip(policies, (OTHERS, OURS, CHOSEN), ("--", ":", "-"), strict=True):
                points = sorted((each["load"], each[statistic]) for each in here if each["policy"] == policy)
                axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker="o", linewidth=2.2)
                ends.append((policy, colour, *points[-1]))
            axes.set(title=place_name, yscale="log", xlim=(0, max(each["load"] for each in here)))
            axes.set(xlabel="load, in requests that one device makes one after another")
            axes.set_ylabel(f"{statistic} latency, in sequential calls")
            _numbers(axes.xaxis, axes.yaxis)
            _name_lines(axes, ends, 0.4)
    figure.savefig(path)


def _figure(rows: int, columns: int, size: tuple[float, float], title: str = "", ratios: Any = None) -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": FONT}):
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw=ratios)
    figure.suptitle(title, fontsize=FONT)
    for axes in panels.flat:
        axes.grid(True, which="major", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def _numbers(*axes: Any) -> None:
    """Write ticks as plain numbers, not as powers."""
    for axis in axes:
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def _name_lines(axes: Any, ends: Sequence[tuple[str, str, float, float]], share: float = 0.8) -> None:
    """Write names to the right of the axes, in the order in which lines end there, and lead from each end to its name.

    The leading lines go along one height to the edge, and from there to names in the same order: none crosses another.

    Args:
        ends: (name, colour, x, y).
        share: of the figure's height that the axes have.
    """
    inverse = axes.transAxes.inverted()
    at = [inverse.transform(axes.transData.transform((x, y))) for _, _, x, y in ends]
    step = 1.35 * FONT / 72 / (share * axes.figure.get_figheight())  # a line of text, as a share of the axes
    heights = spread([float(y) for _, y in at], step, 0.0, 1.0)
    for (name, colour, _, _), (x, y), height in zip(ends, at, heights, strict=True):
        axes.plot([x, 1.0], [y, y], color=colour, linestyle=":", linewidth=1, transform=axes.transAxes)
        way = {"arrowstyle": "-", "color": colour, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            name, (1.0, y), (1.035, height), xycoords="axes fraction", textcoords="axes fraction", color=colour,
            va="center", fontsize=FONT - 1, annotation_clip=False, arrowprops={**way, "relpos": (0, 0.5)},
        )  # fmt: skip


def _names_above(axes: Any, names: Mapping[float, str]) -> None:
    """Write the name of each vertical line above the axes."""
    for x, name in names.items():
        axes.text(x, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=FONT - 2)
