"""CHORDS (Han et al., ICCV 2025): cores that begin further and further along, the slower ones rectify the faster.

When the slower core is evaluated where the faster one began its span, the faster one has just come to the end of it:

    x_fast <- F(x_begin) + ( G(x_slow) - G(x_begin) )

F are the fine steps of the span, G one jump across it. It is the Parareal correction, but made from network outputs
that both cores take anyway: no row is spent on it. The bracket is computed first, so it is bitwise zero where the two
cores agree. The next span of the faster core begins at the value so rectified, as in the authors' code: the slower core
comes there when that span has ended.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from torch import Tensor

from ...schedulers.table import NoiseTable
from ..compiler import CompiledProgram, Compiler, Form, Jump
from ..contract import NO_INPUTS, Core, SolverInputs
from ..waves import run
from .program import Cores

# the x0 that belongs to a value
X0_OF = {"state": "behind", "old": "old x0", "new": "new x0"}


def chords(x: Tensor, noise: NoiseTable, program: Cores, inputs: SolverInputs = NO_INPUTS) -> Core:
    """Run a CHORDS program: a checkpoint for every core, the fastest first, core 0 (the sequential sampler) last.

    Multistep fine steps look back at the x0 of the step before: it belongs to a core's state, and is rectified with it;
    for a jump it is the x0 at its start. Stochastic steps take the noise drawn for them, whichever core takes them; the
    jump that starts a core adds up the noise of the steps it replaces. In the bracket it would cancel, and is left out.
    `Checkpoint.stationary` is always None: two cores that agree to the bit say nothing of the slower ones, which have
    not arrived yet.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: `program.chords(N, starts)`.
        inputs: see `SolverInputs`.
    """
    return (yield from run(x, program, compiled(noise, program, Form.of(x, inputs)), inputs))


@lru_cache(maxsize=64)
def compiled(noise: NoiseTable, program: Cores, form: Form) -> CompiledProgram:
    """The updates of a program.

    Values are named (what, core): "state"; "old" and "new", the jumps from where its span began, by itself and by the
    slower core; for multistep schedulers also the x0 that belong to these.
    """
    compiler = Compiler(noise, program, form, state=("state", 0), x0=("behind", 0))
    starts = program.starts
    leaps = [compiler.jump(None, start, stop) for start, stop in pairwise(starts)]
    evaluated: set[tuple[int, int]] = set()
    # of each core the beginnings of the spans that are still to be rectified
    ahead = [list(reversed(program.begins(core))) for core in range(program.num_cores)]
    for wave in program:
        cores = [program.core(row.iteration) for row in wave.rows]
        compiler.begin([("state", core) for core in cores])
        for index, (core, row) in enumerate(zip(cores, wave.rows, strict=True)):
            position = row.position
            evaluated.add((core, position))
            jumped_from = starts[core - 1] if core > 0 and position == starts[core] else None
            value = compiler.make_step(index, ("state", core), ("behind", core), jumped_from)
            compiler.record(position + 1, value)
            jumps = _jumps(compiler, program, leaps, core, position)
            for name, jump, arrives in jumps:
                compiler.make_jump(index, name, jump, arrives)
            if compiler.carries_x0:
                compiler.make_x0(index, ("behind", core), recorded=True)
                for (what, owner), _, _ in jumps:
                    compiler.make_x0(index, (X0_OF[what], owner))
        arrived = {program.core(iteration) for iteration, _ in wave.boundaries}
        for core in reversed(range(program.num_cores)):  # the fastest first: the next one is compared with it
            begin, whole = next(reversed(ahead[core]), None), core in arrived
            ends = begin is not None and {(core - 1, begin), (core, begin + program.span(core) - 1)} <= evaluated
            if ends:
                ahead[core].pop()
            if ends and compiler.carries_x0:
                compiler.correct(("behind", core), (("new x0", core), ("old x0", core)))
            if ends or whole:
                bracket = (("new", core), ("old", core)) if ends else None
                compare = ("state", core + 1) if whole else None
                completed = compiler.correct(("state", core), bracket, compare, program.core(core), whole)
                if whole:
                    compiler.complete(completed)
    return compiler.finish()


def _jumps(
    compiler: Compiler, program: Cores, leaps: list[Jump], core: int, position: int
) -> list[tuple[tuple[str, int], Jump, int]]:
    """The jumps made from a row: the value's name, the jump, and where it arrives."""
    faster, jumps = core + 1, []
    for what, owner in (("old", core), ("new", faster)):
        if owner < program.num_cores and position in program.begins(owner):
            end = position + program.span(owner)
            jumps.append(((what, owner), compiler.jump(None, position, end, noisy=False), end))
    if faster < program.num_cores and position == program.starts[core]:
        jumps.append((("state", faster), leaps[core], program.starts[faster]))
    return jumps
