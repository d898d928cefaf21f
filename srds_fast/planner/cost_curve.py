"""c(rows): what a batched network call costs, and what a program costs by it. Pure Python."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..errors import InvalidArgument


@dataclass(frozen=True)
class CostCurve:
    """Seconds of one network call by its number of rows, as measured; never less for more rows.

    Attributes:
        rows: widths that were measured, ascending.
        seconds: of a call of each, the batch and guidance branches included.
        how: "eager": as Python makes the call, or "replayed" from a graph.
        nbytes: memory of the device that a call of each took at its height; None where that cannot be asked.
        most_rows: widest call there is memory for; None: no limit was met.
        num_devices: that share the rows of a call.
        gather: seconds to bring their outputs together.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    how: str = "eager"
    nbytes: tuple[int, ...] | None = None
    most_rows: int | None = None
    num_devices: int = 1
    gather: float = 0.0

    def __post_init__(self) -> None:
        ascending = all(0 < a < b for a, b in zip((0.5, *self.rows), self.rows, strict=False))
        finite = all(math.isfinite(each) and each >= 0 for each in (*self.seconds, self.gather))
        if not self.rows or len(self.rows) != len(self.seconds) or not ascending or not finite or self.num_devices < 1:
            raise InvalidArgument(
                f"A cost curve was made of rows {self.rows} and seconds {self.seconds}. It takes ascending numbers of "
                "rows and as many finite times. Measure them anew."
            )
        object.__setattr__(self, "seconds", tuple(accumulate(self.seconds, max)))

    def __call__(self, rows: int) -> float:
        """Seconds of a call of so many rows: linear between measured widths, beyond at least in proportion."""
        if self.num_devices > 1:
            return self._on_one(math.ceil(rows / self.num_devices)) + self.gather
        return self._on_one(rows)

    def memory(self, rows: int) -> int | None:
        """Bytes that a call of so many rows takes on each device."""
        if self.nbytes is None:
            return None
        return int(_interpolated(self.rows, self.nbytes, math.ceil(rows / self.num_devices)))

    def of(self, widths: Iterable[int]) -> float:
        """Seconds of one call after another."""
        return sum(map(self, widths))

    def shared(self, num_devices: int, gather: float) -> CostCurve:
        """The same calls with their rows shared by several devices."""
        return CostCurve(
            self.rows, self.seconds, self.how, self.nbytes, self.most_rows, num_devices=num_devices, gather=gather
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dict(vars(self))

    def _on_one(self, rows: int) -> float:
        return _interpolated(self.rows, self.seconds, rows)


def _interpolated(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
    if x <= xs[0]:
        return float(ys[0])
    if len(xs) == 1:  # nothing is known of how it grows: with its rows
        return ys[0] * x / xs[0]
    if x > xs[-1]:  # a curve that was flat so far may rise there: in proportion at least
        steepest = max((ys[-1] - ys[-2]) / (xs[-1] - xs[-2]), ys[-1] / xs[-1])
        return ys[-1] + steepest * (x - xs[-1])
    after = bisect.bisect_left(xs, x)
    x0, x1, y0, y1 = xs[after - 1], xs[after], ys[after - 1], ys[after]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
