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
    # least r at the earliest estimate, and r itself where one change has no ratio yet; 1: nothing is known then
    first: float = 1.0
    first_caution: float = 1.0  # there, caution is so many times as large
    fewest: int = 1  # changes before which no error is estimated
    ratios: int = 1  # how many ratios of successive changes count, at most; r follows from the largest
    caution: float = 2.0  # r is so many times that ratio: the next contraction may be weaker than the last
    smallest: float = 0.0  # least r, so that one lucky iteration does not end a run
    smallest_later: float = 0.0  # the same beyond `LATER` changes
    slowest: float = math.inf  # largest r
    least_share: float = 0.0  # a change counts as no less than this share of the one before: it may be small by chance

    @property
    def blind(self) -> int:
        """Iterations too early to estimate an error; only a sample that is bitwise stationary stops there."""
        return self.fewest - 1


# How often samples end beyond the tolerance with these, and on what they were chosen: section 5 of the notes in
# bench/results.
#
# Parareal iterations. Changes may alternate, so that a small one is followed by a larger one: two ratios count, and a
# tenth of the change before. After the first iteration the error may be three times its change.
BLOCKS = Contraction(first=0.75, ratios=2, smallest=0.5, least_share=0.1)
# Fixed-point methods begin with iterates that have little to do with the sample, and may rest before they move on: one
# ratio says nothing. They end in small movements that no longer shrink. At a loose tolerance, one of a thousand samples
# of a trained policy came to rest until the fifth sweep, far away, and moved on in the sixth.
SWEEPS = Contraction(first=0.3, fewest=6, ratios=3, smallest=0.3, slowest=0.9)
# Secant sweeps converge faster than by any r, so the larger of two ratios needs no caution. Before the fourth wave some
# points were never asked; at a loose tolerance, trained policies that turned late had come to rest in it.
# Once all points are asked in every wave, changes shrink by the same share for long.
SECANTS = Contraction(
    first=0.6, first_caution=1.5, fewest=4, ratios=2, caution=1.0, smallest=0.3, smallest_later=0.6, slowest=0.9
)
LATER = 8
# Secant sweeps visit points for the first time until the fourth wave: how much the changes before shrank says little.
FIRST_SLOWING = 3
# Where changes shrink less than in the wave before, the network is rough, and what was interpolated is worth less: the
# doubt counts the square of that factor, at most this one squared.
MOST_SLOWING = 20.0
# a change that grew this much over the first one will not come back before the exact prefix reaches it
DIVERGENCE_FACTOR = 1e3


def estimated_error(
    changes: Sequence[float], contraction: Contraction = BLOCKS, doubt: float = 0.0, ratio: float = 1.0
) -> float:
    """Mean absolute error left after these changes, oldest first; infinite while they shrink too little to say.

    doubt: expected error that no change shows; it counts more where changes shrink less than before. The two are
    independent, so their squares are added. ratio: what the next iteration says of r; 1 or more: nothing.
    """
    change = changes[-1]
    if change == 0.0:
        return doubt
    if len(changes) < contraction.fewest:
        return math.inf
    r = min(contraction.first, ratio)
    if len(changes) > 1:
        newest = changes[-1 - contraction.ratios :]
        observed = max(after / before if before else math.inf for before, after in pairwise(newest))
        smallest, caution = contraction.smallest, contraction.caution
        if len(changes) == contraction.fewest:
            smallest, caution = max(smallest, contraction.first), caution * contraction.first_caution
        elif len(changes) > LATER:
            smallest = max(smallest, contraction.smallest_later)
        r = min(contraction.slowest, max(smallest, caution * observed))
        change = max(change, contraction.least_share * changes[-2])
    if doubt:
        doubt *= _slowing(changes) ** 2
    return math.hypot(change * r / (1 - r), doubt) if r < 1 else math.inf


def _slowing(changes: Sequence[float]) -> float:
    """The largest factor between a ratio of successive changes and the ratio before, 1 to `MOST_SLOWING`."""
    most, first = 1.0, FIRST_SLOWING
    for before, between, after in zip(changes[first - 2 :], changes[first - 1 :], changes[first:], strict=False):
        most = max(most, after * before / between**2 if between else MOST_SLOWING)
    return min(most, MOST_SLOWING)


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
        ratio: Sequence[float] | None = None,
    ) -> tuple[int, ...]:
        """Positions (into `samples`) that must continue after iteration p >= 1; the arguments as in `Checkpoint`.

        Raises Diverged if a change is not finite, or a thousand times the first.
        """
        if not all(map(math.isfinite, change)):
            raise Diverged("a sample is not finite")
        self.change.append([None] * len(self.converged))
        doubt = [0.0] * len(samples) if doubt is None else doubt
        ratio = [1.0] * len(samples) if ratio is None else ratio
        for sample, moved, rests, *signs in zip(samples, change, stationary, doubt, ratio, strict=True):
            self.change[-1][sample] = moved
            self.iterations[sample] = iteration
            self.exact[sample] = exact or rests
            close = exact or rests or (not self.bitwise and self._is_close(sample, moved, *signs))
            self.converged[sample] = close or self.converged[sample]
        return tuple(position for position, sample in enumerate(samples) if not self.converged[sample])

    def _is_close(self, sample: int, moved: float, doubt: float, ratio: float) -> bool:
        if moved > DIVERGENCE_FACTOR * (self.change[0][sample] or math.inf):
            raise Diverged("the change of a sample has grown a thousandfold")
        changes = [seen for each in self.change if (seen := each[sample]) is not None]
        error = estimated_error(changes, self.contraction, doubt, ratio)
        # a run of constant latency goes on: changes that are rounding alone then say nothing
        self.errors[sample] = min(error, self.errors[sample]) if self.converged[sample] else error
        return error <= self.tolerance
