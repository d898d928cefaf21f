"""One call of a pipeline: its own loop makes the turns that the solver's waves need.

A call runs on a shallow copy of the pipe, in which proxies replace the scheduler and the networks. The scheduler's
`step` takes the guided output of a turn, and returns the state of the turn that comes next; the timesteps proxy yields
that turn's step and timestep. Prompt encoding, guidance and decoding are the pipe's own code. No object of the user is
changed.

The first call of a kind rehearses the loop. If its turns allow it, the session repeats the network calls of a few of
them for the rows of all waves, see `takeover.inferred`; otherwise the loop itself makes the turns of the rows of each
wave, see `driver` and `rows`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ... import telemetry
from ...engine import cancellation
from ...engine.merging.calls import MergedCalls
from ...engine.merging.rule import Call
from ...engine.run import Run
from ...engine.streams import has_two_lanes
from ...sampling.session import Session, no_room
from ...schedulers.own_loop import copy_scheduler
from ...schedulers.private_draws import paused
from ...telemetry.report import Report
from ..networks import training
from .call_session import CallSession, CallSettings
from .driver import Driver
from .joint import JointSteps
from .placeholders import Placeholders
from .proxies import SchedulerProxy
from .turns import LoopTurns, refused


class LockstepLoop:
    """State of one call, as the proxies see it. scheduler: the user's, which is copied."""

    def __init__(self, scheduler: Any, settings: CallSettings) -> None:
        self.settings = settings
        self.scheduler = SchedulerProxy(copy_scheduler(scheduler), self)
        self.samples = CallSession(settings)
        self.joint = JointSteps()
        make_own = functools.partial(self._make, own=True)
        self._placeholders = Placeholders(settings.memory.outputs, make_own)
        self._merged = MergedCalls(settings.memory.rules, self._make)
        self.turns = LoopTurns(
            self._placeholders, make_own, self.scheduler.look_before, lambda: self.scheduler.keeps_sample
        )
        self.driver = Driver(self.samples, self.scheduler, self.turns, self._merged, self._placeholders)
        self._strayed = False  # a network of the loop was called outside of it

    @property
    def session(self) -> Session | None:
        """None until the first step."""
        return self.samples.session

    @property
    def run(self) -> Run:
        """The current run; only after the first step."""
        return self.samples.run

    @property
    def finished(self) -> bool:
        """Whether the samples are there, and the loop has got them."""
        return self.session is not None and self.run.sample is not None and self.turns.next_step is None

    @property
    def had_no_step(self) -> bool:
        """Whether the call has ended without a step: its loop was empty, and its networks were not called elsewhere."""
        return self.session is None and self.turns.done == 0 and not self._strayed

    # what the timesteps proxy asks

    def enter(self, start: int, timesteps: Tensor) -> None:
        """A loop over the timesteps begins, at step `start` of the scheduler's grid. It may only read them."""
        if self.session is None:
            telemetry.phase("trace")
            self.samples.start, self.samples.timesteps = start, timesteps
            self.driver.enter()

    # what networks and scheduler ask

    def call(self, call: Call) -> Any:
        """A network call of the pipeline."""
        if not self.turns.under_way:
            self._strayed = self._strayed or any(call.network is each for each in self.settings.networks)
            if self.settings.seen is not None and self.session is None:
                output = call()
                self.settings.seen.append((call.network, output))
                return output
        elif self.samples.started is None:
            self.samples.started = time.perf_counter()
        return self.turns.call(call)

    def step(self, m: Tensor, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        """Take the guided output of a turn; return the state for the next turn, or the samples.

        The other entries are those that the scheduler's own step returns. A loop may read them after the last step.
        """
        step = self.turns.next_step
        if self.joint.count > 1 and (self.settings.keep_states or self.settings.observer is not None):
            raise refused("it steps several states at once, where a callback or a preview expects one")
        if self.session is None and step is not None and self.turns.under_way:
            self.scheduler.check_given(options, self.samples.timesteps, step)
        with self._without_draws():
            sample = self.turns.step(m, x, lambda first: self.driver.script(first, options))
        if step is not None:
            self.scheduler.look_before(step + 1)  # what the loop asks after its step
        if self.turns.next_step is None:
            telemetry.phase("decode")
        if len(self.samples.timesteps) > 1:
            return sample, *self.scheduler.beside(sample, last=self.turns.next_step is None)
        return sample, self.driver.x0.to(sample.dtype)

    def _make(self, call: Call, own: bool = False) -> Any:
        """Make a network call now. own: of a turn; before the waves it shows what the network itself does."""
        watch = cancellation.current()
        if watch is not None:
            watch.look_within() if own else watch.look()
        network = call.network
        if not own or self.session is not None:  # code is compiled for waves alone
            network = self.settings.replacements.get(network, network)  # type: ignore[call-overload]
        elif self.driver.reason is None:  # it is known to be part of a wave only where the loop makes its own turns
            return call()
        with self._without_draws():
            if self.settings.draws is not None:  # nothing is measured beside the calls of a user
                return call(network)
            wave = self.samples.wave
            with telemetry.span("network", "network", 1 if wave is None else len(wave.positions)):
                return call(network)

    def _without_draws(self) -> AbstractContextManager[object]:
        """Draws of our own are for the code of the loop, and for networks in training mode, which may drop out.

        Those of rank 0 are also for the checks before the waves, which find out whether networks draw.
        """
        draws, of_first = self.settings.draws, None if self.session is None else self.settings.draws_of_first
        if (draws is None and of_first is None) or self._networks_train:
            return nullcontext()
        return paused(of_first, draws)

    @cached_property
    def _networks_train(self) -> bool:
        return training(self.settings.networks)

    def interrupt(self, sample: Tensor, dtype: torch.dtype) -> Tensor:
        """A callback ends the call early with this sample; returns it in the form that the loop expects."""
        self.samples.interrupt(sample)
        self.turns.end()
        telemetry.phase("decode")
        return sample.to(dtype)

    def go_on_from(self, step: int, x: Tensor, reason: str) -> Tensor:
        """A callback has changed something after a final step: drop all results beyond it.

        Continue from the state x, [batch, ...], one step at a time. reason: for the report. Returns x in the form that
        the loop expects.
        """
        assert self.session is not None
        self.session.fall_back(reason)
        if step + 1 == len(self.samples.timesteps):
            self.samples.stop(x)
            self.turns.end()
            return x
        self.samples.go_on_from(step, x, reason)
        return self.turns.follow(self.driver.rest())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A loop that copies what its scheduler holds would copy this."""
        raise refused(
            "it copies what its scheduler holds and puts it back, to step parts of its state, such as the views of a "
            "panorama, one after another with one scheduler"
        )

    def report(self, left_out: Sequence[str]) -> Report | None:
        """The report of the call until now; None before the first step. left_out: options that were not applied."""
        if self.session is None:
            return None
        taken_over = self.session.network is not None
        if (
            self.settings.overlap == "streams"
            and self.run.engine.overlap == "batch"
            and has_two_lanes(self.run.program)
        ):
            why = "a graph of the network holds all rows of a wave" if taken_over else "the loop is driven"
            left_out = [*left_out, f"overlap='streams' was left out: {why}"]
        left_out = [
            *left_out,
            *(f"the network is called for one row at a time: {reason}" for reason in self._merged.reasons()),
        ]
        if (rows := self._merged.too_wide) is not None:
            left_out = [*left_out, f"waves were evaluated in parts: {no_room(rows)}"]
        report = self.session.report(None if taken_over else self.driver.reason, self.settings.engine_reason, left_out)
        return replace(report, **self.beside_the_waves())

    def beside_the_waves(self) -> dict[str, Any]:
        """Fields of the report: what it took to find out how the loop and its networks work."""
        return {
            "check_calls": self.driver.check.calls,
            "check_seconds": self.driver.check.seconds,
            "rehearsal_calls": self._placeholders.network_calls + self._merged.search_calls,
            "rehearsal_seconds": self.driver.seconds,
        }

    def close(self) -> None:
        """End the call: keep the graphs that it has recorded, and how many rows fit into memory."""
        self.turns.close()
        pricing = None if self.session is None else self.session.pricing
        if self._merged.too_wide is not None and pricing is not None:
            pricing.known.experience.record_oom(self._merged.too_wide)
        if self.samples.graphed is not None and self.settings.graphs is not None:
            self.settings.graphs.finish(self.samples.graphed, self.run.engine)
