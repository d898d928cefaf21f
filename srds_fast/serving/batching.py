"""Which requests share a call, and how it samples: what answers those that wait soonest, by the measured c(rows).

A parallel method makes one image sooner by more rows in all. With more requests than devices, these rows keep others
waiting. So requests of one kind share a call, parallel in time or one step after another, once that gives the lower
mean latency. Pure functions over predicted seconds.
"""

from __future__ import annotations

import functools
import heapq
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..planner.cost_curve import CostCurve
from .contract import ImageRequest

# how a call samples: by the frozen plan, or one step after another
PARALLEL, SEQUENTIAL = "parallel", "sequential"
WAYS = (PARALLEL, SEQUENTIAL)

Seconds = Callable[[Hashable, str, int], float]
"""Predicted seconds of a call, by the kind of its requests, the way that it samples, and its number of images."""


class Kind(NamedTuple):
    """Requests of the same kind may share a call. They differ in their prompts, seeds and numbers of images."""

    steps: int
    width: int | None
    height: int | None
    guidance_scale: float | None
    negative_prompt: str | None

    @classmethod
    def of(cls, request: ImageRequest) -> Kind:
        size = request.width, request.height
        return cls(request.steps, *size, request.guidance_scale, request.negative_prompt)


@dataclass(frozen=True)
class CallCosts:
    """What calls of one kind cost, by what was measured.

    Attributes:
        curve: seconds of a network call by rows, a row being one image with its guidance branches.
        widths: rows of each wave of the plan, for one image.
        steps: waves of one row that the sequential sampler takes.
        fixed_seconds: what a call takes outside the network.
        image_seconds: what each image takes outside the network, as decoding it.
    """

    curve: CostCurve
    widths: tuple[int, ...]
    steps: int
    fixed_seconds: float = 0.0
    image_seconds: float = 0.0

    def seconds(self, way: str, images: int) -> float:
        """Predicted seconds of a call. A wave of r rows is a network call of r rows for each of the images."""
        widths = self.widths if way == PARALLEL else (1,) * self.steps
        return _network_seconds(self.curve, widths, images) + self.fixed_seconds + images * self.image_seconds


@functools.lru_cache(maxsize=1024)
def _network_seconds(curve: CostCurve, widths: tuple[int, ...], images: int) -> float:
    return sum(count * curve(width * images) for width, count in Counter(widths).items())


@dataclass(frozen=True)
class Policy:
    """The calls that may be made.

    Attributes:
        ways: how they may sample.
        sizes: numbers of images that a call of several requests may have, ascending. A request is never divided: alone
            it may have any number.
    """

    ways: tuple[str, ...] = WAYS
    sizes: tuple[int, ...] = (1,)

    @classmethod
    def of(cls, batching: str, sizes: Sequence[int]) -> Policy:
        """The policy that the settings of a server ask for, see `ServerSettings.batching`."""
        if batching == "never":
            return cls((PARALLEL,), (1,))
        return cls((SEQUENTIAL,) if batching == "sequential" else WAYS, tuple(sorted(sizes)))


@dataclass(frozen=True)
class Waiting:
    """A request that waits. due: the time on the clock by which its answer is wanted; None: there is none."""

    number: int  # in order of arrival
    kind: Hashable
    images: int = 1
    due: float | None = None


@dataclass(frozen=True)
class Call:
    """Requests that are answered together; all are of one kind, in order of arrival."""

    members: tuple[Waiting, ...]
    way: str

    def seconds(self, seconds: Seconds) -> float:
        return seconds(self.members[0].kind, self.way, sum(each.images for each in self.members))


def call_of(members: Sequence[Waiting], seconds: Seconds, policy: Policy) -> Call:
    """These requests in one call, sampled in the way that takes least time."""
    return min((Call(tuple(members), way) for way in policy.ways), key=lambda call: call.seconds(seconds))


def groupings(waiting: Sequence[Waiting], seconds: Seconds, policy: Policy) -> Iterator[tuple[Call, ...]]:
    """Ways to share out requests over calls, in the order in which they are made.

    One for each number of images that a call may have at most. The first request that waits is always in the first
    call; those of its kind that wait next may join it.
    """
    for most in policy.sizes:
        of_kind: dict[Hashable, deque[Waiting]] = {}
        for each in waiting:
            of_kind.setdefault(each.kind, deque()).append(each)
        taken: set[int] = set()
        calls = []
        for first in waiting:
            if first.number not in taken:
                group = _first_group(of_kind[first.kind], most, policy.sizes)
                taken.update(each.number for each in group)
                calls.append(call_of(group, seconds, policy))
        yield tuple(calls)


def _first_group(left: deque[Waiting], most: int, sizes: Sequence[int]) -> list[Waiting]:
    """Take the first requests: for as many images as calls are prepared for, at most `most`; or the first alone."""
    images, count = 0, 1
    for number, each in enumerate(left, start=1):
        images += each.images
        if images > most:
            break
        if images in sizes:
            count = number
    return [left.popleft() for _ in range(count)]


def answered(calls: Sequence[Call], free: Sequence[float], seconds: Seconds) -> dict[int, float]:
    """When each request is answered, by its number, if each call begins once a device is free.

    free: times at which the devices are free, one for each.
    """
    devices, found = list(free), {}
    heapq.heapify(devices)
    for call in calls:
        end = heapq.heappop(devices) + call.seconds(seconds)
        heapq.heappush(devices, end)
        found.update((each.number, end) for each in call.members)
    return found


def late(calls: Sequence[Call], ends: dict[int, float]) -> set[int]:
    """Numbers of the requests that are answered after they are due."""
    members = (each for call in calls for each in call.members)
    return {each.number for each in members if each.due is not None and ends[each.number] > each.due}
