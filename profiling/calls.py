"""A recorded call: its waves, what each range took, and what the GPU did meanwhile. Times are nanoseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench.intervals import Interval, at_once, covered, within

from . import labels
from .labels import UPDATE, Labels, Replay
from .nsys import Range, Recording, Work


@dataclass
class Wave:
    """One batched network call and the update after it.

    Attributes:
        number: from 0, in the call.
        iteration: that it is part of.
        kind: "coarse", "fine" or "mixed"; None: not known.
        rows: of the network call; None: not known.
        start, end: of the GPU's work where that was recorded, of the host's range otherwise.
        works: what the GPU did.
        network: the time in which any work of the network ran, on the GPU where that was recorded.
    """

    number: int
    iteration: int
    kind: str | None
    rows: int | None
    start: int
    end: int
    works: list[Work]
    network: int


@dataclass
class Row:
    """All ranges of a kind.

    Attributes:
        count: how many.
        host: time on the host; None: the host was in none, they are waves of a replay or parts of them.
        gpu: the sum over what GPUs did.
        launches: kernels, copies and fills.
    """

    count: int = 0
    host: int | None = None
    gpu: int = 0
    launches: int = 0


@dataclass
class Call:
    """One call.

    Attributes:
        range: on the host.
        ranges: in it, and itself, in order of their start.
        gpu: GPU work was recorded. Waves, networks and gaps are then the GPU's, otherwise the host's.
        window: from the start of the first iteration to the end of the last one, or of the work launched in them.
        waves: in order of their start.
        table: by label.
        works: what GPUs did for the call, with the labels of all that it is part of.
        busy: the time in the window in which the GPU did anything; None without one. A process is taken to have one.
        notes: what a reader should know.
    """

    range: Range
    ranges: Sequence[Range]
    gpu: bool
    window: Interval
    waves: list[Wave]
    table: dict[str, Row]
    works: dict[Work, Labels]
    busy: int | None
    notes: list[str]

    @property
    def wall(self) -> int:
        """Of the iterations."""
        return self.window[1] - self.window[0]

    @property
    def network(self) -> int:
        """Of all waves."""
        return sum(wave.network for wave in self.waves)

    @property
    def overhead(self) -> float | None:
        """Wall over network; None where no network was seen."""
        return self.wall / self.network if self.network else None

    @property
    def idle(self) -> float | None:
        """Share of the wall in which the GPU did nothing; None without one."""
        return None if self.busy is None or not self.wall else 1 - self.busy / self.wall

    @property
    def gaps(self) -> list[tuple[int, bool]]:
        """From the end of each wave to the start of the next, and whether a checkpoint lies between."""
        return [
            (max(0, after.start - before.end), after.iteration != before.iteration)
            for before, after in pairwise(self.waves)
        ]

    @property
    def streams_at_once(self) -> int:
        """The time of the iterations in which two streams or more were at work."""
        streams: dict[tuple[int, int], list[Interval]] = {}
        for work, parts in self.works.items():
            if "iteration" in parts:
                streams.setdefault((work.device, work.stream), []).append(work.interval)
        return at_once(streams.values())

    @property
    def coarse_beside_fine(self) -> int:
        """The time in which coarse rows were at work beside fine ones, where they are network calls of their own."""
        return at_once(
            [work.interval for work, parts in self.works.items() if of in parts] for of in ("coarse", "fine")
        )

    def to_dict(self) -> dict[str, Any]:
        """All figures, in milliseconds, ready for JSON."""
        return {
            "times": "gpu" if self.gpu else "host",
            "call_ms": _ms(self.range.end - self.range.start),
            "wall_ms": _ms(self.wall),
            "network_ms": _ms(self.network),
            "overhead": self.overhead,
            "idle_share": self.idle,
            "streams_at_once_ms": _ms(self.streams_at_once) if self.gpu else None,
            "coarse_beside_fine_ms": _ms(self.coarse_beside_fine) if self.gpu else None,
            "gaps_ms": [_ms(gap) for gap, _ in self.gaps],
            "gaps_at_checkpoints_ms": [_ms(gap) for gap, checkpoint in self.gaps if checkpoint],
            "waves": [
                {
                    "number": wave.number,
                    "iteration": wave.iteration,
                    "kind": wave.kind,
                    "rows": wave.rows,
                    "start_ms": _ms(wave.start - self.range.start),
                    "ms": _ms(wave.end - wave.start),
                    "network_ms": _ms(wave.network),
                    "launches": len(wave.works) if self.gpu else None,
                }
                for wave in self.waves
            ],
            "ranges": {
                label: {
                    "count": row.count,
                    "host_ms": None if row.host is None else _ms(row.host),
                    "gpu_ms": _ms(row.gpu) if self.gpu else None,
                    "launches": row.launches if self.gpu else None,
                }
                for label, row in self.table.items()
            },
            "notes": self.notes,
        }


def calls_of(recording: Recording) -> list[Call]:
    """The calls of a recording, in order."""
    ranges: dict[Range, list[Range]] = {}
    works: dict[Range, list[Work]] = {}
    for each in recording.ranges:
        ranges.setdefault(each.outermost, []).append(each)
    for work in recording.works:
        if work.launched is not None:
            works.setdefault(work.launched.outermost, []).append(work)
    return [
        _call(outer, parts, works.get(outer, []), recording) for outer, parts in ranges.items() if outer.kind == "call"
    ]


def _call(outer: Range, ranges: Sequence[Range], works: Sequence[Work], recording: Recording) -> Call:
    inner = [each for each in ranges if labels.aside(each) is None]
    replays = _replays(inner, works)
    of_nodes = {work: found for replay in replays.values() for work, found in replay.labels.items()}
    parts = {work: labels.around(work.launched) | of_nodes.get(work, frozenset()) for work in works}
    window = _window(outer, inner, parts)
    if works:
        waves = _gpu_waves(inner, replays, parts)
        processes = {work.process for work in works}
        running = (work.interval for work in recording.works if work.process in processes)
        busy = covered(within(running, window))
    else:
        waves, busy = _host_waves(inner), None
    table = _table(ranges, parts)
    for replayed in (wave for replay in replays.values() for wave in replay.waves):
        table[labels.of_wave(replayed.kind)].count += 1
    ordered = sorted(table.items(), key=lambda each: (*labels.ORDER, each[0]).index(each[0]))
    return Call(
        outer,
        ranges,
        bool(works),
        window,
        waves,
        dict(ordered),
        parts,
        busy,
        [*_driven(ranges), *_notes(inner, works, replays)],
    )


def _replays(ranges: Iterable[Range], works: Iterable[Work]) -> dict[Range, Replay]:
    nodes: dict[Range, list[Work]] = {each: [] for each in ranges if each.kind == "replay"}
    for work in works:
        replay = None if work.launched is None else work.launched.inside("replay")
        if replay in nodes and work.node:
            nodes[replay].append(work)
    return {each: labels.replay_of(found, each.payload or 0) for each, found in nodes.items()}


def _window(outer: Range, ranges: Iterable[Range], works: Mapping[Work, Labels]) -> Interval:
    iterations = [each.interval for each in ranges if each.kind == "iteration"]
    if not iterations:
        return outer.start, outer.start
    latest = max([end for _, end in iterations] + [work.end for work, parts in works.items() if "iteration" in parts])
    return iterations[0][0], latest


def _table(ranges: Iterable[Range], works: Mapping[Work, Labels]) -> dict[str, Row]:
    table: dict[str, Row] = {}
    for each in ranges:
        if each.parent is None or labels.aside(each.parent) is not None:
            continue
        row = table.setdefault(labels.of_range(each), Row())
        row.count += 1
        row.host = (row.host or 0) + each.end - each.start
    for work, parts in works.items():
        for label in parts:
            row = table.setdefault(label, Row())
            row.gpu += work.end - work.start
            row.launches += 1
    return table


def _gpu_waves(ranges: Iterable[Range], replays: Mapping[Range, Replay], parts: Mapping[Work, Labels]) -> list[Wave]:
    eager: dict[Range, list[Work]] = {each: [] for each in ranges if each.kind == "wave"}
    for work in parts:
        launched = work.launched
        wave = None if launched is None or launched.inside("checkpoint") else launched.inside("wave")
        if wave in eager:
            eager[wave].append(work)
    found = [(each, each.category, each.payload, works) for each, works in eager.items() if works]
    for at, replay in replays.items():
        found += [(at, wave.kind, wave.rows, wave.works) for wave in replay.waves]
    found.sort(key=lambda each: each[3][0].start)
    return [
        Wave(
            number=number,
            iteration=_iteration(at),
            kind=kind,
            rows=rows,
            start=min(work.start for work in works),
            end=max(work.end for work in works),
            works=works,
            network=covered(work.interval for work in works if "network" in parts[work]),
        )
        for number, (at, kind, rows, works) in enumerate(found)
    ]


def _host_waves(ranges: Sequence[Range]) -> list[Wave]:
    found: list[Wave] = []
    inside: dict[Range, list[Range]] = {each: [] for each in ranges if each.kind == "wave"}
    for part in ranges:
        if (wave := part.inside("wave")) is not None:
            inside[wave].append(part)
    for each, parts in inside.items():
        checkpoints = [part.start for part in parts if part.kind == "checkpoint"]
        found.append(
            Wave(
                number=len(found),
                iteration=_iteration(each),
                kind=each.category,
                rows=each.payload,
                start=each.start,
                end=min([each.end, *checkpoints]),
                works=[],
                network=covered(part.interval for part in parts if part.kind == "network"),
            )
        )
    return found


def _iteration(each: Range) -> int:
    """That it is part of. A replay may have been launched in the one before, and says itself which it is of."""
    if each.kind == "replay":
        return int(each.name.partition(" ")[2])
    around = each.inside("iteration")
    return 0 if around is None or around.payload is None else around.payload


def _driven(ranges: Iterable[Range]) -> Iterable[str]:
    if any(each.kind == "network" and labels.aside(each) == "trace" for each in ranges):
        yield "the pipeline's loop was driven: the network call of the first wave lies in trace, not in the waves"


def _notes(ranges: Sequence[Range], works: Sequence[Work], replays: Mapping[Range, Replay]) -> Iterable[str]:
    if not any(each.kind == "iteration" for each in ranges):
        yield "no iterations: it ran on the stock pipeline"
    if not works:
        if count := sum(each.payload or 0 for each in replays):
            yield f"{count} waves were replayed: the host does not see them, nor the network in them"
        return
    if any(work.kind == "graph" for work in works):
        yield "graphs were recorded as a whole: record with --cuda-graph-trace=node to see into them"
        return
    by_name = sum(replay.by_name for at, replay in replays.items() if at.payload)
    if by_name:
        yield (
            f"in {by_name} of {len(replays)} replays a wave is taken to end with its {UPDATE} kernel, and all before "
            "it to be the network: the profiler did not see the graphs being recorded, so coarse is not told from fine"
        )
    for at, replay in replays.items():
        if at.payload is not None and at.payload != len(replay.waves):
            yield f"a replay of {at.payload} waves was seen as {len(replay.waves)}"


def _ms(nanoseconds: int) -> float:
    return nanoseconds / 1e6
