"""Trials: a call of a kind that is being explored also runs other plans on its input, to time them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import clock, progress, telemetry
from ..engine import cancellation
from ..engine.distributed import call as distributed
from ..engine.eager import drain
from ..engine.run import Observer, Run
from ..errors import DivergenceError
from ..planner.choose import choose, fixed_at
from ..planner.exploration import LOST, Exploration
from ..planner.plan import Plan
from ..planner.predictions import turns_to_time
from ..planner.search import Pricing
from ..planner.settings import Settings
from ..solvers.contract import Checkpoint, Evaluate
from ..solvers.convergence import estimated_error
from ..solvers.registry import SEQUENTIAL
from ..telemetry.report import Report
from ..words import counted, duration
from .stop_rule import StopRule

# iterations that an audited run goes on after it would have stopped
FURTHER = 3
logger = logging.getLogger("srds_fast")

Advance = Callable[[Run, Callable[[Evaluate], Tensor]], None]
"""(run, evaluator) -> None: takes a run from wave to wave to its end."""


TimeStock = Callable[[int], float]
"""(turns) -> seconds of a stock loop that takes so many turns."""


class TooSlow(Exception):
    """A run has taken so long that the sequential loop is faster for certain."""


class StartAgain(Exception):
    """What a run has computed does not count. The message says why, as a clause."""


def all_waves(run: Run, evaluate: Callable[[Evaluate], Tensor]) -> None:
    """The plain `Advance`."""
    drain(run.next, evaluate)


def cut_off(advance: Advance, sequential_seconds: float) -> Advance:
    """The same, but TooSlow ends a method whose first wave takes longer than a sequential call, or all LOST times."""

    def advance_until(run: Run, evaluate: Callable[[Evaluate], Tensor]) -> None:
        begun, waves = clock.now(), 0

        def checked(wave: Evaluate) -> Tensor:
            nonlocal waves
            limit = sequential_seconds * (1.0 if waves == 1 else LOST)
            if waves and not run.plan.is_sequential and clock.since(begun, "the seconds of the first waves") > limit:
                raise TooSlow(f"its first {counted(waves, 'wave')} took longer than {duration(limit)}")
            waves += 1
            return evaluate(wave)

        advance(run, checked)

    return advance_until


class Enough(Exception):
    """A loop has been timed by some of its turns. seconds: what all of them take."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class TurnClock:
    """Times a loop on a device, whose turns cost the same, by its first ones. turns: of the whole loop."""

    def __init__(self, turns: int, device: torch.device) -> None:
        self._turns, self._timed, self._device = turns, turns_to_time(turns), device
        self._done, self._first = 0, 0.0

    def seconds(self, loop: Callable[[], object]) -> float:
        """Seconds of all turns of a loop that calls `turned`. Enough is raised in it."""
        try:
            loop()
        except Enough as timed:
            return timed.seconds
        raise RuntimeError(f"it took {counted(self._done, 'turn')} where {self._turns} were expected")

    def turned(self) -> None:
        """Call it after each turn. Raises Enough after the last of those that are timed."""
        self._done += 1
        if self._done not in (1, self._timed):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = clock.agreed(clock.now(), "the time of a turn")
        if self._timed > 1 and self._done == self._timed:
            raise Enough((now - self._first) * self._turns / (self._timed - 1))
        self._first = now


def first_turns(advance: Advance, device: torch.device) -> Advance:
    """The same, but Enough ends the run when it has been timed; a recording, which runs no single wave, goes on."""

    def advance_some(run: Run, evaluate: Callable[[Evaluate], Tensor]) -> None:
        clock = TurnClock(len(run.program), device)

        def timed(wave: Evaluate) -> Tensor:
            found = evaluate(wave)
            clock.turned()
            return found

        advance(run, timed)

    return advance_some


class Trial(Protocol):
    """The session of a run that is only timed."""

    run: Run
    state: Tensor  # starting noise

    @property
    def seconds(self) -> float:
        """Seconds of the run that tell what others take."""

    def complete(self, advance: Advance) -> Run:
        """Run all waves."""

    def report(self) -> Report:
        """What was done."""


def audit(rule: StopRule, plan: Plan, iterations: int, trial: Callable[[Plan, Observer | None], Trial]) -> None:
    """Compare a run with the sequential sample of its input, some iterations further than it went.

    rule: of the run; its audit learns. iterations: that the run has taken. trial: makes the session of a run of a plan,
    which an observer follows.
    """
    seen: list[Checkpoint] = []

    def keep(checkpoint: Checkpoint) -> None:
        if checkpoint.change is not None:
            seen.append(checkpoint.copied(final=checkpoint.final))

    sequential = choose(plan.num_inference_steps, Settings(method=SEQUENTIAL))
    telemetry.phase("explore")
    try:
        with telemetry.unseen(), cancellation.aside():
            trial(fixed_at(plan, min(plan.max_iterations, iterations + FURTHER)), keep).complete(all_waves)
            reference = trial(sequential, None).complete(all_waves).sample
    except DivergenceError:  # such a call takes the sequential steps
        return
    assert reference is not None
    assert rule.audit is not None
    of_samples = [each.signs() for each in seen]
    for sample, expected in enumerate(reference):
        changes, errors = list[float](), list[tuple[float, float]]()
        for each, signs in zip(seen, of_samples, strict=True):
            change, *others = signs[sample]
            changes.append(change)
            estimated = 0.0 if each.exact else estimated_error(changes, rule.contraction, *others)
            errors.append((estimated, float((each.sample[sample] - expected).abs().double().mean())))
        rule.audit.record(errors)


class Timed(NamedTuple):
    """Seconds of a run, None if it did not get to its end; seconds spent on recording it; `work` of its iterations."""

    seconds: float | None
    recording: float = 0.0
    work: float = 1.0


@dataclass(frozen=True)
class Trials:
    """What a call of an explored kind can run beside its own plan.

    trial: makes the session of a run of a plan on the input of the call. stock: runs the stock loop of so many turns,
    and returns their seconds; None: it cannot be run. pricing: learns from the runs. lead: seconds that a call of any
    plan takes before its first wave, which a trial does not take again.
    """

    exploration: Exploration
    pricing: Pricing
    trial: Callable[[Plan], Trial]
    stock: TimeStock | None
    lead: float

    def run_due(self) -> float:
        """Run all that is due in this call. Returns the seconds that it took."""
        started = time.perf_counter()
        with progress.bar("Timing other plans", self.exploration.seconds_left, unit="s") as bar:
            while (way := self.exploration.due()) is not None:
                telemetry.phase("explore")
                begun = clock.now()
                with telemetry.unseen(), cancellation.aside():  # waves of the report are those of the call
                    timed = self._stock() if isinstance(way, str) else self._planned(way)
                took, ended = clock.since(begun, "the seconds of a trial") - timed.recording, timed.seconds is not None
                self.exploration.record(way, timed.seconds or took, ended=ended, work=timed.work)
                self.exploration.spend(took)
                bar.update(took)
        return time.perf_counter() - started

    def _planned(self, plan: Plan) -> Timed:
        recording = 0.0
        for _ in range(2):  # the first run of a plan may be eager, and be recorded
            trial = self.trial(plan)
            advance = cut_off(all_waves, self.exploration.sequential_seconds)
            if plan.is_sequential:
                advance = first_turns(all_waves, trial.state.device)
            try:
                with distributed.attempt("timing a plan"):
                    trial.complete(advance)
            except Enough as timed:
                trial.run.close()
                return Timed(self.lead + timed.seconds, recording)
            except Exception as why:  # the call is complete: it must not fail for what would help later ones
                trial.run.close()
                if not isinstance(why, TooSlow | DivergenceError):
                    logger.warning("%s failed when it was timed: %s. It is not used.", plan.short(), why)
                return Timed(None, recording)
            report = trial.report()
            if report.fallback_reason is not None:
                return Timed(None, recording)
            recorded = clock.agreed(report.capture_seconds, "the seconds of recording")
            recording += recorded
            if not recorded:
                break
        work = self.pricing.work(plan, report.iterations)
        self.pricing.record(plan, report)
        seconds = self.lead + clock.agreed(trial.seconds, "the seconds of a plan")
        return Timed(seconds, recording, work)

    def _stock(self) -> Timed:
        assert self.stock is not None
        try:
            with distributed.attempt("timing the loop without srds_fast"):
                return Timed(self.stock(self.exploration.plan.num_inference_steps))
        except Exception as why:
            logger.warning("The loop without srds_fast failed when it was timed: %s. It is not used.", why)
            return Timed(None)
