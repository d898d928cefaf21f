"""What calls are predicted to take: as the last ones like them, or by what is known of their costs."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable

from .batching import CallCosts, Warmed, batches

# calls like the next one that tell what it takes, and the share of them that took no longer
LAST, SHARE = 20, 0.9


class Predictions:
    """Seconds of calls by the kind of their requests, the way that they sample, and their number of images.

    Images that no call is prepared for are made by several calls.

    Args:
        warmed: what is known before the first request.
    """

    def __init__(self, warmed: Warmed) -> None:
        self._sizes, self._costs = warmed.sizes, dict[Hashable, CallCosts](warmed.costs)
        self._took: dict[tuple[Hashable, str, int], deque[float]] = defaultdict(lambda: deque(maxlen=LAST))

    def record(self, kind: Hashable, way: str, images: int, seconds: float) -> None:
        """A call has taken so long."""
        self._took[kind, way, images].append(seconds)

    def seconds(self, kind: Hashable, way: str, images: int) -> float:
        """What a call is predicted to take: what nine tenths of the last calls like it took at most.

        If there were none, by its costs; calls of a kind that is not known take no time.
        """
        if took := self._took.get((kind, way, images)):
            ordered = sorted(took)
            return ordered[min(len(ordered) - 1, int(SHARE * len(ordered)))]
        if kind not in self._costs:
            return 0.0
        return sum(self._costs[kind].seconds(way, part) for part in batches(images, self._sizes))
