"""Audits: runs that were compared with their sequential samples tell when runs of their kind may stop.

A run stops where its estimated error is within `factor` times the tolerance. Without audits the factor is 1. With them
it follows from what this network showed, by conformal risk control (Angelopoulos et al., ICLR 2024): the largest factor
at which at most a share MISSES of new samples, drawn like the audited ones, is expected to end beyond the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSES = 0.05
# fewer samples cannot promise that share
ROUNDING = 1e-9
FEWEST = math.ceil(1 / MISSES - ROUNDING) - 1
MOST_KEPT = 400
# no factor is larger: where no audited sample ends beyond the tolerance, nothing bounds it
LARGEST = 20.0


class Audit:
    """What the audits of one kind of call have shown. May be used from several threads."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        # of each sample, the smallest factor by which it would have ended beyond the tolerance
        self._missed_from: tuple[float, ...] = ()

    @property
    def num_samples(self) -> int:
        return len(self._missed_from)

    def record(self, errors: Sequence[tuple[float, float]]) -> None:
        """Learn from one sample: its estimated and its real error after each iteration."""
        missed, least = math.inf, math.inf
        for estimated, real in errors:
            # a run stops here by factors from estimated / tolerance up to that of the least estimate before
            if estimated < least and real > self._tolerance:
                missed = min(missed, estimated / self._tolerance)
            least = min(least, estimated)
        self._missed_from = (*self._missed_from, missed)[-MOST_KEPT:]

    @property
    def factor(self) -> float:
        """By which estimated errors are compared with the tolerance; 1 until enough samples were audited."""
        samples = sorted(self._missed_from)
        if len(samples) < FEWEST:
            return 1.0
        allowed = math.floor(MISSES * (len(samples) + 1) + ROUNDING) - 1  # samples that may end beyond the tolerance
        return min(LARGEST, math.nextafter(samples[allowed], 0.0))

    @property
    def rule(self) -> str:
        """How runs stop, for the report."""
        if self.num_samples < FEWEST:
            return (
                f"by the estimated error; {self.num_samples} of {FEWEST} samples that another rule needs were audited"
            )
        return (
            f"{self.factor:.2g} times the tolerance bounds the estimated error: at most {MISSES:.0%} of samples "
            f"like the {self.num_samples} audited ones are expected to end beyond the tolerance"
        )
