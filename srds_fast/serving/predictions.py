"""What calls are predicted to take: as the last ones like them, or by what is known of their costs."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence

from .batching import CallCosts, batches

# calls like the next one that tell what it takes, and the share of them that took no longer
LAST, SHARE = 20, 0.9
# shapes that are remembered: clients choose some of what makes a shape
MOST_SHAPES = 256

_Key = tuple[Hashable, str, int]


class Predictions:
    """Seconds of calls by their shape, the way that they sample, and their number of images.

    Args:
        sizes: numbers of images that calls are prepared for, ascending from 1. Others are made by several such calls.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._costs: dict[Hashable, CallCosts] = {}
        self._took: OrderedDict[_Key, deque[float]] = OrderedDict()

    def know(self, shape: Hashable, costs: CallCosts) -> None:
        """What calls of a shape cost, as measured before the first request."""
        self._costs[shape] = costs

    def record(self, shape: Hashable, way: str, images: int, seconds: float) -> None:
        """A call has taken so long."""
        key = shape, way, images
        self._took.setdefault(key, deque(maxlen=LAST)).append(seconds)
        self._took.move_to_end(key)
        if len(self._took) > MOST_SHAPES:
            self._took.popitem(last=False)

    def seconds(self, shape: Hashable, way: str, images: int) -> float:
        """What a call is predicted to take: what nine tenths of the last calls like it took at most.

        If there were none, by its costs. Calls of an unknown shape cost as much as those of the slowest that is known;
        0 if none is.
        """
        took = self._took.get((shape, way, images))
        if took is not None:
            ordered = sorted(took)
            return ordered[min(len(ordered) - 1, int(SHARE * len(ordered)))]
        known = self._costs.get(shape)
        costs = self._costs.values() if known is None else (known,)
        parts = batches(images, self._sizes)
        return max((sum(each.seconds(way, part) for part in parts) for each in costs), default=0.0)
