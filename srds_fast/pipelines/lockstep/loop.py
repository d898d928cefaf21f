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
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import InitVar, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ... import telemetry
from ...engine.run import Run
from ...engine.streams import has_two_lanes
from ...sampling.session import Session, no_room
from ...telemetry.report import Report
from ..kinds import KindOfLoop
from ..merging.calls import MergedCalls
from ..merging.rule import Call
from ..network_checks import NO_CHECK
from ..networks import training
from ..takeover.network import network_calls
from .call_session import CallSession, CallSettings
from .driver import Driver
from .joint import JointSteps
from .memory import LoopMemory
from .placeholders import Placeholders
from .proxies import SchedulerProxy, copy_scheduler
from .taken_over import TakenOver
from .turns import LoopTurns, Ran, Script, refused


@dataclass(eq=False)
class LockstepLoop:
    """State of one call, as the proxies see it."""

    original_scheduler: InitVar[Any]  # it is copied
    settings: CallSettings
    networks: Sequence[nn.Module]  # those that the loop calls
    drive_reason: str | None  # why the loop makes its own turns; None: it is taken over, if its turns allow it
    engine_reason: str | None  # why it runs eagerly
    replacements: Mapping[nn.Module, Callable[..., Any]]  # maps a network to the callable to use instead
    memory: LoopMemory  # of earlier calls
    kind: KindOfLoop | None  # everything the loop depends on beyond its scheduler; None: remember nothing
    generators: list[torch.Generator]  # of the caller, that the loop may draw from

    def __post_init__(self, original_scheduler: Any) -> None:
        self.scheduler = SchedulerProxy(copy_scheduler(original_scheduler), self)
        self.samples = CallSession(self.settings)
        self.joint = JointSteps()
        self.progress: Callable[[], None] = lambda: None  # shows the final steps on the pipe's progress bar
        make_own = functools.partial(self._make, own=True)
        self._placeholders = Placeholders(self.memory.outputs, make_own)
        self._merged = MergedCalls(self.memory.rules, self._make)
        self._turns = LoopTurns(
            self._placeholders, make_own, self.scheduler.look_before, lambda: self.scheduler.keeps_sample
        )
        self._waves = TakenOver(self.samples, self.replacements, lambda: self.progress())
        self._driver: Driver | None = None
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
        return self.session is not None and self.run.sample is not None and self.next_step is None

    @property
    def had_no_step(self) -> bool:
        """Whether the call has ended without a step: its loop was empty, and its networks were not called elsewhere."""
        return self.session is None and self._turns.done == 0 and not self._strayed

    @property
    def timesteps(self) -> Tensor:
        """Of the steps in the loop."""
        return self.samples.timesteps

    @property
    def final_steps(self) -> int:
        """Number of steps whose states no later wave changes."""
        return self.samples.final_steps

    # what the timesteps proxy asks

    def enter(self, start: int, timesteps: Tensor) -> None:
        """A loop over the timesteps begins, at step `start` of the scheduler's grid. It may only read them."""
        if self.session is None:
            telemetry.phase("trace")
            self.samples.start, self.samples.timesteps = start, timesteps
            self._driver = Driver(
                self.samples,
                self.scheduler,
                self._turns,
                self._merged,
                self.memory,
                self.networks,
                self.generators,
                self.kind,
                self._graph_network_calls,
                self._waves if self.drive_reason is None else None,
                self._placeholders,
            )

    def begin(self, step: int) -> int:
        """The turn of a step begins; returns the number of turns before it."""
        self._turns.begin(step, live=self._driver is None or self._driver.begins_live)
        return self._turns.done

    def leave(self) -> None:
        """The loop has only read its timesteps."""
        self._turns.leave()

    @property
    def turns_done(self) -> int:
        return self._turns.done

    @property
    def next_step(self) -> int | None:
        """The step of the turn that comes next; None: the loop ends."""
        return None if self._turns.turn is None else self._turns.turn.step

    # what networks and scheduler ask

    def call(self, call: Call) -> Any:
        """A network call of the pipeline."""
        if not self._turns.under_way:
            self._strayed = self._strayed or any(call.network is each for each in self.networks)
        elif self.samples.started is None:
            self.samples.started = time.perf_counter()
        return self._turns.call(call)

    def step(self, m: Tensor, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        """Take the guided output of a turn; return the state for the next turn, or the samples.

        The other entries are those that the scheduler's own step returns. A loop may read them after the last step.
        """
        with self._without_draws():
            return self._step(m, x, options)

    def _step(self, m: Tensor, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        step = self.next_step
        if self.joint.count > 1 and (self.settings.keep_states or self.settings.observer is not None):
            raise refused("it steps several states at once, where a callback or a preview expects one")
        sample = self._turns.step(m, x, lambda first: self._script(first, options))
        if step is not None:
            self.scheduler.look_before(step + 1)  # what the loop asks after its step
        if self.next_step is None:
            telemetry.phase("decode")
        if len(self.timesteps) > 1:
            return sample, *self.scheduler.beside(sample, last=self.next_step is None)
        assert self._driver is not None
        return sample, self._driver.x0.to(sample.dtype)

    def _make(self, call: Call, own: bool = False) -> Any:
        """Make a network call now. own: of a turn; before the waves it shows what the network itself does."""
        network = call.network
        if not own or self.session is not None:  # code is compiled for waves alone
            network = self.replacements.get(network, network)  # type: ignore[call-overload]
        elif self.drive_reason is None:  # it is part of no wave
            return call()
        if self.settings.draws is not None:  # nothing is measured beside the calls of a user
            with self._without_draws():
                return call(network)
        wave = self.samples.wave
        with telemetry.span("network", "network", 1 if wave is None else len(wave.positions)):
            return call(network)

    def _without_draws(self) -> AbstractContextManager[object]:
        """Draws of our own are for the code of the loop, and for networks in training mode, which may drop out."""
        draws = self.settings.draws
        return nullcontext() if draws is None or self._networks_train else draws.paused()

    @cached_property
    def _networks_train(self) -> bool:
        return training(self.networks)

    # turns for the rows of waves

    def _script(self, first: Ran, options: dict[str, Any]) -> Script:
        assert self._driver is not None
        return self._driver.script(first, options)

    def _graph_network_calls(self, session: Session) -> None:
        """Replay the network calls of the loop's turns from graphs; those of new widths are recorded."""
        graphs, device, engine = self.settings.graphs, self.samples.state.device, session.run.engine
        if graphs is None:
            return
        graphed = graphs.network_calls(network_calls(self.networks, device, self.replacements), weigh=True)
        if isinstance(graphed, str):
            engine.reason = graphed
            graphs.refused(graphed)
            return
        self.samples.graphed = graphed
        self.replacements = {
            network: graphed.through(self.replacements.get(network, network), id(network)) for network in self.networks
        }
        engine.name = graphed.graphs.name
        engine.reason = f"the loop is driven: {self._why_turns}"

    @property
    def _why_turns(self) -> str | None:
        """Why the loop makes its own turns."""
        return self.drive_reason if self._driver is None or self._driver.reason is None else self._driver.reason

    def interrupt(self, sample: Tensor, dtype: torch.dtype) -> Tensor:
        """A callback ends the call early with this sample; returns it in the form that the loop expects."""
        self.samples.interrupt(sample)
        self._turns.end()
        telemetry.phase("decode")
        return sample.to(dtype)

    def go_on_from(self, step: int, x: Tensor, reason: str) -> Tensor:
        """A callback has changed something after a final step: drop all results beyond it.

        Continue from the state x, [batch, ...], one step at a time. reason: for the report. Returns x in the form that
        the loop expects.
        """
        assert self.session is not None
        assert self._driver is not None
        self.session.fall_back(reason)
        if step + 1 == len(self.timesteps):
            self.samples.stop(x)
            self._turns.end()
            return x
        self.samples.go_on_from(step, x)
        return self._turns.follow(self._driver.rest())

    @property
    def refused(self) -> bool:
        """Whether no call of this kind can leave its stock loop."""
        return self._driver is not None and self._driver.refused

    def restore_networks(self) -> None:
        """Give the networks back what they held before the loop: the stock loop follows."""
        if self._driver is not None:
            self._driver.restore_networks()

    def report(self, left_out: Sequence[str]) -> Report | None:
        """The report of the call until now; None before the first step. left_out: options that were not applied."""
        if self.session is None:
            return None
        taken_over = self.samples.network is not None
        if (
            self.settings.overlap == "streams"
            and self.run.engine.overlap == "batch"
            and has_two_lanes(self.run.program)
        ):
            why = "a graph of the network holds all rows of a wave" if taken_over else "the loop is driven"
            left_out = [*left_out, f"overlap='streams' was left out: {why}"]
        left_out = [*left_out, *(f"rows are called one by one: {reason}" for reason in self._merged.reasons())]
        if (rows := self._merged.too_wide) is not None:
            left_out = [*left_out, f"waves were evaluated in parts: {no_room(rows)}"]
        report = self.session.report(None if taken_over else self._why_turns, self.engine_reason, left_out)
        return replace(report, **self.beside_the_waves())

    def beside_the_waves(self) -> dict[str, Any]:
        """Fields of the report: what it took to find out how the loop and its networks work."""
        check = NO_CHECK if self._driver is None else self._driver.check
        return {
            "check_calls": check.calls,
            "check_seconds": check.seconds,
            "rehearsal_calls": self._placeholders.network_calls + self._merged.search_calls,
            "rehearsal_seconds": 0.0 if self._driver is None else self._driver.seconds,
        }

    def close(self) -> None:
        """End the call: keep the graphs that it has recorded, and how many rows fit into memory."""
        self._turns.close()
        pricing = None if self.session is None else self.session.pricing
        if self._merged.too_wide is not None and pricing is not None:
            pricing.known.experience.record_oom(self._merged.too_wide)
        if self.samples.graphed is not None and self.settings.graphs is not None:
            self.settings.graphs.finish(self.samples.graphed, self.run.engine)
