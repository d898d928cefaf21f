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

# No tolerance is looser than this one in windows that slide, nor where steps add noise. Where a trained policy turns
# late, an error of an early state grows a thousand times, in a direction in which nothing has moved.
LOOSEST = 1e-2
TIMES_WITH_NOISE = 2.0


class Contraction(NamedTuple):
    # least r at the earliest estimate, and r itself where one change has no ratio yet; 1: nothing is known then
    first: float = 1.0
    first_caution: float = 1.0  # there, caution is so many times as large
    fewest: int = 1  # changes before which no error is estimated
    # How many ratios of successive changes count, at most. r follows from the largest; averaged: from the newest, or
    # from their geometric mean where that is larger.
    ratios: int = 1
    averaged: bool = False
    caution: float = 2.0  # r is so many times that ratio: the next contraction may be weaker than the last
    smallest: float = 0.0  # least r, so that one lucky iteration does not end a run
    smallest_later: float = 0.0  # the same beyond `LATER` changes
    slowest: float = math.inf  # largest r
    # a change counts as no less than this share of the one before, and this of that of the boundary before the last, in
    # the same iteration: it may be small by chance
    least_share: float = 0.0
    least_of_boundary: float = 0.0
    times: float = 1.0  # an estimate counts so many times
    loosest: float = math.inf  # a larger tolerance is taken for this one

    @property
    def blind(self) -> int:
        """Iterations too early to estimate an error; only a sample that is bitwise stationary stops there."""
        return self.fewest - 1

    def where_noise_is_added(self) -> Contraction:
        """The same where steps add noise: there a sample may rest, and turn to another mode in a later iteration."""
        return self._replace(times=TIMES_WITH_NOISE, loosest=LOOSEST)


# How often samples end beyond the tolerance with these, and on what they were chosen: section 5 of the notes in
# bench/results.
#
# Parareal iterations. Changes may alternate, so that a small one is followed by a larger one: two ratios count, and a
# twentieth of the change before. What the boundary before the last has changed by, the next iteration solves from.
# After the first iteration the error may be three times its change.
BLOCKS = Contraction(first=0.75, ratios=2, smallest=0.5, least_share=0.05, least_of_boundary=0.6)
# Fixed-point methods begin with iterates that have little to do with the sample, and may rest before they move on: one
# ratio says nothing. They end in small movements that no longer shrink. At a loose tolerance, one of a thousand samples
# of a trained policy came to rest until the fifth sweep, far away, and moved on in the sixth.
SWEEPS = Contraction(first=0.3, fewest=6, ratios=3, smallest=0.3, slowest=0.9)
# Secant sweeps converge faster than by any r, so two ratios need no caution, and the older one counts half. Before the
# fourth wave some points were never asked; at a loose tolerance, trained policies that turned late had come to rest in
# it. Once all points are asked in every wave, changes shrink by the same share for long.
SECANTS = Contraction(
    first=0.6,
    first_caution=1.5,
    fewest=4,
    ratios=2,
    averaged=True,
    caution=1.0,
    smallest=0.3,
    smallest_later=0.6,
    slowest=0.9,
)
LATER = 8
# Secant sweeps visit points for the first time until the fourth wave: how much the changes before shrank says little.
FIRST_SLOWING = 3
# Where changes shrink less than in the wave before, the network is rough, and what was interpolated is worth less: the
# doubt counts the square of that factor, at most this one squared.
MOST_SLOWING = 20.0
# a change that grew this much over the first one will not come back before the exact prefix reaches it
DIVERGENCE_FACTOR = 1e3


class Signs(NamedTuple):
    """What an iteration shows of the error of a sample.

    Attributes:
        change: see `Checkpoint`.
        doubt: expected error that no change shows.
        ratio: what the next iteration says of r; 1 or more: nothing.
        boundary: the change of the boundary before the last, in the same iteration; 0: it is not known.
    """

    change: float
    doubt: float = 0.0
    ratio: float = 1.0
    boundary: float = 0.0


def estimated_error(
    changes: Sequence[float],
    contraction: Contraction = BLOCKS,
    doubt: float = 0.0,
    ratio: float = 1.0,
    boundary: float = 0.0,
) -> float:
    """Mean absolute error left after these changes, oldest first; infinite while they shrink too little to say.

    The others as in `Signs`, of the newest iteration. A doubt counts more where changes shrink less than before; it, or
    what the changes say, whichever is larger.
    """
    change = changes[-1]
    if change == 0.0:
        return contraction.times * doubt
    if len(changes) < contraction.fewest:
        return math.inf
    r = min(contraction.first, ratio)
    if len(changes) > 1:
        ratios = [after / before if before else math.inf for before, after in pairwise(changes)][-contraction.ratios :]
        if contraction.averaged:
            ratios = [ratios[-1], math.prod(ratios) ** (1 / len(ratios))]
        observed = max(ratios)
        smallest, caution = contraction.smallest, contraction.caution
        if len(changes) == contraction.fewest:
            smallest, caution = max(smallest, contraction.first), caution * contraction.first_caution
        elif len(changes) > LATER:
            smallest = max(smallest, contraction.smallest_later)
        r = min(contraction.slowest, max(smallest, caution * observed))
        change = max(change, contraction.least_share * changes[-2])
    change = max(change, contraction.least_of_boundary * boundary)
    if doubt:
        doubt *= _slowing(changes) ** 2
    return contraction.times * max(change * r / (1 - r), doubt) if r < 1 else math.inf


def _slowing(changes: Sequence[float]) -> float:
    """The largest factor between a ratio of successive changes and the ratio before, 1 to `MOST_SLOWING`."""
    most, first = 1.0, FIRST_SLOWING
    for before, between, after in zip(changes[first - 2 :], changes[first - 1 :], changes[first:], strict=False):
        most = max(most, after * before / between**2 if between else MOST_SLOWING)
    return min(most, MOST_SLOWING)


class Diverged(Exception):
    """A sample moves away instead of settling, or is not finite. The message says which."""


class NotFinite(Diverged):
    """A sample is NaN or Inf."""

    def __init__(self, what: str = "a sample is not finite") -> None:
        super().__init__(what)


class Monitor:
    """Decides which samples continue; bitwise: all in which a boundary moved by a bit, whatever the estimates."""

    def __init__(self, num_samples: int, tolerance: float, bitwise: bool, contraction: Contraction = BLOCKS) -> None:
        self.contraction, self.tolerance, self.bitwise = contraction, min(tolerance, contraction.loosest), bitwise
        self.change: list[list[float | None]] = []
        self.converged = [False] * num_samples
        self.exact = [False] * num_samples  # by construction, or because nothing moved by a bit
        self.errors = [math.inf] * num_samples  # estimated after the last iteration; infinite: not known
        self.iterations = [0] * num_samples

    def judge(
        self,
        iteration: int,
        samples: Sequence[int],
        signs: Sequence[Signs],
        exact: bool,
        stationary: Sequence[bool],
    ) -> tuple[int, ...]:
        """Positions (into `samples`) that must continue after iteration p >= 1; the others as in `Checkpoint`.

        Raises NotFinite if a change is not finite, Diverged if it is a thousand times the first.
        """
        if not all(math.isfinite(each.change) for each in signs):
            raise NotFinite
        self.change.append([None] * len(self.converged))
        for sample, shown, rests in zip(samples, signs, stationary, strict=True):
            self.change[-1][sample] = shown.change
            self.iterations[sample] = iteration
            self.exact[sample] = exact or rests
            close = exact or rests or (not self.bitwise and self._is_close(sample, shown))
            self.converged[sample] = close or self.converged[sample]
        return tuple(position for position, sample in enumerate(samples) if not self.converged[sample])

    def _is_close(self, sample: int, signs: Signs) -> bool:
        moved, *others = signs
        if moved > DIVERGENCE_FACTOR * (self.change[0][sample] or math.inf):
            raise Diverged("the change of a sample has grown a thousandfold")
        changes = [seen for each in self.change if (seen := each[sample]) is not None]
        error = estimated_error(changes, self.contraction, *others)
        # a run of constant latency goes on: changes that are rounding alone then say nothing
        self.errors[sample] = min(error, self.errors[sample]) if self.converged[sample] else error
        return error <= self.tolerance
