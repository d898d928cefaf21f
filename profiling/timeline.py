"""One call drawn over time: what the host was in, and what ran on each stream of the GPU. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.intervals import Interval, within

from .calls import Call
from .labels import Labels
from .nsys import Range

COLOURS = {
    "coarse": "#f28e2b",
    "fine": "#4e79a7",
    "mixed": "#59a14f",
    "wave": "#76b7b2",
    "network": "#a0cbe8",
    "wave_update": "#d62728",
    "checkpoint": "#edc948",
    "replay": "#8cd17d",
    "record": "#b07aa1",
    "iteration": "#dcd6f0",
    "other": "#d9d9d9",
}
# a stretch narrower than this share of the panel cannot be seen on its own
FINEST = 1 / 3000
# of a panel's width that a character of a label takes
CHARACTER = 1 / 150
# waves in the panel that shows them from near
NEAR = 4
# lanes of the host, by how many ranges are around
LEVELS = {1: "host", 2: "host: waves", 3: "host: in waves", 4: "host: in rows"}
# what is coloured by the rows that it runs
ROWS = {"coarse": "coarse rows", "fine": "fine rows", "mixed": "coarse and fine rows", "wave": "wave"}


class Bar(NamedTuple):
    """A stretch of a lane; its colour goes by what it is of. Of the labels the first that fits is written on it."""

    interval: Interval
    of: str
    labels: tuple[str, ...] = ()


def draw(call: Call, title: str, path: Path) -> None:
    """Draw a call, and a few of its waves from near, and write it as PNG."""
    # not pyplot: it would pick a window system for the whole process
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lanes = lanes_of(call)
    windows = [(call.range.start, max(call.range.end, call.window[1]))]
    if near := _near(call, windows[0]):
        windows.append(near)
    height = 1.5 + len(windows) * (0.9 + 0.36 * len(lanes))
    figure = Figure(figsize=(12, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(windows), 1, squeeze=False)[:, 0]
    drawn: set[str] = set()
    for axes, window in zip(panels, windows, strict=True):
        drawn |= _panel(axes, lanes, window, call.range.start)
    panels[-1].set_xlabel("ms from the start of the call")
    if near:
        panels[0].axvspan(
            *((each - call.range.start) / 1e6 for each in near), color="0.6", alpha=0.25, linewidth=0, zorder=0
        )
        panels[1].set_title("the shaded part from near", fontsize=9, loc="left", color="0.3")
    _legend(figure, drawn)
    figure.suptitle(f"{title}\n{_summary(call)}", fontsize=11)
    figure.savefig(path)


def lanes_of(call: Call) -> dict[str, list[Bar]]:
    """The lanes of a call from above, by name."""
    return {**_host_lanes(call), **_gpu_lanes(call)}


def _summary(call: Call) -> str:
    times = "" if call.gpu else " (host times: recorded without a GPU)"
    overhead = "" if call.overhead is None else f", overhead {call.overhead:.2f}"
    idle = "" if call.idle is None else f", GPU idle {call.idle:.0%}"
    return f"{len(call.waves)} waves, wall {call.wall / 1e6:.2f} ms{overhead}{idle}{times}"


def _near(call: Call, whole: Interval) -> Interval | None:
    """A few waves in the middle, with a margin; None where they are well seen in the whole."""
    shown = min(NEAR, len(call.waves))
    first = (len(call.waves) - shown) // 2
    waves = call.waves[first : first + shown]
    if not waves:
        return None
    start, end = waves[0].start, max(wave.end for wave in waves)
    margin = (end - start) // 30
    return (start - margin, end + margin) if 2 * (end - start) < whole[1] - whole[0] else None


def _host_lanes(call: Call) -> dict[str, list[Bar]]:
    """A lane for what the call is made of, and one for each level of what iterations are made of."""
    lanes: dict[str, list[Bar]] = {}
    for each in call.ranges:
        # what is recorded may lie in iterations of its own
        level = each.depth - (each.inside("record") is not None and each.inside("iteration") is not None)
        if level in LEVELS and not (level == 1 and each.depth > 1) and (level == 1 or _shown(each)):
            lanes.setdefault(LEVELS[level], []).append(Bar(each.interval, _of(each), _named(each.name, each.payload)))
    return {lane: lanes[lane] for lane in LEVELS.values() if lane in lanes}


def _shown(each: Range) -> bool:
    return each.inside("iteration") is not None or each.inside("record") is not None


def _of(each: Range) -> str:
    if each.kind == "wave":
        return each.category if each.category in COLOURS else "wave"
    return each.kind if each.kind in COLOURS else "other"


def _named(name: str, rows: int | None) -> tuple[str, ...]:
    number = name.removeprefix("wave ")
    return (name,) if number == name or rows is None else (f"{name}: {rows} row{'s' * (rows != 1)}", name, number)


def _gpu_lanes(call: Call) -> dict[str, list[Bar]]:
    """A lane for the waves and one for each stream."""
    lanes: dict[str, list[Bar]] = {}
    if not call.gpu:
        return lanes
    lanes["GPU: waves"] = [
        Bar((wave.start, wave.end), wave.kind or "wave", _named(f"wave {wave.number}", wave.rows))
        for wave in call.waves
    ]
    kinds = {work: wave.kind or "network" for wave in call.waves for work in wave.works}
    streams: dict[int, list[Bar]] = {}
    for work, parts in call.works.items():
        streams.setdefault(work.stream, []).append(Bar(work.interval, _of_work(parts, kinds.get(work))))
    return lanes | {f"GPU: stream {stream}": bars for stream, bars in sorted(streams.items())}


def _of_work(parts: Labels, kind: str | None) -> str:
    """Of the network: what rows it is of."""
    for each in ("wave_update", "checkpoint", "record"):
        if each in parts:
            return each
    for each in ("coarse", "fine"):
        if each in parts:
            return each
    return "other" if kind is None else kind


def _panel(axes: Any, lanes: Mapping[str, Sequence[Bar]], window: Interval, origin: int) -> set[str]:
    """Draw what lies in a window. Returns what colours were used."""
    width = window[1] - window[0]
    used: set[str] = set()
    for lane, bars in enumerate(lanes.values()):
        for of, stretches in _merged(bars, window).items():
            used.add(of)
            spans = [((start - origin) / 1e6, (end - start) / 1e6) for start, end in stretches]
            axes.broken_barh(spans, (lane - 0.4, 0.8), facecolors=COLOURS[of], edgecolors="white", linewidth=0.3)
        for (start, end), _, labels in bars:
            start, end = max(start, window[0]), min(end, window[1])
            fits = (each for each in labels if end - start > CHARACTER * (len(each) + 1) * width)
            if label := next(fits, None):
                at = ((start + end) / 2 - origin) / 1e6
                axes.text(at, lane, label, ha="center", va="center", fontsize=7, clip_on=True)
    axes.set_yticks(range(len(lanes)), list(lanes), fontsize=9)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim((window[0] - origin) / 1e6, (window[1] - origin) / 1e6)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return used


def _merged(bars: Iterable[Bar], window: Interval) -> dict[str, list[Interval]]:
    """Stretches of each colour; those too fine to be seen one by one become one."""
    finest = (window[1] - window[0]) * FINEST
    found: dict[str, list[Interval]] = {}
    for (start, end), of, _ in bars:
        for part in within([(start, end)], window):
            stretches = found.setdefault(of, [])
            if stretches and part[0] - stretches[-1][1] < finest and part[1] - part[0] < finest:
                stretches[-1] = stretches[-1][0], max(stretches[-1][1], part[1])
            else:
                stretches.append(part)
    return found


def _legend(figure: Any, used: set[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=ROWS.get(of, of)) for of, colour in COLOURS.items() if of in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)
