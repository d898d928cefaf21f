"""What changes at boundaries say of the error of a sample.

An iteration that has begun says about the one before it whether the sample that this has just given is enough.

Pipelined, iteration 2 of SRDS has passed most blocks when iteration 1 gives its sample. At the boundaries that both
have passed, the ratios of their changes, |x_b^2 - x_b^1| / |x_b^1 - x_b^0|, are known. From the last of them follows by
how much the sample will still change, one iteration before it could be seen.

Only after iteration 1: later ones have seen their own ratios, which this has not improved on. The constants were
chosen on recorded runs, see section 5 of the notes in bench/results.

In each iteration, by how much the boundary before the last has changed: the last block is solved from there next. A
sample may change little by chance while that boundary still moves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from .convergence import Signs
from .program import Boundary, Program

# boundaries that count: three ratios, two factors between them
BOUNDARIES = 3
# the next change is so many times what the ratios say, and never a smaller share
CAUTION, SMALLEST = 1.6, 0.1
# Ratios that grow are expected to grow as fast until the last boundary, and this many blocks further: the network
# changes fast there.
BLOCKS_MORE = 3
# Changes of the last boundary that are more than so many times those of the known boundaries say little: the share
# counts the fourth power of the rest of that factor.
MOST_GROWTH, GROWTH_POWER = 3.0, 4
# A larger change, mean absolute, may have taken a sample to another mode of the data: nothing is said of it.
LARGEST = 0.04
ITERATION = 1


class Ahead(NamedTuple):
    """Where the changes are that tell about the next iteration: entries of `Buffers.change`.

    now, following: of this iteration and of the next one at the same boundaries, in order; last: of this sample.
    blocks: from the last of these boundaries to the end.
    """

    now: tuple[int, ...]
    following: tuple[int, ...]
    last: int
    blocks: int

    def ratio(self, changes: Sequence[float]) -> float:
        """The share of a sample's change that its next change is expected to be at most; 1 or more: nothing is known.

        changes: of the sample, by entry.
        """
        now, following = ([changes[entry] for entry in entries] for entries in (self.now, self.following))
        if changes[self.last] > LARGEST or not (
            min(*now, *following) > 0.0 and all(map(math.isfinite, (*now, *following)))
        ):
            return math.inf
        ratios = [after / before for before, after in zip(now, following, strict=True)]
        growth = max(1.0, *(after / before for before, after in pairwise(ratios)))
        rises = max(1.0, changes[self.last] / (MOST_GROWTH * max(now))) ** GROWTH_POWER
        try:
            found = CAUTION * max(ratios) * growth ** (self.blocks + BLOCKS_MORE) * rises
        except OverflowError:
            return math.inf
        return max(SMALLEST, found)


class Watched(NamedTuple):
    """Boundaries that iterations 1 and 2 have both passed when iteration 1 gives its sample, the last ones.

    first, last: of them; blocks: from the last one to the end.
    """

    first: int
    last: int
    blocks: int

    def includes(self, boundary: Boundary) -> bool:
        """Whether its change tells something."""
        return boundary.iteration in (ITERATION, ITERATION + 1) and self.first <= boundary.boundary <= self.last

    def ahead(self, changes: Mapping[Boundary, int], last: int) -> Ahead:
        """changes: entries of the changes that were measured; last: of the sample of iteration 1."""
        known = range(self.first, self.last + 1)
        now, following = (tuple(changes[Boundary(each, b)] for b in known) for each in (ITERATION, ITERATION + 1))
        return Ahead(now, following, last, self.blocks)


def watched(program: Program) -> Watched | None:
    """The boundaries of a program whose changes tell about the next iteration; None: too few are known in time."""
    passed, whole = 0, Boundary(ITERATION, program.num_blocks)
    for wave in program:
        passed = max([passed, *(each.boundary for each in wave.boundaries if each.iteration == ITERATION + 1)])
        if whole in wave.boundaries:
            break
    first = passed - BOUNDARIES + 1
    # iteration 2 begins with boundary 2
    if first <= ITERATION or passed == program.num_blocks:
        return None
    return Watched(first, passed, program.num_blocks - passed)


class Told(NamedTuple):
    """What the changes at boundaries say of a sample.

    last: entry of its own change in `Buffers.change`; boundary: of the boundary before it in the same iteration; None:
    this iteration has left it as it was. ahead: None: the next iteration says nothing.
    """

    last: int
    boundary: int | None
    ahead: Ahead | None

    def signs(self, changes: Sequence[float]) -> Signs:
        """changes: of the sample, by entry."""
        ratio = 1.0 if self.ahead is None else self.ahead.ratio(changes)
        boundary = 0.0 if self.boundary is None else changes[self.boundary]
        return Signs(changes[self.last], ratio=ratio, boundary=boundary)


class Tells:
    """The boundaries of a program whose changes tell of its samples."""

    def __init__(self, program: Program) -> None:
        self._last, self._watched = program.num_blocks, watched(program)

    def __contains__(self, boundary: Boundary) -> bool:
        before_the_last = boundary.iteration > 0 and boundary.boundary == self._last - 1
        return before_the_last or (self._watched is not None and self._watched.includes(boundary))

    def told(self, iteration: int, changes: Mapping[Boundary, int]) -> Told | None:
        """Of the sample of an iteration. changes: entries of those measured until the end of its wave."""
        last, before = (changes.get(Boundary(iteration, self._last - back)) for back in (0, 1))
        if last is None:
            return None
        ahead = self._watched.ahead(changes, last) if self._watched is not None and iteration == ITERATION else None
        return Told(last, before, ahead)
