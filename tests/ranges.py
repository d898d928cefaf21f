"""Ranges as a tree, whoever recorded them, and what must hold of the ranges of a call."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("encode", "trace", "plan", "iteration", "record", "decode", "stock")
# what may lie directly in what, by category; a wave is "coarse", "fine" or "mixed"
INSIDE = {
    "call": PHASES,
    "trace": ("network",),
    "plan": ("network",),
    # one that is replayed may have to be recorded first
    "iteration": ("wave", "wave_update", "replay", "checkpoint", "record"),
    "wave": ("network", "wave_update", "checkpoint", "lane"),
    "lane": ("network",),
    # widths of waves are recorded one by one; what was recorded is replayed once, to be compared
    "record": ("iteration", "wave", "network", "replay"),
}


@dataclass
class Range:
    """A range and those in it, in order.

    Attributes:
        payload: a number that goes with it, or None.
    """

    name: str
    category: str
    payload: int | None
    started: float
    stopped: float = 0.0
    inside: list[Range] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Its category, but that waves are of one kind, and rows on a stream of their own of another."""
        if self.name.startswith("wave "):
            return "wave"
        return "lane" if self.name in ("coarse", "fine") else self.category

    def walk(self) -> Iterator[Range]:
        """All ranges in it."""
        for each in self.inside:
            yield each
            yield from each.walk()

    def of(self, *kinds: str) -> list[Range]:
        """Those in it of these kinds, what is measured or recorded left out."""
        found = []
        for each in self.inside:
            found += [each] if each.kind in kinds else []
            if each.kind not in ("plan", "record"):
                found += each.of(*kinds)
        return found

    def check(self) -> None:
        """Whether everything in it is where it belongs."""
        for before, after in zip(self.inside, self.inside[1:], strict=False):
            assert before.stopped <= after.started
        for each in self.inside:
            assert self.started <= each.started <= each.stopped <= self.stopped, (self.name, each.name)
            assert each.kind in INSIDE.get(self.kind, ()), (self.name, each.name)
            each.check()


def told_to_a_tool(path: Path) -> list[list[Range]]:
    """The outermost ranges that the tool of nvtx_recorder.c was told of, by thread, in the order these began."""
    outermost: dict[int, list[Range]] = {}
    running: dict[int, list[Range]] = {}
    categories: dict[int, str] = {}
    for line in path.read_text().splitlines():
        told = json.loads(line)
        assert told["domain"] == "srds_fast"
        if told["event"] == "category":
            categories[told["number"]] = told["name"]
            continue
        around = running.setdefault(told["thread"], [])
        if told["event"] == "push":
            begun = Range(told["message"], categories[told["category"]], told["payload"], told["at"])
            (around[-1].inside if around else outermost.setdefault(told["thread"], [])).append(begun)
            around.append(begun)
        else:
            around.pop().stopped = told["at"]
    assert not any(running.values()), "every range is ended"
    return list(outermost.values())


def in_a_trace(path: Path, track: str = "host") -> list[Range]:
    """The outermost ranges of a Chrome trace, of all tracks whose name begins so."""
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {
        each["tid"] for each in events if each["name"] == "thread_name" and each["args"]["name"].startswith(track)
    }
    outermost: list[Range] = []
    for tid in sorted(tracks):
        running: list[Range] = []
        for each in _complete(events, tid):
            found = Range(each["name"], each["cat"], _payload(each["args"]), each["ts"], each["ts"] + each["dur"])
            while running and running[-1].stopped <= found.started:
                running.pop()
            (running[-1].inside if running else outermost).append(found)
            running.append(found)
    return outermost


def _complete(events: Iterable[dict[str, Any]], tid: int) -> list[dict[str, Any]]:
    return [each for each in events if each["ph"] == "X" and each["tid"] == tid]


def _payload(args: dict[str, Any]) -> int | None:
    return next((args[name] for name in ("rows", "waves", "iteration") if name in args), None)
