"""When to stop: one sample at a time, by an estimate of its error. Plain floats on the host.

What can be seen is the change |x^p - x^(p-1)| of the final point. If it shrinks by a factor r an iteration, the changes
still to come sum to change * r / (1 - r): that is the error after iteration p, known one iteration earlier than a test
on the change itself would accept it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# r before two changes have been seen. On the digits pipeline with default plans the largest error after iteration 1 was
# 0.168 times the change (120 samples; 25, 50, 100 steps; guidance 3 and 7.5): r / (1 - r) = 0.176 is above it.
FIRST_CONTRACTION = 0.15
# the same where fine steps add noise or look back at the step before: nothing is calibrated there, and on Gaussian
# mixtures the error after iteration 1 came up to the change itself
FIRST_CONTRACTION_UNCALIBRATED = 0.5
# fixed-point methods begin with iterates that have little to do with the sample: one change says nothing
NO_CONTRACTION_YET = 1.0
# and end in small movements, where the nodes of one wave say something else than those of the one before: an error of
# the size of the movement, that no longer shrinks
SLOWEST_CONTRACTION_OF_SWEEPS = 0.8
# the next contraction may be weaker than the last: there, up to 6 times; this and the least r keep a lucky iteration
# from promising a miracle, and cost little, as a whole iteration is worth a factor of 10
CAUTION = 2.0
SMALLEST_CONTRACTION = 0.1
# a change that grew this much over the first one will not come back before the exact prefix reaches it
DIVERGENCE_FACTOR = 1e3


def estimated_error(
    change: float,
    change_before: float | None,
    first_contraction: float = FIRST_CONTRACTION,
    slowest_contraction: float = math.inf,
) -> float:
    """Mean absolute error left after an iteration, from its change and the one before (None: it was the first).

    Infinite while the change shrinks too little to say.
    """
    if change == 0.0:
        return 0.0
    contraction = first_contraction
    if change_before is not None:
        observed = change / change_before if change_before else math.inf
        contraction = min(slowest_contraction, max(SMALLEST_CONTRACTION, CAUTION * observed))
    return change * contraction / (1 - contraction) if contraction < 1 else math.inf


class Diverged(Exception):
    """A sample is not finite, or moves away. The message says which."""


class Monitor:
    """Remembers the change of every sample and decides which samples go on.

    Args:
        num_samples: samples in the batch.
        tolerance: bound of the estimated error.
        bits_only: ignore estimates; stop a sample only when no boundary moved by a bit, or at the exact iteration.
        first_contraction: taken for r before two changes have been seen.
        slowest_contraction: the most that r is taken for.
    """

    def __init__(
        self,
        num_samples: int,
        tolerance: float,
        bits_only: bool,
        first_contraction: float = FIRST_CONTRACTION,
        slowest_contraction: float = math.inf,
    ) -> None:
        self.first_contraction = first_contraction
        self.slowest_contraction = slowest_contraction
        self.tolerance = tolerance
        self.bits_only = bits_only
        self.change: list[list[float | None]] = []
        self.converged = [False] * num_samples
        self.iterations = [0] * num_samples

    def judge(
        self, iteration: int, samples: Sequence[int], change: Sequence[float], exact: bool, still: Sequence[bool]
    ) -> tuple[int, ...]:
        """Positions (into `samples`) that must go on after this iteration.

        Args:
            iteration: p >= 1.
            samples: which samples of the batch ran in it.
            change: of each of them, mean |x^p - x^(p-1)| of the final point.
            exact: the iteration is the sequential answer by construction.
            still: of each of them, no boundary moved by a bit.

        Raises:
            Diverged: a change is not finite, or a thousand times the first.
        """
        if not all(map(math.isfinite, change)):
            raise Diverged("a sample is not finite")
        before = self.change[-1] if self.change else [None] * len(self.converged)
        self.change.append([None] * len(self.converged))
        running = []
        for position, (sample, moved) in enumerate(zip(samples, change, strict=True)):
            self.change[-1][sample] = moved
            self.iterations[sample] = iteration
            if exact or still[position]:
                done = True
            elif self.bits_only:
                done = False
            else:
                if moved > DIVERGENCE_FACTOR * (self.change[0][sample] or math.inf):
                    raise Diverged("the change of a sample has grown a thousandfold")
                done = (
                    estimated_error(moved, before[sample], self.first_contraction, self.slowest_contraction)
                    <= self.tolerance
                )
            self.converged[sample] = done
            if not done:
                running.append(position)
        return tuple(running)
