"""What `nsys export --type sqlite` writes, read into ranges and GPU work.

The schema is that of Nsight Systems 2022.4 (3.0.0), and what later versions have renamed in it. All times are
nanoseconds of one clock.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.intervals import Interval

DOMAIN = "srds_fast"
# of NVTX_EVENTS.eventType
CATEGORY, PUSH_POP, DOMAIN_CREATE = 33, 59, 75
# table, kind of work, where its name stands
WORK_TABLES = (
    ("CUPTI_ACTIVITY_KIND_KERNEL", "kernel", "shortName"),
    ("CUPTI_ACTIVITY_KIND_MEMCPY", "copy", None),
    ("CUPTI_ACTIVITY_KIND_MEMSET", "fill", None),
    # recorded with --cuda-graph-trace=graph: a launch is one piece of work
    ("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", "graph", None),
)
# the second is the name of 2022; later that table lists whole graphs and has no such columns
NODE_TABLES = ("CUDA_GRAPH_NODE_EVENTS", "CUDA_GRAPH_EVENTS")


class NotARecording(ValueError):
    """A file that cannot be reported on: what it is, and what to do."""


@dataclass(frozen=True, eq=False)
class Range:
    """A range that a thread pushed and popped.

    Attributes:
        name: as given, "wave 3".
        category: its name, "fine"; None where it has none.
        payload: the number given with it.
        start, end: ns.
        thread: of the process that pushed it.
        parent: the range around it.
        depth: how many are around it.
    """

    name: str
    category: str | None
    payload: int | None
    start: int
    end: int
    thread: int
    parent: Range | None = None
    depth: int = 0

    @property
    def kind(self) -> str:
        """What it is of: its name without a number."""
        return self.name.split(" ")[0]

    def path(self) -> Iterator[Range]:
        """Itself and those around it, outwards."""
        at: Range | None = self
        while at is not None:
            yield at
            at = at.parent

    @property
    def outermost(self) -> Range:
        """The last of its path."""
        return list(self.path())[-1]

    @property
    def interval(self) -> Interval:
        """From start to end."""
        return self.start, self.end

    def inside(self, kind: str) -> Range | None:
        """The innermost range of a kind that it is or lies in."""
        return next((each for each in self.path() if each.kind == kind), None)


@dataclass(frozen=True, eq=False)
class Work:
    """Something that a GPU did.

    Attributes:
        name: of a kernel, without its arguments; "copy", "fill", "graph" otherwise.
        kind: "kernel", "copy", "fill" or, where graphs were recorded as a whole, "graph".
        start, end: ns.
        process, device, stream: that it ran for and on.
        launched: the innermost range in which the host launched it, or the graph that it is part of.
        node: it is a node of a graph.
        created: the innermost range in which the node was recorded; None too where that was not seen.
    """

    name: str
    kind: str
    start: int
    end: int
    process: int
    device: int
    stream: int
    launched: Range | None
    node: bool
    created: Range | None

    @property
    def interval(self) -> Interval:
        """From start to end."""
        return self.start, self.end


@dataclass
class Recording:
    """A file.

    Attributes:
        ranges: of the domain, in order of their start.
        works: all that GPUs did, in order of its start.
        gpu: the file has tables of GPU work.
    """

    ranges: list[Range]
    works: list[Work]
    gpu: bool


def process_of(identifier: int) -> int:
    """The process in a globalTid or globalPid."""
    return identifier >> 24 & 0xFFFFFF


def read(path: Path) -> Recording:
    """Read an export.

    Raises:
        NotARecording: it is no such file, or has no range of this package.
    """
    if not path.is_file():
        raise NotARecording(f"{path} is no file. Name one that `nsys export --type sqlite` wrote.")
    # read only: to look is not to change
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        try:
            tables = _Tables(database)
        except sqlite3.DatabaseError as error:
            raise NotARecording(
                f"{path} is no sqlite file ({error}). A .nsys-rep is turned into one by "
                "`nsys export --type sqlite FILE.nsys-rep`."
            ) from error
        if "NVTX_EVENTS" not in tables.columns:
            raise NotARecording(
                f"{path} has no NVTX ranges. Record with --trace=cuda,nvtx, and switch the ranges on: "
                "srds_fast.profile() around the calls, or SRDS_FAST_PROFILE=1 in the environment."
            )
        ranges = _ranges(tables)
        if not ranges:
            raise NotARecording(
                f"{path} has no ranges of the domain {DOMAIN!r}. Switch them on: srds_fast.profile() around the calls, "
                "or SRDS_FAST_PROFILE=1 in the environment. If they were, take a newer nsys: 2022.4 sees none from the "
                "Python package nvtx 0.2.12 and later."
            )
        works = _works(tables, _Places(ranges))
        return Recording(ranges, works, any(table in tables.columns for table, _, _ in WORK_TABLES))


class _Tables:
    """The tables of a file: what columns they have, and their rows."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        self.columns = {name: {row[1] for row in database.execute(f"PRAGMA table_info({name})")} for name in names}
        strings = self.rows("StringIds", "id", "value") if "StringIds" in names else ()
        self.strings: dict[int, str] = dict(strings)

    def rows(self, table: str, *columns: str) -> Iterator[Any]:
        """These columns of a table; None for one it does not have."""
        has = self.columns[table]
        listed = ", ".join(f'"{column}"' if column in has else "NULL" for column in columns)
        return iter(self._database.execute(f"SELECT {listed} FROM {table}"))


def _ranges(tables: _Tables) -> list[Range]:
    domains: set[tuple[int, int]] = set()
    categories: dict[tuple[int, int, int], str] = {}
    pushed: list[tuple[Any, ...]] = []
    columns = ("eventType", "start", "end", "globalTid", "domainId", "category", "text", "textId")
    payloads = ("int64Value", "uint64Value", "int32Value", "uint32Value")
    for kind, start, end, thread, domain, category, text, text_id, *payload in tables.rows(
        "NVTX_EVENTS", *columns, *payloads
    ):
        name = text if text is not None else tables.strings.get(text_id, "")
        if kind == DOMAIN_CREATE and name == DOMAIN:
            domains.add((process_of(thread), domain))
        elif kind == CATEGORY:
            categories[process_of(thread), domain, category] = name
        elif kind == PUSH_POP and end is not None:
            number = next((value for value in payload if value is not None), None)
            pushed.append((thread, start, -end, name, domain, category, number))
    found: list[Range] = []
    around: list[Range] = []
    for thread, start, minus_end, name, domain, category, number in sorted(pushed, key=lambda each: each[:3]):
        process = process_of(thread)
        if (process, domain) not in domains:
            continue
        while around and (around[-1].thread != thread or around[-1].end < -minus_end):
            around.pop()
        parent = around[-1] if around else None
        kind = categories.get((process, domain, category))
        each = Range(name, kind, number, start, -minus_end, thread, parent, len(around))
        around.append(each)
        found.append(each)
    return sorted(found, key=lambda each: (each.start, each.depth))


class _Places:
    """Which range a thread was in at a time."""

    def __init__(self, ranges: list[Range]) -> None:
        self._ranges: dict[int, list[Range]] = {}
        for each in ranges:
            self._ranges.setdefault(each.thread, []).append(each)
        self._starts = {thread: [each.start for each in found] for thread, found in self._ranges.items()}

    def at(self, thread: int | None, time: int) -> Range | None:
        """The innermost one."""
        if thread not in self._ranges:
            return None
        last = bisect_right(self._starts[thread], time) - 1
        found = self._ranges[thread][last] if last >= 0 else None
        while found is not None and found.end < time:
            found = found.parent
        return found


def _works(tables: _Tables, places: _Places) -> list[Work]:
    launches: dict[tuple[int, int], tuple[int, int]] = {}
    if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables.columns:
        for start, thread, correlation in tables.rows(
            "CUPTI_ACTIVITY_KIND_RUNTIME", "start", "globalTid", "correlationId"
        ):
            if thread is not None:
                launches[process_of(thread), correlation] = thread, start
    created = _created(tables, places)
    found: list[Work] = []
    columns = ("start", "end", "globalPid", "deviceId", "streamId", "correlationId", "graphNodeId")
    for table, kind, naming in WORK_TABLES:
        if table not in tables.columns:
            continue
        for start, end, pid, device, stream, correlation, node, name_id in tables.rows(
            table, *columns, naming or "absent"
        ):
            process = process_of(pid or 0)
            launch = launches.get((process, correlation))
            found.append(
                Work(
                    name=tables.strings.get(name_id, kind),
                    kind=kind,
                    start=start,
                    end=end,
                    process=process,
                    device=device,
                    stream=stream,
                    launched=None if launch is None else places.at(*launch),
                    node=node is not None,
                    created=created.get((process, node)),
                )
            )
    return sorted(found, key=lambda each: (each.start, each.end))


def _created(tables: _Tables, places: _Places) -> dict[tuple[int, int], Range | None]:
    """By process and node: where what it is a copy of was recorded. An instantiated graph is a copy of nodes."""
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    copy_of: dict[tuple[int, int], tuple[int, int]] = {}
    for table in NODE_TABLES:
        if "graphNodeId" not in tables.columns.get(table, ()):
            continue
        for start, thread, node, original in tables.rows(
            table, "start", "globalTid", "graphNodeId", "originalGraphNodeId"
        ):
            key = process_of(thread or 0), node
            seen.setdefault(key, (thread, start))
            if original is not None and original != node:
                copy_of[key] = key[0], original
    found: dict[tuple[int, int], Range | None] = {}
    for key in seen:
        root = key
        while root in copy_of:
            root = copy_of[root]
        found[key] = places.at(*seen[root]) if root in seen else None
    return found
