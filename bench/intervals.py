"""Stretches of time, in nanoseconds, and how they lie to each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The time that any of them covers, as stretches that do not touch, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def covered(intervals: Iterable[Interval]) -> int:
    """The time that any of them covers."""
    return sum(end - start for start, end in union(intervals))


def within(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """Those parts that lie in a window."""
    clipped = ((max(start, window[0]), min(end, window[1])) for start, end in intervals)
    return [(start, end) for start, end in clipped if start < end]


def at_once(groups: Iterable[Sequence[Interval]]) -> int:
    """The time in which intervals of two groups or more run."""
    steps = sorted(step for group in groups for start, end in union(group) for step in ((start, 1), (end, -1)))
    running = total = 0
    for (time, change), (following, _) in pairwise(steps):
        running += change
        total += following - time if running > 1 else 0
    return total
