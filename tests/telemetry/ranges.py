"""Ranges as a tree, whoever recorded them, and what must hold of the ranges of a call."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("encode", "trace", "plan", "iteration", "record", "explore", "decode", "stock")
# what may lie directly in what
INSIDE = {
    "call": PHASES,
    "trace": ("network",),
    "plan": ("network",),
    # one that is replayed may have to be recorded first
    "iteration": ("wave", "wave_update", "replay", "checkpoint", "record"),
    "wave": ("network", "wave_update", "checkpoint", "coarse", "fine"),
    "coarse": ("network",),
    "fine": ("network",),
    # a network call of a new width is recorded when it has been made
    "network": ("record",),
    # what was recorded is replayed once, to be compared
    "record": ("iteration", "replay"),
}
NAME = re.compile(r"(?P<name>[a-z_]+( \d+)?)( \((?P<kind>coarse|fine|mixed), (?P<rows>\d+) rows?\)| \(.+\))?")


@dataclass
class Range:
    """A range and those in it, in order. payload: a number that goes with it, or None."""

    name: str
    category: str
    payload: int | None
    started: float
    stopped: float = 0.0
    inside: list[Range] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Its name without a number."""
        return self.name.split(" ")[0]

    def walk(self) -> list[Range]:
        """All ranges in it."""
        return [found for each in self.inside for found in (each, *each.walk())]

    def of(self, *kinds: str) -> list[Range]:
        """Those in it of these kinds, without what is measured or recorded."""
        found = []
        for each in self.inside:
            found += [each] if each.kind in kinds else []
            found += [] if each.kind in ("plan", "record") else each.of(*kinds)
        return found

    def check(self) -> None:
        """Whether everything in it is where it belongs."""
        for before, after in zip(self.inside, self.inside[1:], strict=False):
            assert before.stopped <= after.started
        for each in self.inside:
            assert self.started <= each.started <= each.stopped <= self.stopped, (self.name, each.name)
            assert each.kind in INSIDE.get(self.kind, ()), (self.name, each.name)
            each.check()

    def tree(self) -> tuple[Any, ...]:
        """Names, and of waves what they are, as a trace has them too."""
        wave = (self.category, self.payload) if self.kind == "wave" else ()
        return self.name, *wave, *(each.tree() for each in self.inside)


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


def in_a_trace(path: Path) -> list[Range]:
    """The outermost ranges of a Chrome trace, in the order these began."""
    events = [each for each in json.loads(path.read_text())["traceEvents"] if each.get("cat") == "user_annotation"]
    outermost: list[Range] = []
    running: dict[int, list[Range]] = {}
    for each in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
        name = NAME.fullmatch(each["name"])
        assert name is not None, each["name"]
        rows = None if name["rows"] is None else int(name["rows"])
        found = Range(name["name"], name["kind"] or "", rows, each["ts"], each["ts"] + each["dur"])
        around = running.setdefault(each["tid"], [])
        while around and around[-1].stopped <= found.started:
            around.pop()
        (around[-1].inside if around else outermost).append(found)
        around.append(found)
    return outermost
