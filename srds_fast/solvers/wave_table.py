"""The updates of programs of blocks: SRDS, and the sequential sampler as one block.

Values are named (what, iteration, block). "state" is where the solve of a block stands, at first the boundary it starts
from; "solved" is where it ends; "jump" is where the coarse jump across the block ends; "lead" is the x0 where that jump
starts, which the 2M jump across the next block looks back at. Multistep schedulers have an x0 beside the state: the
next fine step looks back at "behind"; "solved x0" and "jump x0" correct it at the boundaries, as "solved" and "jump" do
the state, and "jump x0" is the lead. "completed" is a boundary, whatever its solve has come to since.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from ..kernels.wave_update import WaveTable
from ..schedulers.steps import CoarseSolver, TensorSpec
from ..schedulers.table import NoiseTable
from .compiler import CompiledProgram, Compiler, Completed, Form, Jump, Name
from .program import Boundary, Program, settled


def wave_table(noise: NoiseTable, program: Program, coarse_solver: CoarseSolver, x: Tensor) -> WaveTable:
    """The updates of a program for states like x, [samples, ...], with the scheduler's input scale."""
    return compiled(noise, program, coarse_solver, Form(TensorSpec.of(x), scaled=True)).table


@lru_cache(maxsize=64)
def compiled(noise: NoiseTable, program: Program, coarse_solver: CoarseSolver, form: Form) -> CompiledProgram:
    """The updates of `program.srds(...)` or `program.sequential(...)`. coarse_solver: of the jumps."""
    compiler = Compiler(noise, program, form, state=("state", 0, 0), x0=("behind", 0, 0))
    bounds, carries_x0 = program.bounds, compiler.carries_x0
    lead = "jump x0" if carries_x0 else "lead"
    jumps = _jumps(compiler, program, coarse_solver)
    led = {block for block, jump in enumerate(jumps) if jump.coefficients.d != 0.0}
    for wave in program:
        compiler.begin([("state", row.iteration, row.block) for row in wave.rows])
        coarse = [(index, row) for index, row in enumerate(wave.rows) if row.coarse]
        fine = [(index, row) for index, row in enumerate(wave.rows) if row.fine]
        for index, row in coarse:
            x0 = (lead, *settled(row.iteration, row.block - 1)) if row.block in led else None
            name = ("jump", row.iteration, row.block)
            compiler.make_jump(index, name, jumps[row.block], bounds[row.block + 1], x0)
        for index, row in fine:
            ends = row.position + 1 == bounds[row.block + 1]
            # the coarse sweep has no fine step before a boundary
            jumped_from = bounds[row.block - 1] if row.iteration == row.step == 0 < row.block else None
            solve = row.iteration, row.block
            value = compiler.make_step(index, ("solved" if ends else "state", *solve), ("behind", *solve), jumped_from)
            if not ends:
                compiler.wave.states.append((row.position + 1, value))
        for index, row in coarse:
            if carries_x0 or row.block + 1 in led:
                compiler.make_x0(index, (lead, row.iteration, row.block))
        for index, row in fine if carries_x0 else ():
            ends = row.position + 1 == bounds[row.block + 1]
            value = compiler.make_x0(index, ("solved x0" if ends else "behind", row.iteration, row.block))
            compiler.wave.x0.append((row.position, value))
        for boundary in wave.boundaries:
            _complete(compiler, boundary, program, form.bitwise)
    return compiler.finish()


def _jumps(compiler: Compiler, program: Program, coarse_solver: CoarseSolver) -> list[Jump]:
    """The jump across each block; none if no row jumps."""
    if not any(row.coarse for wave in program for row in wave.rows):
        return []
    bounds, second_order = program.bounds, coarse_solver == "2m"
    return [
        compiler.jump(bounds[block - 1] if second_order and block > 0 else None, bounds[block], bounds[block + 1])
        for block in range(program.num_blocks)
    ]


def _complete(compiler: Compiler, boundary: Boundary, program: Program, bitwise: bool) -> None:
    """The value at a boundary, of its parts: F(x^(p-1)) + (G(x^p) - G(x^(p-1)))."""
    iteration, block = boundary.iteration, boundary.boundary - 1
    whole = boundary.boundary == program.num_blocks

    def correct(solved: str, jump: str, compare: Name | None, *becomes: str) -> Completed:
        names = [(name, *boundary) for name in becomes]
        new, old = (jump, iteration, block), (jump, iteration - 1, block)
        if iteration == 0:
            return compiler.correct(new, None, compare, iteration, whole, names)
        # in the exact prefix both jumps are the same
        bracket = (new, old) if iteration <= block else None
        return compiler.correct((solved, iteration - 1, block), bracket, compare, iteration, whole, names)

    compare = ("completed", iteration - 1, boundary.boundary) if bitwise or whole else None
    completed = correct("solved", "jump", compare, "state", "completed")
    if compiler.carries_x0:
        correct("solved x0", "jump x0", None, "behind")
    compiler.wave.states.append((program.bounds[boundary.boundary], completed.slot))
    if whole:
        compiler.wave.completed.append(completed)
