"""When to stop: one sample at a time, by an estimate of its error. Plain floats on the host.

What can be seen is the change |x^p - x^(p-1)| of the final point, or, if all points are refined at once, of the one
that moved most. If it shrinks by a factor r an iteration, the changes still to come sum to change * r / (1 - r). That
is the error after iteration p, known one iteration before a test on the change itself would accept it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Contraction(NamedTuple):
    first: float  # r before enough changes have been seen; 1: nothing is known then
    fewest: int = 1  # changes before which no error is estimated
    ratios: int = 1  # how many ratios of successive changes count; r follows from the largest
    caution: float = 2.0  # r is so many times that ratio: the next contraction may be weaker than the last
    smallest: float = 0.0  # least r, so that one lucky iteration does not end a run
    slowest: float = math.inf  # largest r

    @property
    def blind(self) -> int:
        """Iterations too early to estimate an error; only a sample that is bitwise stationary stops there."""
        return max(self.fewest - 1, self.ratios if self.first >= 1 else 0)


# Parareal iterations. After the first the error may be as large as its change; later the contraction may be weaker than
# the one before. With 0.15 in the place of `first`, and 0.1 in that of `smallest`, one of five samples of a mixture of
# narrow Gaussians ended beyond a tolerance of 4e-2, up to twelve times; with these, one of 256.
BLOCKS = Contraction(first=0.5, smallest=0.3)
# Fixed-point methods begin with iterates that have little to do with the sample, and may rest before they move on: one
# ratio says nothing. They end in small movements that no longer shrink, because successive waves have other nodes. At
# half a grey level: digits (25 to 100 steps, guidance 1 and 5) 0 of 264 samples beyond the tolerance; a mixture of five
# sharp Gaussians in 64 dimensions 0 of 288 with all points, 5 of 288 with 24 nodes.
SWEEPS = Contraction(first=1.0, ratios=2, smallest=0.2, slowest=0.9)
# Secant sweeps converge faster than by any r, so the larger of two ratios needs no caution. Before the fourth wave some
# points were never asked: while the third could end a run, 149 of 4096 samples of mixtures of narrow Gaussians ended
# beyond a tolerance of 4e-2. How late stops come, and how many samples miss: section 5 of the notes in bench/results.
SECANTS = Contraction(first=1.0, fewest=4, ratios=2, caution=1.0, slowest=0.9)
# a change that grew this much over the first one will not come back before the exact prefix reaches it
DIVERGENCE_FACTOR = 1e3


def estimated_error(changes: Sequence[float], contraction: Contraction = BLOCKS, doubt: float = 0.0) -> float:
    """Mean absolute error left after these changes, oldest first; infinite while they shrink too little to say.

    doubt: expected error that no change shows. The two are independent, so their squares are added.
    """
    change = changes[-1]
    if change == 0.0:
        return doubt
    if len(changes) < contraction.fewest:
        return math.inf
    r = contraction.first
    if len(changes) > contraction.ratios:
        newest = changes[-1 - contraction.ratios :]
        observed = max(after / before if before else math.inf for before, after in pairwise(newest))
        r = min(contraction.slowest, max(contraction.smallest, contraction.caution * observed))
    return math.hypot(change * r / (1 - r), doubt) if r < 1 else math.inf


class Diverged(Exception):
    """A sample is not finite, or moves away. The message says which."""


class Monitor:
    """Decides which samples continue; bitwise: all in which a boundary moved by a bit, whatever the estimates."""

    def __init__(self, num_samples: int, tolerance: float, bitwise: bool, contraction: Contraction = BLOCKS) -> None:
        self.contraction, self.tolerance, self.bitwise = contraction, tolerance, bitwise
        self.change: list[list[float | None]] = []
        self.converged = [False] * num_samples
        self.exact = [False] * num_samples  # by construction, or because nothing moved by a bit
        self.errors = [math.inf] * num_samples  # estimated after the last iteration; infinite: not known
        self.iterations = [0] * num_samples

    def judge(
        self,
        iteration: int,
        samples: Sequence[int],
        change: Sequence[float],
        exact: bool,
        stationary: Sequence[bool],
        doubt: Sequence[float] | None = None,
    ) -> tuple[int, ...]:
        """Positions (into `samples`) that must continue after iteration p >= 1; the arguments as in `Checkpoint`.

        Raises Diverged if a change is not finite, or a thousand times the first.
        """
        if not all(map(math.isfinite, change)):
            raise Diverged("a sample is not finite")
        self.change.append([None] * len(self.converged))
        doubt = [0.0] * len(samples) if doubt is None else doubt
        for sample, moved, rests, doubted in zip(samples, change, stationary, doubt, strict=True):
            self.change[-1][sample] = moved
            self.iterations[sample] = iteration
            self.exact[sample] = exact or rests
            close = exact or rests or (not self.bitwise and self._is_close(sample, moved, doubted))
            self.converged[sample] = close or self.converged[sample]
        return tuple(position for position, sample in enumerate(samples) if not self.converged[sample])

    def _is_close(self, sample: int, moved: float, doubt: float) -> bool:
        if moved > DIVERGENCE_FACTOR * (self.change[0][sample] or math.inf):
            raise Diverged("the change of a sample has grown a thousandfold")
        changes = [seen for each in self.change if (seen := each[sample]) is not None]
        error = estimated_error(changes, self.contraction, doubt)
        # a run of constant latency goes on: changes that are rounding alone then say nothing
        self.errors[sample] = min(error, self.errors[sample]) if self.converged[sample] else error
        return error <= self.tolerance
