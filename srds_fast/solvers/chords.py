"""CHORDS (Han et al., ICCV 2025): cores that begin further and further along, the slower ones rectify the faster.

Core 0 begins at step 0 and is the sequential sampler. Core k begins at `starts[k]`, where one jump from the start of
core k - 1 has brought it. That jump takes the first network output of core k - 1, so core k begins one wave after it.
From there on a core takes one fine step, one row, a wave. The fastest core, the last one, arrives first, core 0 after N
waves. When the slower core is evaluated where the faster one began its span, the faster one has just come to the end of
it:

    x_fast <- F(x_begin) + ( G(x_slow) - G(x_begin) )

F are the fine steps of the span, G one jump across it. It is the Parareal correction, but made from network outputs
that both cores take anyway: no row is spent on it. The bracket is computed first, so it is bitwise zero if the two
cores agree. The next span of the faster core begins at the value so rectified, as in the authors' code: the slower core
comes there when that span has ended.

In the words of `program.Program` there is one block, and iteration j is the core that arrives as number j: 0 is the
fastest, the last one is core 0. No row is coarse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Self

from torch import Tensor

from ..caches import cached
from ..errors import InvalidArgument, shown
from ..schedulers.table import NoiseTable
from ..words import counted
from .checks import check_whole
from .compiled import CompiledProgram, Form
from .compiler import Compiler
from .contract import NO_INPUTS, Core, SolverInputs
from .method import Method, Target
from .program import Boundary, Program, Row, Wave
from .waves import run

# what the paper runs, for 50 steps; other numbers of steps have their starts at the same fractions
PAPER_STEPS = 50
PAPER_STARTS = {4: (0, 8, 16, 32), 6: (0, 3, 6, 12, 24, 36), 8: (0, 2, 4, 8, 16, 24, 32, 40)}
# numbers of cores that the planner compares
PLANNED = (4, 8)


@dataclass(frozen=True)
class Chords(Method):
    """CHORDS (Han et al., ICCV 2025): cores that start further and further along, the slower rectify the faster.

    Attributes:
        num_cores: rows of a wave, at most. 1 is the sequential sampler.
        starts: steps at which the cores begin, ascending from 0; None: as the paper spaces them.
    """

    name: ClassVar[str] = "chords"
    about: ClassVar[str] = "four cores, each of which begins later than the one before"
    num_cores: int = 4
    starts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_whole("num_cores", self.num_cores, 1)
        if self.starts is None:
            return
        starts = tuple(self.starts) if isinstance(self.starts, list | tuple) else ()
        object.__setattr__(self, "starts", starts)
        whole = all(isinstance(start, int) and not isinstance(start, bool) for start in starts)
        ascending = whole and starts[:1] == (0,) and all(before < after for before, after in pairwise(starts))
        if not ascending or len(starts) != self.num_cores:
            raise InvalidArgument(
                f"starts is {shown(self.starts)}. It must be {counted(self.num_cores, 'step')}, ascending, the first "
                "0. Pass such steps."
            )

    def with_defaults(self, target: Target) -> Self:
        if self.starts is not None and self.starts[-1] >= target.num_steps:
            raise InvalidArgument(
                f"A core begins at step {self.starts[-1]}, of {counted(target.num_steps, 'step')}. "
                "It would have no step to take. Pass other starts, or leave them out."
            )
        return replace(self, num_cores=min(self.num_cores, target.num_steps))

    def most_iterations(self, target: Target) -> int:
        return self.num_cores - 1

    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        return chords_program(num_steps, self.starts or chord_starts(num_steps, self.num_cores))

    def rows(self, num_steps: int, max_iterations: int) -> int:
        return num_steps * self.num_cores

    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        assert isinstance(program, Cores)
        return chords(x, noise, program, inputs)

    def num_checkpoints(self, max_iterations: int) -> int:
        return self.num_cores

    def candidates(self, target: Target, *, calibrated: bool) -> Iterator[Method]:
        # without calibration it has no tolerance to stop by that could be relied on
        if calibrated and target.leaves_choice:
            # a wave has a row for each core
            every = dict.fromkeys((*PLANNED, *target.rows_of_ranks))
            yield from (Chords(cores) for cores in every if cores <= target.num_steps)

    def words(self) -> list[str]:
        return [counted(self.num_cores, "core")]


@dataclass(frozen=True)
class Cores(Program):
    """The waves of cores that begin at different steps, `starts`, ascending from 0: the later, the faster the core."""

    starts: tuple[int, ...]

    @property
    def num_cores(self) -> int:
        return len(self.starts)

    @property
    def exact_iteration(self) -> int:
        return self.num_iterations

    def final_positions(self, wave: Wave) -> list[int]:
        return [row.position for row in wave.rows if row.iteration == self.num_iterations]  # of core 0

    def core(self, iteration: int) -> int:
        return self.num_cores - 1 - iteration

    def span(self, core: int) -> int:
        """Fine steps between two rectifications of a core, core >= 1."""
        return self.starts[core] - self.starts[core - 1]

    def begins(self, core: int) -> range:
        """Steps from which a core is rectified: it is `span` steps further when the slower core is evaluated there."""
        if core == 0:
            return range(0)
        return range(self.starts[core], self.num_steps - self.span(core) + 1, self.span(core))


@cached
def chords_program(num_steps: int, starts: tuple[int, ...]) -> Cores:
    """N waves; those until the fastest of the K cores arrives are K - 1 + N - starts[-1]. starts: as of `Cores`."""
    waves = []
    for number in range(num_steps):
        rows, arrived = [], []
        for iteration, (core, start) in enumerate(reversed(list(enumerate(starts)))):
            position = start + number - core
            if start <= position < num_steps:
                rows.append(Row(iteration, 0, position, position, coarse=False, fine=True))
            if position == num_steps - 1:
                arrived.append(Boundary(iteration, 1))
        waves.append(Wave(tuple(rows), tuple(arrived)))
    return Cores(num_steps, (0, num_steps), len(starts) - 1, tuple(waves), starts)


def chord_starts(num_steps: int, num_cores: int) -> tuple[int, ...]:
    """Where the K cores begin, 1 <= K <= N.

    For 4, 6 and 8 cores: at the fractions of the grid that the paper runs. For other numbers the fastest core begins at
    the fraction (12 + K) / 25, the line through the paper's three (0.64, 0.72, 0.8), and at 4/5 from 8 cores on; from
    there the paper's theorem for three cores gives one slower core after another, down to 0: before a core that begins
    at t (of 1) comes one at t / 2 or, if that is more, at 2 t - 1, the earliest that still rectifies the faster one in
    time. If no chain of K cores leads to the fastest one, it begins earlier.

    Cores left over, also where starts fall together on a short grid, halve the widest gap, as the paper's 24 of
    (.., 16, 24, 32, ..) does. More than about N / 2 cores are wasted: one that begins a step after another equals it.
    """
    if num_cores in PAPER_STARTS:
        starts = {round(start * num_steps / PAPER_STEPS) for start in PAPER_STARTS[num_cores]}
    else:
        starts = {0}
        reachable = num_steps - -(-num_steps // 2 ** (num_cores - 1))
        start = min((12 + num_cores) * num_steps // 25, 4 * num_steps // 5, reachable)
        while start > 1 and len(starts) < num_cores:
            starts.add(start)
            start = max(-(-start // 2), 2 * start - num_steps)
    if max(starts) < num_cores - 1:  # K cores need as many steps to begin at
        starts.add(num_cores - 1)
    while len(starts) < num_cores:
        width, before = max((after - before, before) for before, after in pairwise(sorted(starts)))
        starts.add(before + width // 2)
    return tuple(sorted(starts))


def chords(x: Tensor, noise: NoiseTable, program: Cores, inputs: SolverInputs = NO_INPUTS) -> Core:
    """Run a CHORDS program: a checkpoint for every core, the fastest first, core 0 (the sequential sampler) last.

    Multistep fine steps look back at the x0 of the step before: it belongs to a core's state, and is rectified with it;
    for a jump it is the x0 at its start. Stochastic steps take the noise drawn for them, whichever core takes them; the
    jump that starts a core adds up the noise of the steps it replaces. In the bracket it would cancel, and is left out.
    `Checkpoint.stationary` is always None: two cores that agree to the bit say nothing of the slower ones, which have
    not arrived yet.
    """
    return (yield from run(x, program, [compiled(noise, program, Form.of(x, inputs))], inputs))


@cached
def compiled(noise: NoiseTable, program: Cores, form: Form) -> CompiledProgram:
    """The updates of a program. Values are named (what, core): "state"; "old" and "new" are jumps across its span.

    "old" jumps from where the core itself began the span, "new" from where the slower core was.
    """
    compiler = Compiler(noise, program, form, state=("state", 0))
    starts, num_cores = program.starts, program.num_cores
    leaps = [compiler.jump(None, start, stop) for start, stop in pairwise(starts)]
    evaluated: set[tuple[int, int]] = set()
    # of each core the beginnings of the spans that are still to be rectified
    ahead = [list(reversed(program.begins(core))) for core in range(num_cores)]
    for wave in program:
        cores = [program.core(row.iteration) for row in wave.rows]
        compiler.begin([("state", core) for core in cores])
        for index, (core, row) in enumerate(zip(cores, wave.rows, strict=True)):
            position, faster = row.position, core + 1
            evaluated.add((core, position))
            jumped_from = starts[core - 1] if core > 0 and position == starts[core] else None
            value = compiler.make_step(index, ("state", core), jumped_from)
            compiler.wave.states.append((position + 1, value))
            for name, owner in (("old", core), ("new", faster)):
                if owner < num_cores and position in program.begins(owner):
                    stop = position + program.span(owner)
                    compiler.make_jump(index, (name, owner), compiler.jump(None, position, stop, noisy=False), stop)
            if faster < num_cores and position == starts[core]:
                compiler.make_jump(index, ("state", faster), leaps[core], starts[faster])
        arrived = {program.core(iteration) for iteration, _ in wave.boundaries}
        for core in reversed(range(num_cores)):  # the fastest first: the next one is compared with it
            begin, whole = next(reversed(ahead[core]), None), core in arrived
            ends = begin is not None and {(core - 1, begin), (core, begin + program.span(core) - 1)} <= evaluated
            if ends:
                ahead[core].pop()
            if ends or whole:
                bracket = (("new", core), ("old", core)) if ends else None
                compare = ("state", core + 1) if whole else None
                completed = compiler.correct(("state", core), bracket, compare, program.core(core), whole)
                if whole:
                    compiler.wave.completed.append(completed)
    return compiler.finish()
