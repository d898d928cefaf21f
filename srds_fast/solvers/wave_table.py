"""The updates of programs of blocks: SRDS, and the sequential sampler as one block.

Values are named (what, iteration, block). "state" is where the solve of a block stands, at first the boundary it starts
from; "solved" is where it ends; "jump" is where the coarse jump across the block ends. "completed" is a boundary,
whatever its solve has come to since. The 2M jump looks back at the x0 of the jump across the block before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor

from ..caches import cached
from ..kernels.common.by_field import fields_of
from ..kernels.wave_update import WaveTable
from ..schedulers.steps import CoarseSolver, TensorSpec
from ..schedulers.table import NoiseTable
from .ahead import Tells
from .compiled import CompiledProgram, Completed, Form
from .compiler import Compiler, Jump, Name, x0_of
from .on_demand import OnDemand
from .program import Boundary, LongProgram, Program, Row


def wave_table(noise: NoiseTable, program: Program, coarse_solver: CoarseSolver, x: Tensor) -> WaveTable:
    """The updates of a program for states like x, [samples, ...], with the scheduler's input scale."""
    return compiled(noise, program, coarse_solver, Form(TensorSpec.of(x), scaled=True)).table


@cached
def compiled(noise: NoiseTable, program: Program, coarse_solver: CoarseSolver, form: Form) -> CompiledProgram:
    """The updates of `program.srds(...)` or `program.sequential(...)`. coarse_solver: of the jumps."""
    (found,) = _stages(noise, program, coarse_solver, form, [])
    return found


@cached
def stages(
    noise: NoiseTable, program: LongProgram, coarse_solver: CoarseSolver, form: Form
) -> Sequence[CompiledProgram]:
    """The same in stages, each compiled when it is first asked for."""
    cuts = program.stages()
    return OnDemand(len(cuts) + 1, partial(_stages, noise, program, coarse_solver, form, cuts))


def _stages(
    noise: NoiseTable, program: Program, coarse_solver: CoarseSolver, form: Form, cuts: Sequence[int]
) -> Iterator[CompiledProgram]:
    """cuts: the waves that stages begin with, but for the first stage."""
    compiler = Compiler(noise, program, form, state=("state", 0, 0))
    bounds, whole_grid = program.bounds, program.num_blocks == 1
    jumps: list[Jump] = []
    if any(any(wave.field("coarse")) for wave in program):
        before = [None, *bounds] if coarse_solver == "2m" else [None] * len(bounds)
        jumps = [compiler.jump(previous, *block) for previous, block in zip(before, pairwise(bounds), strict=False)]
    begun: dict[tuple[int, int], int] = {}  # values made before each solve of a block
    looks_back = [jump.coefficients.d != 0.0 for jump in jumps] + [False]
    # an exact run does not estimate its error
    tells, changes = None if form.bitwise else Tells(program), dict[Boundary, int]()
    for number, wave in enumerate(program):
        fields = fields_of(Row, wave.rows)
        states: list[Name] = [("state", *where) for where in zip(*fields[:2], strict=True)]
        compiler.begin(states)
        if number in cuts:
            yield compiler.cut()
        for index, (iteration, block, coarse) in enumerate(zip(*fields[:2], wave.field("coarse"), strict=True)):
            if coarse:
                # boundary i is exact from iteration i on: no later one jumps from it
                x0 = x0_of(("jump", min(iteration, block - 1), block - 1)) if looks_back[block] else None
                name: Name = ("jump", iteration, block)
                compiler.make_jump(index, name, jumps[block], bounds[block + 1], x0, leads=looks_back[block + 1])
        for index, (iteration, block, step, position, _, fine) in enumerate(zip(*fields, strict=True)):
            if fine:
                ends = position + 1 == bounds[block + 1]
                # the coarse sweep has no fine step before a boundary
                jumped_from = bounds[block - 1] if iteration == step == 0 < block else None
                name = ("solved", iteration, block) if ends else states[index]
                own_from = 0
                if compiler.carries:
                    first = begun.setdefault((iteration, block), compiler.num_values)
                    # a correction changes what a solve has come to: nobody else may carry it
                    own_from = first if ends and not whole_grid else 0
                value = compiler.make_step(index, name, jumped_from, own_from=own_from)
                if not ends:
                    compiler.wave.states.append((position + 1, value))
        for boundary in wave.boundaries:
            whole = boundary.boundary == program.num_blocks
            measured = whole or (tells is not None and boundary in tells)
            completed = _complete(compiler, boundary, program, form.bitwise or measured, measured)
            if completed.change is not None:
                changes[boundary] = completed.change
            if whole:
                compiler.wave.completed.append(completed)
            if cuts:
                compiler.forget(_read_last_by(boundary, whole=whole))
        if tells is not None:  # the boundaries of later iterations come last in a wave
            found = compiler.wave.completed
            found[:] = [each._replace(told=tells.told(each.iteration, changes)) for each in found]
    yield compiler.finish()


def _read_last_by(boundary: Boundary, *, whole: bool) -> Iterator[Name]:
    """Names that nothing reads once this boundary is completed.

    What lies at block b of an iteration is read from there by the next iteration at the latest, at blocks b and b + 1,
    before this completes its boundary b + 2. whole: it is the last boundary.
    """
    for block in range(boundary.boundary - 2, boundary.boundary + 1 if whole else boundary.boundary - 1):
        for what in ("state", "solved", "jump", "completed"):
            yield what, boundary.iteration - 1, block


def _complete(compiler: Compiler, boundary: Boundary, program: Program, compared: bool, measured: bool) -> Completed:
    """The value at a boundary, of its parts: F(x^(p-1)) + (G(x^p) - G(x^(p-1)))."""
    iteration, block = boundary.iteration, boundary.boundary - 1
    new, old = ("jump", iteration, block), ("jump", iteration - 1, block)
    compare = ("completed", iteration - 1, boundary.boundary) if compared else None
    becomes = [("state", *boundary), ("completed", *boundary)]
    # the coarse sweep has no solve to correct; in the exact prefix both jumps are the same
    name = ("solved", iteration - 1, block) if iteration > 0 else new
    bracket = (new, old) if 0 < iteration <= block else None
    completed = compiler.correct(name, bracket, compare, iteration, measured, becomes)
    compiler.wave.states.append((program.bounds[boundary.boundary], completed.slot))
    return completed
