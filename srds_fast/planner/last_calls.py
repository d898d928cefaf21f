"""The last calls of a chosen plan: whether they give reason to doubt that it is faster than the loops."""

from __future__ import annotations

import statistics
from collections import deque

from ..words import counted

# a plan is in doubt if SLOW of its last LAST calls, and these calls in total, took longer than the sequential loop.
# SLOW calls alone are no loss: where one input in eight takes twice the iterations, the plan still saves time over all
LAST, SLOW = 5, 2
# or if so many, those that timed it included, took longer in total than the loop that it was to beat
TOTAL = 20


class LastCalls:
    """What the last calls of a plan took, and their work: what their iterations cost, over what was predicted."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=TOTAL)
        self._work: deque[float] = deque(maxlen=TOTAL)

    def add(self, seconds: float, work: float) -> None:
        """Of one more call."""
        self._seconds.append(seconds)
        self._work.append(work)

    def forget_seconds(self) -> None:
        """They were judged; the work of an input stays what it was."""
        self._seconds.clear()

    def forget(self) -> None:
        """Another plan is chosen."""
        self._seconds.clear()
        self._work.clear()

    def slower(self, sequential: float, base: float) -> str | None:
        """In what they were slower than the sequential loop, or than the loop to beat; None if they were not."""
        last, newest = list(self._seconds), list(self._seconds)[-LAST:]
        if sum(each > sequential for each in newest) >= SLOW and sum(newest) > len(newest) * sequential:
            return (
                f"{SLOW} of its last {counted(len(newest), 'call')}, and these calls in total, took longer than the "
                "sequential loop"
            )
        if len(last) >= LAST and sum(last) > len(last) * base:
            share = sum(last) / (len(last) * base)
            return f"its last {counted(len(last), 'call')} took {share:.2f} times as long as its baseline in total"
        return None

    def expected(self, seconds: float, work: float) -> float:
        """Seconds of a call with the mean work of the last ones, where one of this work takes so many."""
        return seconds / work * statistics.mean(self._work)
