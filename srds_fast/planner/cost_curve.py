"""c(rows): what a batched network call costs, and what a program costs by it. Pure Python."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..errors import InvalidArgument


@dataclass(frozen=True)
class CostCurve:
    """Seconds of one network call by its number of rows, as measured; never less for more rows."""

    rows: tuple[int, ...]  # widths that were measured, ascending
    seconds: tuple[float, ...]  # of a call of each, the batch and guidance branches included
    how: str = "eager"  # or "replayed", from a graph
    nbytes: tuple[int, ...] | None = None  # peak device memory of a call of each; None where that cannot be measured
    most_rows: int | None = None  # widest call there is memory for; None: no limit was met
    ranks: int = 1  # that share each call; rows, seconds, bytes and most_rows are then of calls that all make together
    replicated: CostCurve | None = None  # of the same calls if each rank makes them by itself; None: not measured

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in pairwise((0, *self.rows)))
        finite = all(0 <= each < math.inf for each in self.seconds)
        if not self.rows or len(self.rows) != len(self.seconds) or not ascending or not finite:
            raise InvalidArgument(
                f"A cost curve was made of rows {self.rows} and seconds {self.seconds}. It takes ascending numbers of "
                "rows and as many finite times. Measure them anew."
            )
        object.__setattr__(self, "seconds", tuple(accumulate(self.seconds, max)))

    def __call__(self, rows: int) -> float:
        """Seconds of a call of so many rows: linear between measured widths, beyond at least in proportion."""
        return _interpolated(self.rows, self.seconds, rows)

    def memory(self, rows: int) -> int | None:
        """Bytes that a call of so many rows takes."""
        return None if self.nbytes is None else int(_interpolated(self.rows, self.nbytes, rows))

    def shared(self, ranks: int, units: int, gather: Callable[[int], float], most: int) -> CostCurve:
        """The curve of calls that so many ranks share, at 1 to `most` rows; self is of one rank's calls, by units.

        A unit is one entry of the network's batch. The rank with most of them evaluates ceil(units / ranks).
        units: of a row, its guidance branches times samples. gather: units -> seconds of bringing all outputs together.
        """
        rows = range(1, most + 1)
        busiest = [-(-each * units // ranks) for each in rows]
        seconds = (self(own) + gather(each * units) for each, own in zip(rows, busiest, strict=True))
        nbytes = None if self.nbytes is None else tuple(self.memory(own) or 0 for own in busiest)
        widest = None if self.most_rows is None else max(1, self.most_rows * ranks // units)
        return CostCurve(tuple(rows), tuple(seconds), self.how, nbytes, widest, ranks)


def _interpolated(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
    if x <= xs[0]:
        return float(ys[0])
    if len(xs) == 1:  # how it grows is not known: assume in proportion to the rows
        return ys[0] * x / xs[0]
    if x > xs[-1]:  # a curve that was flat so far may rise there: in proportion at least
        steepest = max((ys[-1] - ys[-2]) / (xs[-1] - xs[-2]), ys[-1] / xs[-1])
        return ys[-1] + steepest * (x - xs[-1])
    after = bisect.bisect_left(xs, x)
    x0, x1, y0, y1 = xs[after - 1], xs[after], ys[after - 1], ys[after]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
