"""One run of a solver core: feeds it waves, decides at its checkpoints, and counts its cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from .. import telemetry
from ..errors import DivergenceError
from ..kernels.common.dispatch import implementation
from ..planner.choose import choose
from ..planner.plan import Plan
from ..planner.settings import Settings
from ..schedulers.table import NoiseTable
from ..solvers.contract import NO_INPUTS, Answer, Checkpoint, Core, Evaluate, SolverInputs
from ..solvers.convergence import Diverged, Monitor
from ..solvers.method import plain_steps
from ..solvers.program import Program
from ..solvers.registry import SEQUENTIAL
from ..telemetry.report import Report

Observer = Callable[[Checkpoint], None]


def core_of(plan: Plan, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs = NO_INPUTS) -> Core:
    """The core of a plan, not begun. program: its waves; x: starting noise in the dtype of the state, [batch, ...]."""
    return plan.options.core(x, noise, program, inputs, bitwise=plan.bitwise)


def no_room(rows: int) -> str:
    """The message for a wave that ran out of memory. rows: of the widest that was tried."""
    return f"a wave of up to {rows} rows did not fit into the device's memory: pass max_rows, fewer than that"


def step_by_step(
    report: Report, reason: str, x: Tensor, noise: NoiseTable, inputs: SolverInputs, observer: Observer | None
) -> Run:
    """The sequential run that replaces one which failed, in the same report; it has not begun."""
    report.fallback_reason = f"{reason}. The steps were then taken one after another"
    report.change.clear()
    report.method, report.engine, report.overlap = SEQUENTIAL, "eager", "batch"
    report.num_blocks, report.coarse_solver, report.in_flight, report.options = 0, None, None, None
    report.predicted_seconds = report.plan_reason = report.network_seconds = None
    plan = choose(noise.num_steps, Settings(method=SEQUENTIAL))
    return Run(plan, x, noise, report.path, replace(inputs, initial_guess=None), observer, report=report)


class Run:
    """Steps a core from wave to wave. `next(None)` gives the first wave, `next(output)` the one after it.

    The clock runs from the first wave handed out, or from `started`, to the last output handed in.

    Args:
        plan: what to run.
        x: starting noise in the dtype of the state, [batch, ...].
        noise: table of the plan's steps.
        path: who feeds the run, for the report.
        inputs: noise of stochastic steps, constraint, trajectory, history.
        observer: sees every checkpoint as it comes.
        started: `time.perf_counter()` when the first wave began, if that was before the run was made.
        report: go on counting in this one, of a run that was left.

    Attributes:
        plan: the same.
        program: its waves.
        shown: iteration that the observer has seen last, -1 before the first.
        report: of this run, complete once `next` returned None.
        sample: final samples in the dtype of the state, [batch, ...]; None until then.
        newest: the newest whole sample, [batch, ...]; None before the first.
        final_steps: steps of the grid that no later wave changes, N at the end: for progress bars.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        noise: NoiseTable,
        path: str,
        inputs: SolverInputs = NO_INPUTS,
        observer: Observer | None = None,
        started: float | None = None,
        report: Report | None = None,
    ) -> None:
        contraction = plan.options.contraction(plain=plain_steps(noise))
        self._monitor = Monitor(len(x), plan.tolerance, plan.bitwise, contraction)
        self._observer = observer
        self.plan = plan
        self.program = plan.program()
        self._waves = 0
        self._handed_out: Evaluate | None = None
        self._started = time.perf_counter() if started is None else started
        self._seconds_before = 0.0 if report is None else report.seconds
        self.final_steps = 0
        self.shown = -1
        self.newest: Tensor | None = None
        self.sample: Tensor | None = None
        if report is not None:
            report.converged, report.iterations_per_sample = self._monitor.converged, self._monitor.iterations
        self.report = report or Report(
            method=plan.method,
            engine="eager",
            path=path,
            num_inference_steps=plan.num_inference_steps,
            tolerance=plan.tolerance,
            exact=plan.exact,
            change=self._monitor.change,
            converged=self._monitor.converged,
            iterations_per_sample=self._monitor.iterations,
            kernels=implementation(x.device) if plan.options.fused else "torch",
            **plan.options.reported(),
        )
        if plan.prediction is not None:
            self.report.predicted_seconds = plan.prediction.chosen.seconds
            self.report.plan_reason = plan.prediction.why
        self._core = core_of(plan, x, noise, self.program, inputs)
        self._ranges = telemetry.waves_of(self.program)

    def next(self, output: Tensor | None) -> Evaluate | None:
        """Hand in the network output of the last wave, get the next one; None when `sample` is there.

        Waits for the device only at checkpoints: the decision to stop reads the change.

        Raises:
            DivergenceError: the samples are not finite, or move away instead of settling.
        """
        if output is not None:
            self.received()
        try:
            return self._advance(output)
        except StopIteration as stop:
            self.sample = stop.value
            self.final_steps = self.program.num_steps
            return None
        except Diverged as what:
            self._core.close()
            raise DivergenceError(self._diagnosis(str(what)), self.report) from None
        except BaseException:
            self._core.close()  # a core that replays holds the lock of its device
            raise
        finally:
            self.report.seconds = self._seconds_before + time.perf_counter() - self._started
            if self._ranges is not None and self._handed_out is None:
                self._ranges.end()

    def close(self) -> None:
        """End without a sample, and free the memory of the waves."""
        self._core.close()
        self._handed_out = None

    def may_launch_ahead(self, iteration: int) -> bool:
        """True if the next iteration may launch before this one's change is read.

        False where an observer looks at every sample: the observer would wait for the next iteration as well.
        """
        plan = self.plan
        if self._observer is not None:
            return False
        if plan.bitwise or plan.calibrated or iteration <= self._monitor.contraction.blind:
            return True
        # one iteration of margin: few runs have been observed
        return plan.prediction is not None and iteration < plan.prediction.earliest - 1

    def follow(self, core: Core) -> None:
        """Take the waves from this core instead, which replays them; called before the first wave."""
        self._core = core
        if self._ranges is not None:
            self._ranges.follow()

    def _advance(self, answer: Answer) -> Evaluate:
        ranges = self._ranges
        if ranges is not None:
            ranges.advance()
        while True:
            event = self._core.send(answer)
            if isinstance(event, Evaluate):
                self._handed_out = event
                self.final_steps = self.program.final_steps[event.number - 1] if event.number else 0
                self._count(event, 1)
                self.report.peak_rows = max(self.report.peak_rows, len(event.positions))
                if ranges is not None:
                    ranges.wave(event.number)
                return event
            if ranges is not None:
                ranges.checkpoint(event.iteration)
            answer = self._judge(event)
            self._keep_newest(event)
            if self._observer is not None:
                self._observer(event)
            self.shown = event.iteration
            if ranges is not None:
                ranges.judged(event.iteration, ends=answer == ())

    def received(self) -> None:
        """The wave handed out last has been run."""
        self._handed_out = None

    def leave(self) -> None:
        """Take no more waves. The one handed out last has not been run, and is not counted."""
        if self._ranges is not None:
            self._ranges.end(dropped=self._handed_out is not None)
        if self._handed_out is not None:
            self._count(self._handed_out, -1)
            self._handed_out = None
        self._core.close()

    def stop(self, sample: Tensor) -> None:
        """End here, with this sample, [batch, ...] in the dtype of the state."""
        self.leave()
        self.sample = sample
        self.final_steps = self.program.num_steps

    def _judge(self, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        if checkpoint.change is not None and not self.plan.calibrated:
            change = checkpoint.change.tolist()
            stationary = [False] * len(change) if checkpoint.stationary is None else checkpoint.stationary.tolist()
            running = self._monitor.judge(
                checkpoint.iteration, checkpoint.samples, change, checkpoint.exact, stationary
            )
            return () if checkpoint.iteration >= self.plan.max_iterations else running
        # reading a value waits for the device; while iterations are to come, their change will show it
        last = checkpoint.exact or checkpoint.settled or checkpoint.iteration >= self.plan.max_iterations
        if last and not bool(checkpoint.sample.isfinite().all()):
            raise Diverged("a sample is not finite")
        enough = checkpoint.exact or checkpoint.settled or (last and self.plan.calibrated)
        self._monitor.converged[:] = [enough] * len(checkpoint.samples)
        self._monitor.iterations[:] = [checkpoint.iteration] * len(checkpoint.samples)
        return () if last else None

    def _keep_newest(self, checkpoint: Checkpoint) -> None:
        if self.newest is None or len(self.newest) == len(checkpoint.sample):
            self.newest = checkpoint.sample
        else:  # samples that have finished keep what they had
            self.newest = self.newest.clone()
            self.newest[list(checkpoint.samples)] = checkpoint.sample

    def _count(self, wave: Evaluate, times: int) -> None:
        rows = len(wave.positions)
        self._waves += times
        self.report.waves += times
        self.report.rows += times * rows
        self.report.evaluations += times * rows * len(wave.samples)
        if self.plan.prediction is not None:
            seconds = times * self.plan.prediction.curve(rows)
            self.report.network_seconds = (self.report.network_seconds or 0.0) + seconds

    def _diagnosis(self, what: str) -> str:
        if self.plan.is_sequential:
            return (
                f"At the end of {self.report.num_inference_steps} sequential steps {what}. The network returned NaN or "
                "Inf. Check its weights and dtype on a single call."
            )
        return (
            f"After {self.report.waves} waves of {self.report.method} {what}. The network returned NaN or Inf, or the "
            "method is unstable on this schedule. Run method='sequential' to see whether the network is at fault; if "
            f"it is not, {self.plan.options.advice}."
        )
