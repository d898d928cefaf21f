"""One run of a solver core: feeds it waves, decides at its checkpoints, and counts its cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .. import clock, telemetry
from ..planner.plan import Plan
from ..schedulers.table import NoiseTable
from ..solvers.contract import NO_INPUTS, Answer, Checkpoint, Core, Evaluate, SolverInputs, merged
from ..solvers.convergence import Contraction, Diverged, Monitor, NotFinite
from ..solvers.method import SAME_LAW
from ..solvers.program import Program
from ..telemetry.report import BY_EXACT, BY_ITERATIONS, BY_LAW, BY_OWN_RULE, BY_SEQUENTIAL, BY_TOLERANCE, SURE
from ..words import counted
from . import cancellation
from .distributed import call as distributed
from .x0_previews import X0Previews

Observer = Callable[[Checkpoint], None]
# predicted seconds of waves, or their number where nothing is predicted, after which ranks that replicate hear of each
# other: a rank that was interrupted ends the call on all
UNHEARD, UNHEARD_WAVES = 0.05, 8


def core_of(plan: Plan, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs = NO_INPUTS) -> Core:
    """The core of a plan, not begun. program: its waves; x: starting noise in the dtype of the state, [batch, ...]."""
    return plan.options.core(x, noise, program, inputs, bitwise=plan.bitwise)


@dataclass
class Counts:
    """The cost of a call so far, in the fields of `Report`; a run that continues another one counts on."""

    waves: int = 0
    rows: int = 0
    peak_rows: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    network_seconds: float | None = None

    def add(self, rows: int, samples: int, times: int = 1) -> None:
        """Count a wave. times: -1 takes it back."""
        self.waves += times
        self.rows += times * rows
        self.evaluations += times * rows * samples


@dataclass
class EngineUse:
    """What ran the waves of a run, written by the engine: `engine`, `engine_reason` and so on of `Report`."""

    name: str = "eager"
    reason: str | None = None
    overlap: str = "batch"
    capture_seconds: float = 0.0
    dropped_waves: int = 0


class Run:
    """Steps a core from wave to wave. `next(None)` gives the first wave, `next(output)` the one after it.

    An output holds the variance that the network predicts, if it predicts one; the core is given what
    `NoiseTable.folded` makes of it.

    The clock runs from the first wave handed out, or from `started`, to the last output handed in. It stands still in
    functions of the user that are called back.

    x: starting noise in the dtype of the state, [batch, ...]. counts, engine: of the run that this one continues.
    started: `time.perf_counter()` when the first wave began, if that was before the run was made.
    factor: of the tolerance, that estimated errors are compared with. contraction: how they are estimated; None: as the
    method does. settled_before: steps of the call that were done before this run began.
    previews: show the observer predicted x0 too, where the method has no whole sample before its end.
    shown: iteration that the observer has seen last, -1 before the first.
    change, iterations: see `change` and `iterations_per_sample` of `Report`.
    sample: final samples in the dtype of the state, [batch, ...]; newest: the newest whole one; each None until then.
    final_steps: steps of the grid that no later wave changes, N at the end: for progress bars.
    handed_out: the wave that is run now.
    watch: looks before every wave whether the call is to end; None: nobody asks.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        noise: NoiseTable,
        inputs: SolverInputs = NO_INPUTS,
        observer: Observer | None = None,
        started: float | None = None,
        counts: Counts | None = None,
        engine: EngineUse | None = None,
        factor: float = 1.0,
        contraction: Contraction | None = None,
        together: bool = False,
        settled_before: int = 0,
        previews: bool = False,
    ) -> None:
        if contraction is None:
            contraction = plan.options.contraction_of(stochastic=noise.spread is not None)
        self._monitor = Monitor(len(x), factor * plan.tolerance, plan.bitwise, contraction)
        # after iterations whose changes have not been read; without their samples
        self._unread: list[Checkpoint] = []
        self.change, self.iterations = self._monitor.change, self._monitor.iterations
        self._factor = factor
        self.watch, self._settled_before, self._replays = cancellation.current(), settled_before, False
        observer = None if observer is None else clock.stopped()(observer)
        self._observer, self._together = observer, together
        self.plan, self.program = plan, plan.program()
        self.counts = Counts() if counts is None else counts
        self.engine = EngineUse() if engine is None else engine
        self.handed_out: Evaluate | None = None
        self._started = time.perf_counter() if started is None else started
        self._seconds_before, self._stopped_before = self.counts.seconds, clock.stopped_seconds()
        self.final_steps, self.shown, self.stopped = 0, -1, False
        self._unheard = 0.0
        self.newest: Tensor | None = None
        self.sample: Tensor | None = None
        self._previews: X0Previews | None = None
        if previews and observer is not None and not plan.options.shows_iterations:
            self._previews = X0Previews(noise, inputs, x.dtype, observer)
        self._evaluated = inputs.evaluated
        self._folds = partial(_folded, noise, inputs) if noise.learned is not None else None
        self._core = self._with_ranges(core_of(plan, x, noise, self.program, inputs))

    def next(self, output: Tensor | None) -> Evaluate | None:
        """Hand in the network output of the last wave, get the next one; None when `sample` is there.

        Waits for the device only at checkpoints: the decision to stop reads the change.

        Raises NotFinite where samples are not finite, Diverged where they move away instead of settling; the message is
        for the user.
        """
        if output is not None:
            if self._previews is not None and self.handed_out is not None:
                self._previews.look(self.handed_out, output)
            if self._evaluated is not None and self.handed_out is not None:
                self._evaluated.record(self.handed_out, output)
            if self._folds is not None and self.handed_out is not None:
                output = self._folds(self.handed_out, output)
            self.received()
        try:
            return self._advance(output)
        except StopIteration as stop:
            # the core of a rank that replicates has come to a sample of its own; the newest is that of rank 0
            self.sample = stop.value if distributed.current() is distributed.dividing() else self.newest
            self.final_steps = self.program.num_steps
            if self.watch is not None:
                self.watch.settle(self._settled_before + self.final_steps)
            return None
        except BaseException as what:
            self._core.close()  # a core that replays holds the lock of its device
            if isinstance(what, cancellation.Ended):
                self.leave()
            if isinstance(what, Diverged):
                raise type(what)(self._diagnosis(str(what))) from None
            raise
        finally:
            passed = time.perf_counter() - self._started - (clock.stopped_seconds() - self._stopped_before)
            self.counts.seconds = self._seconds_before + passed

    def close(self) -> None:
        """End without a sample, and free the memory of the waves."""
        self.handed_out = None
        self._core.close()

    def may_launch_ahead(self, iteration: int) -> bool:
        """True if the next iteration may launch before this one's change is read."""
        plan = self.plan
        if self._observer is not None:  # it would wait for the next iteration as well
            return False
        if plan.bitwise or plan.calibrated or iteration <= self._monitor.contraction.blind:
            return True
        # one iteration of margin: few runs have been observed
        return plan.prediction is not None and iteration < plan.prediction.earliest - 1

    def follow(self, core: Core) -> None:
        """Take the waves from this core instead, which replays them; called before the first wave."""
        self._core, self._replays, self._previews = self._with_ranges(core, replayed=True), True, None

    def _with_ranges(self, core: Core, *, replayed: bool = False) -> Core:
        return telemetry.ranged(core, self.program, lambda: self.handed_out is not None, replayed=replayed)

    def _advance(self, answer: Answer) -> Evaluate:
        while True:
            event = self._core.send(answer)
            if isinstance(event, Evaluate):
                self.handed_out = event
                self.final_steps = self.program.final_steps[event.number - 1] if event.number else 0
                self._count(event, 1)
                self._hear(len(event.positions))
                if self.watch is not None:
                    settled = self._settled_before + self.final_steps
                    # a replayed wave is launched already: its sample is waited for
                    self.watch.wave(len(event.positions), settled, interrupts=not self._replays)
                self.counts.peak_rows = max(self.counts.peak_rows, len(event.positions))
                return event
            event = _of_first(event)
            answer = self._judge(event)
            self.newest = merged(self.newest, event.sample, event.samples)
            if self._observer is not None:
                self._observer(event.copied(final=answer == ()))
            self.shown = event.iteration

    def _hear(self, rows: int) -> None:
        """Before a wave of so many rows. Ranks that share rows hear of each other in every wave."""
        call = distributed.current()
        if call is None or not call.replicates:
            return
        prediction = self.plan.prediction
        self._unheard += UNHEARD / UNHEARD_WAVES if prediction is None else self.plan.costs(prediction.curve)(rows)
        if self._unheard >= UNHEARD:
            self._unheard = 0.0
            call.look()

    def received(self) -> None:
        """The wave handed out last has been run."""
        self.handed_out = None

    def leave(self) -> None:
        """Take no more waves. The one handed out last has not been run, and is not counted."""
        self._core.close()
        if self.handed_out is not None:
            self._count(self.handed_out, -1)
            self.handed_out = None

    def stop(self, sample: Tensor) -> None:
        """End here, with this sample, [batch, ...] in the dtype of the state."""
        self.leave()
        self.sample, self.stopped = sample, True
        self.final_steps = self.program.num_steps

    def _judge(self, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        last = checkpoint.exact or checkpoint.error is not None or checkpoint.iteration >= self.plan.max_iterations
        last = last or self._same_law
        if checkpoint.change is not None:
            self._unread.append(replace(checkpoint, sample=checkpoint.change))
            # reading a change waits for the device: a run that takes all iterations reads them at its end
            if self.plan.calibrated and not last:
                return None
            running: tuple[int, ...] = ()
            for seen in self._unread:
                signs = seen.signs()
                stationary = [False] * len(signs) if seen.stationary is None else seen.stationary.tolist()
                running = self._monitor.judge(seen.iteration, seen.samples, signs, seen.exact, stationary)
            self._unread.clear()
            if self._together and running:
                running = tuple(range(len(checkpoint.samples)))
            return () if last else running
        # while iterations are to come, their change will show what is not finite
        if last and not bool(checkpoint.sample.isfinite().all()):
            raise NotFinite
        errors = [math.inf] * len(checkpoint.samples) if checkpoint.error is None else checkpoint.error.tolist()
        # a window that slides where nothing moves by a bit leaves nothing behind
        self._monitor.exact[:] = [checkpoint.exact or (self.plan.bitwise and error == 0.0) for error in errors]
        self._monitor.errors[:] = errors
        self._monitor.iterations[:] = [checkpoint.iteration] * len(checkpoint.samples)
        return () if last else None

    @property
    def stopped_by(self) -> list[str]:
        """See `Report`; of a run that has ended by itself."""
        return list(map(self._stopped_by, self._monitor.exact, self._monitor.converged))

    @property
    def estimated_error(self) -> list[float | None]:
        """See `Report`."""
        found = zip(self.stopped_by, self._monitor.errors, strict=True)
        return [error / self._factor if by not in SURE and error < math.inf else None for by, error in found]

    @property
    def _same_law(self) -> bool:
        return self.plan.options.promise == SAME_LAW

    def _stopped_by(self, exact: bool, close: bool) -> str:
        if self.plan.is_sequential:
            return BY_SEQUENTIAL
        if self._same_law:
            return BY_LAW
        if exact:
            return BY_EXACT
        if self.plan.slides:
            return BY_OWN_RULE
        return BY_TOLERANCE if close and not self.plan.calibrated else BY_ITERATIONS

    def _count(self, wave: Evaluate, times: int) -> None:
        rows = len(wave.positions)
        self.counts.add(rows, len(wave.samples), times)
        if self.plan.prediction is not None:
            seconds = times * self.plan.costs(self.plan.prediction.curve)(rows)
            self.counts.network_seconds = (self.counts.network_seconds or 0.0) + seconds

    def _diagnosis(self, what: str) -> str:
        if self.plan.is_sequential:
            return (
                f"At the end of {counted(self.program.num_steps, 'sequential step')} {what}. The network returned NaN "
                "or Inf. Check its weights and dtype on a single call."
            )
        return (
            f"After {counted(self.counts.waves, 'wave')} of {self.plan.method} {what}. The network returned NaN or "
            "Inf, or the method is unstable on this schedule. Run method='sequential' to see whether the network is "
            f"at fault; if it is not, {self.plan.options.advice}."
        )


def _of_first(checkpoint: Checkpoint) -> Checkpoint:
    """That of rank 0, where each rank has come to its own: ranks stop alike, and have the same sample."""
    call = distributed.current()
    if call is None or not call.replicates:
        return checkpoint
    own: list[Tensor] = []

    def note(each: Tensor) -> Tensor:
        own.append(each)
        return each

    checkpoint.measured(note)
    sample, *measured = call.take_all([checkpoint.sample, *own])
    of_first = iter(measured)
    return replace(checkpoint.measured(lambda each: next(of_first)), sample=sample)


def _folded(noise: NoiseTable, inputs: SolverInputs, wave: Evaluate, output: Tensor) -> Tensor:
    """Outputs of a wave, [rows, samples, 2 * channels, ...], as its core takes them: [rows, samples, channels, ...]."""
    assert inputs.draws is not None
    draws, samples = inputs.draws, list(wave.samples)
    rows = zip(wave.positions, wave.x, output, strict=True)
    return torch.stack([noise.folded(step, x.to(draws.dtype), m, draws[step][samples]) for step, x, m in rows])
