"""The stop after the first iteration, learnt from earlier calls: no reference is needed for it.

After one iteration there is one change, c_1, and no ratio of two. The error then left is about c_2, the change that a
second iteration would make. Of earlier samples of the same kind of call c_2 / c_1 is known. A sample stops after the
first iteration where q * c_1 is within the tolerance, with q their conformal quantile: of samples drawn like these, at
least the share `COVERED` is expected to have c_2 <= q * c_1 (Vovk et al., Algorithmic Learning in a Random World).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..solvers.convergence import Contraction

COVERED = 0.95
# fewer samples have no such quantile
FEWEST = 19
# the newest ones count, so that the quantile follows what calls are like
MOST_KEPT = 200
# one call of so many always takes a second iteration: ratios of samples that never stop early would be of odd ones
REFRESHED_EVERY = 20
ROUNDING = 1e-9


class FirstStop:
    """What calls of one kind have shown. May be used from several threads."""

    def __init__(self) -> None:
        self._ratios: tuple[float, ...] = ()
        self._calls = 0

    @property
    def quantile(self) -> float | None:
        """q; None: too few samples."""
        if len(self._ratios) < FEWEST:
            return None
        return sorted(self._ratios)[math.ceil(COVERED * (len(self._ratios) + 1) - ROUNDING) - 1]

    def next_call(self, contraction: Contraction) -> tuple[Contraction, str]:
        """How the next call estimates its errors, and how that is told in its report. contraction: of the method."""
        self._calls += 1
        seen, quantile = len(self._ratios), self.quantile
        if quantile is None:
            rule = f"by the estimated error; {seen} of {FEWEST} samples that learn_stop needs were seen"
            return contraction, rule
        if self._calls % REFRESHED_EVERY == 0:
            rule = "by the estimated error, but not after iteration 1: this call measures what comes after it"
            return contraction._replace(fewest=2, first=0.0), rule
        # the estimate is c_1 r / (1 - r)
        learnt = contraction._replace(first=quantile / (1 + quantile))
        bound = f"a bound that holds for {COVERED:.0%} of {seen} earlier samples"
        return learnt, f"by the estimated error; after iteration 1 by {bound}"

    def record(self, change: Sequence[Sequence[float | None]]) -> None:
        """Learn from a run. change: see `Report.change`."""
        if len(change) >= 2:
            pairs = zip(*change[:2], strict=True)
            found = [second / first for first, second in pairs if first and second is not None]
            self._ratios = (*self._ratios, *found)[-MOST_KEPT:]
