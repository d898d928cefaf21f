"""Programs: which network evaluation happens in which wave. Pure Python, no tensors.

A program is the fixed list of waves for (steps, blocks, iterations). Every method of this package turns into one, so
waves and rows are known before any network is called.

N fine steps are cut into B blocks; the B + 1 boundaries lie between them. Iteration 0 is the coarse sweep; iteration
p >= 1 is one Parareal correction. A *row* is one evaluation of the network at one (x, t); a *wave* holds all rows of
one batched call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, chain, pairwise
from typing import Any, ClassVar, NamedTuple

from ..caches import cached
from ..errors import InvalidArgument
from ..kernels.common.by_field import ByField, fields_of
from .checks import check_switch, check_whole
from .on_demand import OnDemand, mapped

# A program of SRDS with more rows than this is made while it runs, in stages of about so many rows. All at once, its
# rows and their updates would take half a kilobyte each, and 10 microseconds.
LONG = 2**16
ROWS_OF_A_STAGE = 2**13


class Row(NamedTuple):
    """One network evaluation: the point `step` fine steps behind boundary `block` of iteration `iteration`.

    The fine solve that starts at boundary `block` of iteration p feeds boundary `block + 1` of iteration p + 1.
    """

    iteration: int
    block: int
    step: int
    position: int  # on the N-step grid (`bounds[block] + step`): selects timestep and coefficients
    coarse: bool  # the output makes the coarse jump across the block (only where step == 0)
    fine: bool  # the output makes the fine step from `position` to the next


class Boundary(NamedTuple):
    """A boundary as an iteration leaves it: x_i^p of the paper, i = boundary, p = iteration."""

    iteration: int
    boundary: int


class Wave(NamedTuple):
    """Rows of one batched call, and the boundaries whose value is known once it has returned.

    Rows are sorted: coarse only, then coarse and fine, then fine only, so that both kinds are contiguous slices.
    """

    rows: Sequence[Row]
    boundaries: tuple[Boundary, ...]

    def field(self, name: str) -> tuple[Any, ...]:
        """The values of this field of all rows."""
        found: tuple[Any, ...] = fields_of(Row, self.rows)[Row._fields.index(name)]
        return found

    def lanes(self) -> tuple[int, ...]:
        """How many rows are coarse, and how many behind them are not; one number if all are of a kind."""
        coarse = sum(self.field("coarse"))
        return tuple(size for size in (coarse, len(self.rows) - coarse) if size)


class Spent(NamedTuple):
    """What a run has cost when an iteration has given its sample, rows begun for later iterations included."""

    waves: int
    rows: int
    peak_rows: int


@dataclass(frozen=True)
class Program:
    """A list of waves. Iterate over it, or read its counts."""

    num_steps: int  # N, fine steps of the sequential sampler
    bounds: tuple[int, ...]  # grid position of each boundary, length B + 1, from 0 to N
    num_iterations: int  # after the coarse sweep (0: the coarse sweep alone)
    waves: Sequence[Wave]  # in the order they run; a tuple, but for `LongProgram`
    first_iteration: ClassVar[int] = 0  # number of the first iteration: 0, the coarse sweep, for those that have one

    def __iter__(self) -> Iterator[Wave]:
        return iter(self.waves)

    def __len__(self) -> int:
        return len(self.waves)

    @property
    def num_blocks(self) -> int:
        return len(self.bounds) - 1

    @property
    def exact_iteration(self) -> int:
        """The iteration whose sample is the sequential one by construction."""
        return self.num_blocks

    @property
    def num_waves(self) -> int:
        """Batched network calls, one after another: the papers' effective serial evaluations."""
        return len(self.waves)

    @cached_property
    def positions(self) -> Sequence[tuple[int, ...]]:
        """Grid positions of the rows of each wave."""
        return mapped(_positions, self.waves)

    @cached_property
    def all_widths(self) -> tuple[int, ...]:
        """Rows of each wave."""
        return tuple(len(wave.rows) for wave in self.waves)

    def final_positions(self, wave: Wave) -> list[int]:
        """Of the rows whose step no later row changes: they start from a boundary that is exact."""
        iterations, blocks, _, positions, _, fine = fields_of(Row, wave.rows)
        found = zip(iterations, blocks, positions, fine, strict=True)
        return [position for iteration, block, position, steps in found if iteration == block and steps]

    @cached_property
    def final_steps(self) -> Sequence[int]:
        """Steps of the grid that no later wave changes, after each wave."""
        return tuple(self._final_steps())

    def _final_steps(self) -> Iterator[int]:
        done = (1 + max(self.final_positions(wave), default=-1) for wave in self.waves)
        return accumulate(done, max)

    @cached_property
    def num_rows(self) -> int:
        return sum(self.all_widths)

    @cached_property
    def peak_rows(self) -> int:
        return max(self.all_widths)

    def spent(self, iteration: int) -> Spent:
        """Counts of a run of this program that stops after `iteration`."""
        widths = self.widths(iteration)
        return Spent(len(widths), sum(widths), max(widths))

    def widths(self, iteration: int) -> list[int]:
        """Rows of each wave of a run that stops after `iteration`."""
        last = Boundary(iteration, self.num_blocks)
        done = next(number for number, wave in enumerate(self.waves, start=1) if last in wave.boundaries)
        return list(self.all_widths[:done])

    def in_lanes(self) -> Program:
        """The same rows; every wave is cut into its coarse rows and its other ones, in this order."""
        return self._cut([wave.lanes() for wave in self.waves])

    def limited_to(self, max_rows: int | None) -> Program:
        """The same rows; waves wider than `max_rows` are cut into several, one after another."""
        if max_rows is None or self.peak_rows <= max_rows:
            return self
        check_whole("max_rows", max_rows, 1)
        sizes = [divmod(width, max_rows) for width in self.all_widths]
        return self._cut([[max_rows] * whole + [rest] * (rest > 0) for whole, rest in sizes])

    def _cut(self, sizes: list[Sequence[int]]) -> Program:
        """The same rows; each wave is cut into parts of these sizes, and its boundaries are known after the last."""
        return replace(self, waves=tuple(self._parts(sizes)))

    def _parts(self, sizes: list[Sequence[int]]) -> Iterator[Wave]:
        for (rows, boundaries), parts in zip(self.waves, sizes, strict=True):
            *others, last = accumulate(parts)
            yield from (Wave(rows[start:stop], ()) for start, stop in pairwise([0, *others]))
            yield Wave(rows[last - parts[-1] :], boundaries)


@dataclass(frozen=True)
class LongProgram(Program):
    """A program whose waves are made when they are first asked for: a run mostly stops after a few iterations.

    Its counts are known before. Its updates are compiled in stages, see `compiler.Compiler.cut`.
    """

    widths_known: tuple[int, ...]  # `all_widths`

    @cached_property
    def all_widths(self) -> tuple[int, ...]:
        return self.widths_known

    @cached_property
    def final_steps(self) -> Sequence[int]:
        return OnDemand(len(self), self._final_steps)

    def _cut(self, sizes: list[Sequence[int]]) -> Program:
        widths = tuple(chain.from_iterable(sizes))
        return replace(self, waves=OnDemand(len(widths), partial(self._parts, sizes)), widths_known=widths)

    def stages(self) -> list[int]:
        """The waves that stages begin with, but for the first stage."""
        found, rows = list[int](), 0
        for number, width in enumerate(self.all_widths):
            if rows >= ROWS_OF_A_STAGE:
                found.append(number)
                rows = 0
            rows += width
        return found


def _positions(wave: Wave) -> tuple[int, ...]:
    return wave.field("position")


def block_bounds(num_steps: int, num_blocks: int) -> tuple[int, ...]:
    """Grid positions of the boundaries: blocks as equal as they can be, sizes differ by at most one."""
    return tuple(block * num_steps // num_blocks for block in range(num_blocks + 1))


@cached
def sequential(num_steps: int) -> Program:
    """The sequential sampler: N waves of one row."""
    check_whole("num_steps", num_steps, 1)
    waves = [Wave((Row(0, 0, step, step, coarse=False, fine=True),), ()) for step in range(num_steps)]
    waves[-1] = waves[-1]._replace(boundaries=(Boundary(1, 1),))
    return Program(num_steps, (0, num_steps), 1, tuple(waves))


@cached
def srds(
    num_steps: int, num_blocks: int, num_iterations: int, pipelined: bool = True, *, in_flight: int | None = None
) -> Program:
    """SRDS (Selvam et al. 2024, algorithm 1) without the exact prefix.

    Pipelined, a row runs in the first wave in which its input exists: p * S + B - p waves when S = N / B is whole.
    Plain, the fine solves of an iteration wait for the whole coarse sweep before it, as in algorithm 1 of the paper.

    After iteration p the boundaries 0..p are the sequential ones. So iteration p solves only the blocks p-1 and later,
    and boundary p takes the fine result with no correction (its two coarse terms are the same number).

    1 <= B <= N, and B need not divide N; p = B is exact; other numbers raise InvalidArgument. in_flight: iterations
    under way at once, pipelined: rows of iteration p wait for the sample of iteration p - in_flight, which may end the
    run. None: all, the fewest waves.
    """
    check_whole("num_steps", num_steps, 1)
    check_whole("num_blocks", num_blocks, 1, num_steps)
    check_whole("num_iterations", num_iterations, 0, num_blocks)
    check_whole("in_flight", in_flight, 1, optional=True)
    check_switch("pipelined", pipelined)
    if in_flight is not None and not pipelined:
        raise InvalidArgument(
            f"in_flight={in_flight} was given together with pipelined=False. No iteration begins early then. "
            "Leave one of the two out."
        )
    bounds = block_bounds(num_steps, num_blocks)
    size = [stop - start for start, stop in pairwise(bounds)]
    coarse_at, solve_at, _ = _clock(size, num_iterations, pipelined, in_flight or num_blocks)
    widths = _widths(size, coarse_at, solve_at)
    make = partial(_waves, bounds, num_iterations, coarse_at, solve_at, len(widths))
    if sum(widths) <= LONG:
        return Program(num_steps, bounds, num_iterations, tuple(make()))
    return LongProgram(num_steps, bounds, num_iterations, OnDemand(len(widths), make), tuple(widths))


def _waves(
    bounds: tuple[int, ...],
    num_iterations: int,
    coarse_at: dict[tuple[int, int], int],
    solve_at: dict[tuple[int, int], int],
    num_waves: int,
) -> Iterator[Wave]:
    size = [stop - start for start, stop in pairwise(bounds)]
    jumps, solves = _by_wave(coarse_at), _by_wave(solve_at)
    completed: defaultdict[int, list[Boundary]] = defaultdict(list)
    for iteration in range(num_iterations + 1):
        for block in range(max(0, iteration - 1), len(size)):
            needs = [coarse_at[iteration, block]] if block >= iteration else []
            if iteration > 0:
                needs.append(_solved(coarse_at, solve_at, size, iteration - 1, block))
            completed[max(needs)].append(Boundary(iteration, block + 1))

    # solves behind their first step: iteration, block, what a wave's number is less than step and position, last wave
    under_way: list[tuple[int, int, int, int, int]] = []
    for wave in range(num_waves):
        begun = [solve for solve in solves[wave] if size[solve[1]] > 1]
        under_way = [solve for solve in under_way if solve[-1] >= wave]
        if begun:
            solving = ((*solve, 1 - wave, bounds[solve[1]] + 1 - wave, wave + size[solve[1]] - 2) for solve in begun)
            under_way = sorted([*under_way, *solving])
        alone, both = list[Row](), list[Row]()
        for iteration, block in jumps[wave]:
            also_fine = (iteration, block) in solve_at
            row = Row(iteration, block, 0, bounds[block], coarse=True, fine=also_fine)
            (both if also_fine else alone).append(row)
        fields = fields_of(Row, [*sorted(alone), *sorted(both)])
        if under_way:
            iterations, solved, steps, positions, _ = zip(*under_way, strict=True)
            count = len(under_way)
            fine = (
                iterations,
                solved,
                [wave + each for each in steps],
                [wave + each for each in positions],
                [False] * count,
                [True] * count,
            )
            fields = tuple((*first, *then) for first, then in zip(fields, fine, strict=True))
        yield Wave(ByField(Row, fields), tuple(sorted(completed[wave])))


def _by_wave(at: dict[tuple[int, int], int]) -> defaultdict[int, list[tuple[int, int]]]:
    found: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for solve, wave in at.items():
        found[wave].append(solve)
    return found


def srds_widths(
    num_steps: int, num_blocks: int, num_iterations: int, pipelined: bool, in_flight: int | None, iteration: int
) -> list[int]:
    """`Program.widths(iteration)` of `srds(...)`, without making a row."""
    size = [stop - start for start, stop in pairwise(block_bounds(num_steps, num_blocks))]
    coarse_at, solve_at, given = _clock(size, num_iterations, pipelined, in_flight or num_blocks)
    waves = num_blocks if iteration == 0 else given[iteration - 1] + 1
    return _widths(size, coarse_at, solve_at)[:waves]


def _widths(size: list[int], coarse_at: dict[tuple[int, int], int], solve_at: dict[tuple[int, int], int]) -> list[int]:
    """Rows of each wave."""
    last = max([*coarse_at.values(), *(wave + size[block] - 2 for (_, block), wave in solve_at.items())])
    more = [0] * (last + 2)  # rows of a wave, less those of the wave before
    for wave in coarse_at.values():
        more[wave] += 1
        more[wave + 1] -= 1
    for (_, block), wave in solve_at.items():
        more[wave] += 1
        more[wave + size[block] - 1] -= 1
    return list(accumulate(more[:-1]))


def srds_rows(num_steps: int, num_blocks: int, num_iterations: int) -> int:
    """`num_rows` of `srds(...)`, at most: every iteration solves one block less, and takes a jump less."""
    solved = sum(num_blocks - iteration for iteration in range(num_iterations))
    return solved * -(-num_steps // num_blocks) + num_blocks


def _solved(
    coarse_at: dict[tuple[int, int], int], solve_at: dict[tuple[int, int], int], size: list[int], solve: int, block: int
) -> int:
    """The wave with the last fine step of a solve, which is that of the jump where a block has one step."""
    return coarse_at[solve, block] if size[block] == 1 else solve_at[solve, block] + size[block] - 2


def _clock(
    size: list[int], num_iterations: int, pipelined: bool, in_flight: int
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int], list[int]]:
    """The earliest waves: of each coarse jump (iteration, block), of the second fine step of each solve (iteration,
    block), and the one that completes the sample of each iteration, from the first on.

    The first step of a block costs no row: it takes the output that the jump takes. Plain, fine solves begin when the
    last jump before them has ended, and jumps when the last fine solve has.
    """
    num_blocks = len(size)
    coarse = {(0, block): block for block in range(num_blocks)}
    solves: dict[tuple[int, int], int] = {}
    given: list[int] = []
    for iteration in range(1, num_iterations + 1):
        begins = given[iteration - 1 - in_flight] + 1 if iteration > in_flight else 0
        solve, blocks = iteration - 1, range(iteration - 1, num_blocks)
        starts = [max(coarse[solve, block] + 1, begins) for block in blocks]
        if not pipelined:
            starts = [max(starts)] * len(blocks)
        solves |= {(solve, block): start for block, start in zip(blocks, starts, strict=True)}
        solved = [_solved(coarse, solves, size, solve, block) for block in blocks]
        if not pipelined:
            solved = [max(solved)] * len(blocks)
        now = begins
        for boundary in range(iteration, num_blocks):
            now = coarse[iteration, boundary] = max(now, solved[boundary - iteration] + 1)
            now += 1
        given.append(max(solved[-1], now - 1))
    return coarse, solves, given
