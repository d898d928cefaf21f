"""The program of CHORDS (Han et al., ICCV 2025): cores that begin further and further along. Pure Python, no tensors.

Core 0 begins at step 0 and is the sequential sampler. Core k begins at `starts[k]`, where one jump from the start of
core k - 1 has brought it. The jump is made from the first network output of core k - 1, so core k begins one wave after
it. From there on a core takes one fine step, one row, a wave: it is at `starts[k] + wave - k`, and its sample is there
after `k + N - starts[k]` waves. The fastest core, the last one, is the first to arrive, and core 0 after N waves.

In the words of `program.Program` there is one block, and iteration j is the core that arrives as number j: 0 is the
fastest, the last one is core 0. A row (iteration, 0, step) is the row of that core at that step. None is coarse: what
jumps are made of its output is the core's business, and costs no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from ...errors import InvalidArgument
from ..program import Boundary, Program, Row, Wave, _require

# what the paper runs, for 50 steps; other numbers of steps have their starts at the same fractions
PAPER_STEPS = 50
PAPER_STARTS = {4: (0, 8, 16, 32), 6: (0, 3, 6, 12, 24, 36), 8: (0, 2, 4, 8, 16, 24, 32, 40)}


@dataclass(frozen=True)
class Cores(Program):
    """The waves of cores that begin at different steps.

    Attributes:
        starts: step at which each core begins, ascending from 0; the later it begins, the faster the core.
    """

    starts: tuple[int, ...]

    @property
    def num_cores(self) -> int:
        """K, the rows of the widest wave."""
        return len(self.starts)

    @property
    def exact_iteration(self) -> int:
        return self.num_iterations

    @cached_property
    def final_steps(self) -> tuple[int, ...]:
        """As of `Program`: the steps that core 0 has taken."""
        final, after = 0, []
        for wave in self.waves:
            final = max([final, *(row.position + 1 for row in wave.rows if self.core(row.iteration) == 0)])
            after.append(final)
        return tuple(after)

    def core(self, iteration: int) -> int:
        """The core that arrives as number `iteration`."""
        return self.num_cores - 1 - iteration

    def span(self, core: int) -> int:
        """Fine steps between two rectifications of a core, core >= 1: as many waves as the slower one lags behind."""
        return self.starts[core] - self.starts[core - 1]

    def begins(self, core: int) -> range:
        """Steps from which a core is rectified: it is `span` steps further when the slower core is evaluated there.

        Empty for core 0. The last one is the last from which the core does not reach the end before.
        """
        if core == 0:
            return range(0)
        span = self.span(core)
        return range(self.starts[core], self.num_steps - span + 1, span)


def chords(num_steps: int, starts: Sequence[int]) -> Cores:
    """CHORDS: `len(starts)` cores, N waves; those until the fastest core arrives are K - 1 + N - starts[-1].

    Args:
        num_steps: N >= 1.
        starts: step at which each core begins, ascending from 0, all below N; see `chord_starts`. (0,) is the
            sequential sampler.

    Raises:
        InvalidArgument: a number is out of its range.
    """
    _require(num_steps, "num_steps", 1)
    starts = tuple(starts)
    whole = all(isinstance(start, int) and not isinstance(start, bool) for start in starts)
    ascending = whole and all(before < after for before, after in pairwise(starts))
    if not ascending or starts[:1] != (0,) or starts[-1] >= num_steps:
        raise InvalidArgument(
            f"starts is {starts}. It must be steps of a grid of {num_steps}, ascending, the first of them 0. "
            "Pass such steps, or those of chord_starts."
        )
    return _chords(num_steps, starts)


@lru_cache(maxsize=64)
def _chords(num_steps: int, starts: tuple[int, ...]) -> Cores:
    iterations = range(len(starts))
    waves = []
    for number in range(num_steps):
        rows, arrived = [], []
        for iteration in iterations:
            core = len(starts) - 1 - iteration
            position = starts[core] + number - core
            if starts[core] <= position < num_steps:
                rows.append(Row(iteration, 0, position, position, coarse=False, fine=True))
            if position == num_steps - 1:
                arrived.append(Boundary(iteration, 1))
        waves.append(Wave(tuple(rows), tuple(arrived)))
    return Cores(num_steps, (0, num_steps), len(starts) - 1, tuple(waves), starts)


def chord_starts(num_steps: int, num_cores: int) -> tuple[int, ...]:
    """Where the cores begin, as the paper spaces them.

    For 4, 6 and 8 cores: the fractions of the grid that the paper runs. For other numbers the fastest core begins at
    the fraction (12 + K) / 25, the line through the paper's three (0.64, 0.72, 0.8), and at 4/5 from 8 cores on. From
    there the paper's theorem for three cores is applied again and again, down to 0: before a core that begins at t (of
    1) comes one at t / 2 or, if that is more, at 2 t - 1. The second is the earliest from which it is still in time to
    rectify the faster one; a fastest core to which no chain of K leads is put back until one does.

    Cores left over, also where starts fall together on a short grid, halve the widest gap, as the paper's 24 of
    (.., 16, 24, 32, ..) does. A core that begins one step after another is that one, and buys nothing: more than about
    N / 2 cores are wasted.

    Args:
        num_steps: N >= 1.
        num_cores: K, 1 to N.

    Raises:
        InvalidArgument: a number is out of its range.
    """
    _require(num_steps, "num_steps", 1)
    _require(num_cores, "num_cores", 1, num_steps)
    if num_cores in PAPER_STARTS:
        starts = {round(start * num_steps / PAPER_STEPS) for start in PAPER_STARTS[num_cores]}
    else:
        starts = _chain(num_steps, num_cores)
    if max(starts) < num_cores - 1:  # K cores need as many steps to begin at
        starts.add(num_cores - 1)
    while len(starts) < num_cores:
        starts.add(_middle_of_the_widest_gap(sorted(starts)))
    return tuple(sorted(starts))


def _chain(num_steps: int, num_cores: int) -> set[int]:
    """The theorem, from the fastest core down."""
    reachable = num_steps - -(-num_steps // 2 ** (num_cores - 1))
    start = min((12 + num_cores) * num_steps // 25, 4 * num_steps // 5, reachable)
    starts = {0}
    while start > 1 and len(starts) < num_cores:
        starts.add(start)
        start = max(-(-start // 2), 2 * start - num_steps)
    return starts


def _middle_of_the_widest_gap(starts: list[int]) -> int:
    width, before = max((after - before, before) for before, after in pairwise(starts))
    return before + width // 2
