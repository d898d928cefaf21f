"""Which requests share a call, and how it samples: what answers those that wait soonest, by the measured c(rows).

A parallel method makes one image sooner by more rows in all. With more requests than devices, these rows keep others
waiting. So requests of one kind share a call, parallel in time or one step after another, once that gives the lower
mean latency. Pure functions over predicted seconds.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..planner.choose import until
from ..planner.cost_curve import CostCurve
from ..planner.plan import Plan
from ..solvers.sequential import Sequential
from .kinds import Kind

# how a call samples: by the plan of one image, or one step after another
PARALLEL, SEQUENTIAL = "parallel", Sequential.name
WAYS = (PARALLEL, SEQUENTIAL)

# a call of several requests has to make so many times as many images a second to be worth a warm-up
GAIN = 1.1

Seconds = Callable[[Hashable, str, int], float]
"""Predicted seconds of a call, by the shape of its requests, the way that it samples, and its number of images."""


@dataclass(frozen=True)
class CallCosts:
    """What calls of one kind cost.

    Attributes:
        curve: seconds of a network call by rows, a row being one image with its guidance branches.
        widths: rows of each wave of the plan, for one image.
        steps: waves of one row that the sequential sampler takes.
        image_seconds: what each image takes outside the network: the arithmetic of its waves, and its decoding.
        measured: (way, images, seconds) of calls that were timed. What was timed goes before what follows from curve.
    """

    curve: CostCurve
    widths: tuple[int, ...]
    steps: int
    image_seconds: float = 0.0
    measured: tuple[tuple[str, int, float], ...] = ()
    _found: dict[tuple[str, int], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def seconds(self, way: str, images: int) -> float:
        """Predicted seconds of a call. A wave of r rows is a network call of r rows for each of the images."""
        if not self._found:
            self._found.update({(timed, count): seconds for timed, count, seconds in self.measured})
        if (way, images) not in self._found:
            widths = self.widths if way == PARALLEL else (1,) * self.steps
            network = _network_seconds(self.curve, widths, images)
            self._found[way, images] = network + images * self.image_seconds
        return self._found[way, images]


def _network_seconds(curve: CostCurve, widths: tuple[int, ...], images: int) -> float:
    return sum(count * curve(width * images) for width, count in Counter(widths).items())


def costs_of(
    plan: Plan | None, steps: int, seconds: float, measured: Sequence[tuple[str, int, float]] = ()
) -> CallCosts:
    """What calls of one kind cost, by the plan of one image.

    Args:
        plan: None: calls run on the pipeline's own loop.
        steps: of the sequential sampler.
        seconds: that a call for one image takes by this plan, measured.
        measured: see `CallCosts`.
    """
    if plan is None or plan.prediction is None:  # nothing is known of wider calls: every row costs as the first
        program = None if plan is None else plan.program()
        rows = steps if program is None else program.num_rows
        curve = CostCurve((1,), (seconds / rows,))
        return CallCosts(curve, (1,) * rows, steps, measured=tuple(measured))
    iterations, curve = plan.prediction.chosen.iterations, plan.costs(plan.prediction.curve)
    widths = (1,) * steps if plan.is_sequential else tuple(until(plan, iterations).widths(iterations))
    outside = max(0.0, seconds - _network_seconds(curve, widths, 1))
    return CallCosts(curve, widths, steps, outside, tuple(measured))


class Warmed(NamedTuple):
    """What is known of the calls that a worker has prepared.

    Attributes:
        sizes: their numbers of images, ascending from 1.
        costs: of each kind.
        seconds: that the warm-up took: of calls for one image, and of those for several.
    """

    sizes: tuple[int, ...] = (1,)
    costs: tuple[tuple[Kind, CallCosts], ...] = ()
    seconds: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Policy:
    """The calls that may be made.

    Attributes:
        ways: how they may sample.
        sizes: numbers of images that calls of several requests may have, ascending. A request is never divided: alone
            it may have any number.
    """

    ways: tuple[str, ...] = WAYS
    sizes: tuple[int, ...] = (1,)

    @classmethod
    def of(cls, batching: str, sizes: Sequence[int]) -> Policy:
        """The policy that the settings of a server ask for, see `ServerSettings.batching`."""
        if batching == "never":
            return cls((PARALLEL,), (1,))
        return cls((SEQUENTIAL,) if batching == SEQUENTIAL else WAYS, tuple(sorted(sizes)))


def sizes_that_pay(costs: CallCosts, policy: Policy) -> tuple[int, ...]:
    """Those of the policy's sizes that are worth a warm-up: each makes more images a second than the one before it."""

    def of_an_image(size: int) -> float:
        ways = policy.ways if size > 1 else policy.ways[:1]
        return min(costs.seconds(way, size) for way in ways) / size

    found = [1]
    for size in policy.sizes:
        if of_an_image(size) * GAIN <= of_an_image(found[-1]):
            found.append(size)
    return tuple(found)


def batches(images: int, sizes: Sequence[int]) -> list[int]:
    """Batch sizes of the calls that make so many images, the largest first. sizes: ascending, the first is 1."""
    found = []
    for size in reversed(sizes):
        found += [size] * (images // size)
        images %= size
    return found


@dataclass(frozen=True)
class Waiting:
    """A request that waits.

    Attributes:
        number: in order of arrival.
        kind: those of one kind may share a call; None: it has a call of its own, by the plan.
        shape: what the seconds of its call depend on, besides its way and its number of images.
        due: the time on the clock by which its answer is wanted; None: there is none.
        job: what it is to the caller.
    """

    number: int
    kind: Hashable | None
    shape: Hashable
    images: int = 1
    due: float | None = None
    job: object = field(default=None, compare=False)


@dataclass(frozen=True)
class Call:
    """Requests that are answered together, in order of arrival, and how the call samples."""

    members: tuple[Waiting, ...]
    way: str

    @property
    def images(self) -> int:
        return sum(each.images for each in self.members)

    def seconds(self, seconds: Seconds) -> float:
        return seconds(self.members[0].shape, self.way, self.images)


def call_of(members: Sequence[Waiting], seconds: Seconds, policy: Policy) -> Call:
    """These requests in one call, sampled in the way that takes least time.

    A request that has a call for itself runs in the first way, whatever times were seen of late: the same seed then
    gives the same image.
    """
    ways = policy.ways if len(members) > 1 else policy.ways[:1]
    return min((Call(tuple(members), way) for way in ways), key=lambda call: call.seconds(seconds))


def groupings(waiting: Sequence[Waiting], seconds: Seconds, policy: Policy) -> Iterator[tuple[Call, ...]]:
    """Ways to share out requests over calls, in the order in which they are made.

    One for each number of images that a call may have at most. The first request that waits is always in the first
    call; those of its kind that wait next may join it.

    Args:
        waiting: in order of arrival.
    """
    for most in policy.sizes:
        of_kind: dict[Hashable, deque[Waiting]] = {}
        for each in waiting:
            if each.kind is not None:
                of_kind.setdefault(each.kind, deque()).append(each)
        taken: set[int] = set()
        calls = []
        for first in waiting:
            if first.number not in taken:
                group = [first] if first.kind is None else _first_group(of_kind[first.kind], most, policy.sizes)
                taken.update(each.number for each in group)
                calls.append(call_of(group, seconds, policy))
        yield tuple(calls)


def _first_group(left: deque[Waiting], most: int, sizes: Sequence[int]) -> list[Waiting]:
    """Take the first requests: as many as there is a size for, of `most` images at most; or the first alone."""
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
    devices, found = list(free), dict[int, float]()
    heapq.heapify(devices)
    for call in calls:
        end = devices[0] + call.seconds(seconds)
        heapq.heapreplace(devices, end)
        found.update((each.number, end) for each in call.members)
    return found


def late(calls: Sequence[Call], ends: dict[int, float]) -> set[int]:
    """Numbers of the requests that are answered after they are due."""
    members = (each for call in calls for each in call.members)
    return {each.number for each in members if each.due is not None and ends[each.number] > each.due}


def soonest(
    found: Sequence[tuple[Call, ...]], free: Sequence[float], seconds: Seconds, may_be_late: set[int]
) -> tuple[Call, ...] | None:
    """The calls with the lowest mean latency, of those in which nobody is late but who may be. None: there are none.

    Of equal ones, the first.
    """
    best, least = None, 0.0
    for calls in found:
        ends = answered(calls, free, seconds)
        total = sum(ends.values())
        if late(calls, ends) <= may_be_late and (best is None or total < least):
            best, least = calls, total
    return best


def next_calls(seconds: Callable[[str, int], float], policy: Policy, most: int) -> list[Call]:
    """The call that is made next while 1, 2, .., `most` requests of one kind and one image wait for one device.

    seconds: of a call, by its way and its number of images.
    """
    found = []
    for queue in range(1, most + 1):
        waiting = [Waiting(number, "one", "one") for number in range(queue)]

        def of_call(_: Hashable, way: str, images: int) -> float:
            return seconds(way, images)

        best = soonest(list(groupings(waiting, of_call, policy)), [0.0], of_call, set())
        assert best is not None  # nobody can be late
        found.append(best[0])
    return found
