"""The queue: who is let in, and which call is made next.

Requests wait in order of arrival. The queue keeps the calls in which they will be answered, so it can tell each new
request when its answer comes. A request that would come too late, or would make another one late, is refused at once.

A deadline that was accepted is kept, if calls take the predicted time: a new order of calls is taken only if nobody in
it is late who was not late before. Where a request leaves, its call becomes shorter, and no other call later: calls are
made in a fixed order, each once a device is free.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

from .batching import Call, Policy, Seconds, Waiting, answered, call_of, groupings, late
from .contract import Refused

# seconds after which to try again, at least: clients round them to whole ones
SOON = 1.0


class Queue:
    """Requests that wait, in order of arrival, and the calls in which they will be answered.

    Args:
        policy: the calls that may be made.
        seconds: predicts what a call takes.
        most: requests that may wait for each device.
    """

    def __init__(self, policy: Policy, seconds: Seconds, most: int) -> None:
        self._policy, self._seconds, self._most = policy, seconds, most
        self._calls: tuple[Call, ...] = ()
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(len(call.members) for call in self._calls)

    @property
    def waiting(self) -> list[Waiting]:
        """Those that wait, in order of arrival."""
        members = (each for call in self._calls for each in call.members)
        return sorted(members, key=lambda each: each.number)

    def admit(self, kind: Hashable, images: int, due: float | None, free: Sequence[float], now: float) -> Waiting:
        """Let a request in.

        Args:
            kind: requests of the same kind may share a call.
            due: time on the clock by which its answer is wanted; None: it has no deadline.
            free: times at which the devices are free, one for each, none of them before `now`.

        Raises:
            Refused: the queue is full, or the answer would come too late.
        """
        if len(self) >= self._most * len(free) and (self._calls or min(free) > now):
            again = max(SOON, min(answered(self._calls, free, self._seconds).values(), default=min(free)) - now)
            raise Refused(
                429,
                f"{len(self)} requests wait, and no more may. Try again in {again:.1f} seconds.",
                code="queue_full",
                retry_after=again,
            )
        new = Waiting(next(self._numbers), kind, images, due)
        alone = call_of([new], self._seconds, self._policy)
        last = [(*self._calls, alone), *self._fresh([*self.waiting, new])]
        # to join a call that was planned already may still be in time where the orders above make somebody late
        if not (self._take(last, free) or self._take(self._joined(new), free)):
            raise self._too_late(new, free, now)
        return new

    def leave(self, waiting: Waiting, free: Sequence[float]) -> None:
        """A request that waits is given up."""
        self._calls = tuple(self._without(waiting))
        self._take([self._calls, *self._fresh(self.waiting)], free)

    def replan(self, free: Sequence[float]) -> None:
        """Devices have come or gone."""
        self._take([self._calls, *self._fresh(self.waiting)], free)

    def next(self) -> Call | None:
        """The call that is to be made next; its requests wait no longer. None: nobody waits."""
        if not self._calls:
            return None
        first, *others = self._calls
        self._calls = tuple(others)
        return first

    def _fresh(self, waiting: Sequence[Waiting]) -> list[tuple[Call, ...]]:
        return list(groupings(waiting, self._seconds, self._policy))

    def _joined(self, new: Waiting) -> list[tuple[Call, ...]]:
        """The calls as they are, with a new request in one of them."""
        found = []
        for place, call in enumerate(self._calls):
            members = (*call.members, new)
            if call.members[0].kind == new.kind and sum(each.images for each in members) in self._policy.sizes:
                joined = call_of(members, self._seconds, self._policy)
                found.append((*self._calls[:place], joined, *self._calls[place + 1 :]))
        return found

    def _without(self, gone: Waiting) -> list[Call]:
        found = []
        for call in self._calls:
            members = tuple(each for each in call.members if each.number != gone.number)
            if members == call.members:
                found.append(call)
            elif members:
                # the way that took least time for more images may not for fewer
                found.append(call_of(members, self._seconds, self._policy))
        return found

    def _take(self, found: Sequence[tuple[Call, ...]], free: Sequence[float]) -> bool:
        """Take the calls with the lowest mean latency, of those that make nobody late who is not late anyhow."""
        already = late(self._calls, answered(self._calls, free, self._seconds))
        best, least = None, 0.0
        for calls in found:
            ends = answered(calls, free, self._seconds)
            total = sum(ends.values())
            if late(calls, ends) <= already and (best is None or total < least):
                best, least = calls, total
        if best is not None:
            self._calls = best
        return best is not None

    def _too_late(self, new: Waiting, free: Sequence[float], now: float) -> Refused:
        assert new.due is not None  # without a deadline it can always be the last
        end = answered([*self._calls, call_of([new], self._seconds, self._policy)], free, self._seconds)[new.number]
        own = call_of([new], self._seconds, self._policy).seconds(self._seconds)
        limit = new.due - now
        if own > limit:
            return Refused(
                422,
                f"The deadline is {limit:.2f} seconds from now, and the sampling alone is predicted to take {own:.2f} "
                "seconds. Ask for fewer steps or images, or allow more time.",
                parameter="X-Deadline-Ms",
                code="deadline_cannot_be_met",
            )
        again = max(SOON, end - new.due)
        return Refused(
            429,
            f"The deadline is {limit:.2f} seconds from now, and the answer is predicted in {end - now:.2f} seconds, "
            f"{own:.2f} of them for the sampling. Try again in {again:.1f} seconds, or allow more time.",
            parameter="X-Deadline-Ms",
            code="deadline_cannot_be_met",
            retry_after=again,
        )
