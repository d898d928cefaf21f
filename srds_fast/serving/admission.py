"""The queue: who is let in, and which call is made next.

Requests wait in order of arrival. The queue keeps the calls in which they will be answered, so it can tell a new
request when its answer comes. A request that would be late, or would make another one late, is refused at once.

A deadline that was accepted is kept if calls take what was predicted: other calls are planned only where nobody in them
is late who was not late before. Otherwise the calls stay as they are, even where a request that was given up then
still has its part in one.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

from .batching import Call, Policy, Seconds, Waiting, answered, call_of, groupings, late, soonest
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
        self._left: set[int] = set()  # numbers of those that were given up, and still have a part in a call
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self.waiting)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls that are planned, in the order in which they will be made."""
        return self._calls

    @property
    def waiting(self) -> list[Waiting]:
        """Those that wait, in order of arrival."""
        members = (each for call in self._calls for each in call.members if each.number not in self._left)
        return sorted(members, key=lambda each: each.number)

    def admit(
        self,
        kind: Hashable | None,
        shape: Hashable,
        images: int,
        due: float | None,
        free: Sequence[float],
        now: float,
        job: object = None,
    ) -> Waiting:
        """Let a request in.

        Args:
            kind, shape, images, due, job: see `Waiting`.
            free: times at which the devices are free, one for each, none of them before `now`.

        Raises:
            Refused: the queue is full, or somebody would be late.
        """
        waiting = self.waiting
        if len(waiting) >= self._most * len(free) and (waiting or min(free) > now):
            again = max(SOON, min(answered(self._calls, free, self._seconds).values(), default=min(free)) - now)
            raise Refused(
                429,
                f"{len(waiting)} requests wait, and no more may. Try again in {again:.1f} seconds.",
                code="queue_full",
                retry_after=again,
            )
        new = Waiting(next(self._numbers), kind, shape, images, due, job)
        last = [(*self._calls, self._call([new])), *self._fresh([*waiting, new])]
        # to join a call that is planned may still be in time where the orders above make somebody late
        if not (self._take(last, free) or self._take(self._joined(new), free)):
            raise self._too_late(new, free, now)
        return new

    def leave(self, gone: Waiting, free: Sequence[float]) -> None:
        """A request that waits is given up."""
        self._left.add(gone.number)
        self.replan(free)

    def replan(self, free: Sequence[float]) -> None:
        """Plan anew: a request has left, or a device has come or gone."""
        self._take([self._without_left(), *self._fresh(self.waiting)], free)

    def next(self) -> Call | None:
        """The call that is to be made next; its requests wait no longer. None: nobody waits."""
        while self._calls:
            first, *others = self._calls
            self._calls = tuple(others)
            numbers = {each.number for each in first.members}
            all_left = numbers <= self._left
            self._left -= numbers
            if not all_left:
                return first
        return None

    def _call(self, members: Sequence[Waiting]) -> Call:
        return call_of(members, self._seconds, self._policy)

    def _fresh(self, waiting: Sequence[Waiting]) -> list[tuple[Call, ...]]:
        return list(groupings(waiting, self._seconds, self._policy))

    def _without_left(self) -> tuple[Call, ...]:
        kept = (tuple(each for each in call.members if each.number not in self._left) for call in self._calls)
        calls = (self._call(members) for members in kept if members)
        return tuple(sorted(calls, key=lambda call: call.members[0].number))

    def _joined(self, new: Waiting) -> list[tuple[Call, ...]]:
        """The calls as they are, with a new request in one of them."""
        found = []
        for place, call in enumerate(self._calls):
            same = new.kind is not None and call.members[0].kind == new.kind
            if same and call.images + new.images in self._policy.sizes:
                joined = self._call([*call.members, new])
                found.append((*self._calls[:place], joined, *self._calls[place + 1 :]))
        return found

    def _take(self, found: Sequence[tuple[Call, ...]], free: Sequence[float]) -> bool:
        """Take the best of these calls, if nobody is late in them who is not late in those that are planned."""
        already = late(self._calls, answered(self._calls, free, self._seconds))
        best = soonest(found, free, self._seconds, already)
        if best is not None:
            self._calls = best
            self._left &= {each.number for call in best for each in call.members}
        return best is not None

    def _too_late(self, new: Waiting, free: Sequence[float], now: float) -> Refused:
        own = self._call([new])
        end = answered([*self._calls, own], free, self._seconds)[new.number]
        assert new.due is not None  # without a deadline it can always be the last
        limit, sampling = new.due - now, own.seconds(self._seconds)
        wanted = f"The deadline is {limit:.2f} seconds from now, and the "
        if sampling > limit:
            return Refused(
                422,
                f"{wanted}sampling alone is predicted to take {sampling:.2f} seconds. Ask for fewer steps or images, "
                "or allow more time.",
                parameter="X-Deadline-Ms",
                code="deadline_cannot_be_met",
            )
        again = max(SOON, end - new.due)
        return Refused(
            429,
            f"{wanted}answer is predicted in {end - now:.2f} seconds, {sampling:.2f} of them for the sampling. Try "
            f"again in {again:.1f} seconds, or allow more time.",
            parameter="X-Deadline-Ms",
            code="deadline_cannot_be_met",
            retry_after=again,
        )
