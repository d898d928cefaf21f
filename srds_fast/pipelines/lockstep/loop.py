"""Lockstep: a pipeline's own loop turns once per wave, driven from its scheduler.

A call runs on a shallow copy of the pipe, in which proxies replace the scheduler and the networks. The loop then turns
once per wave instead of once per step. The scheduler proxy's `step` takes the guided outputs of all rows, gives them to
the solver core and returns the next rows as "latents". The network proxies give each row its own timestep and repeat
the conditioning. Prompt encoding, guidance and decoding are the pipe's own code. No object of the user is changed.

With a `RecordedTurn` the loop turns only once: its network calls are recorded, and the session repeats them for the
rows of all waves. If the guidance in that turn is not linear, the loop turns once per wave instead.

The order of rows in the batch is (copy or guidance branch, row, sample).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import telemetry
from ...engine.graphs.loop_graph import LoopGraph
from ...engine.graphs.network_graphs import GraphedCalls
from ...engine.graphs.runner import GraphRunner
from ...engine.run import Observer, Run
from ...engine.streams import has_two_lanes
from ...errors import UnsupportedPipeline
from ...kernels.wave_update import NetworkInput
from ...sampling.rows import draw_noise, state_dtype
from ...sampling.session import Planner, Session
from ...sampling.trials import TimeStock
from ...schedulers.table import NoiseTable
from ...solvers.contract import Evaluate, SolverInputs, Trajectory
from ...solvers.registry import check_warm_start
from ...telemetry.report import Report
from ..network_rows import RowInputs
from ..networks import Loop, NetworkCall, check_time
from ..takeover.network import RecordedNetwork, network_calls
from ..takeover.turn import RecordedTurn
from .inpaint import Inpainting
from .proxies import RowStates, SchedulerProxy, copy_scheduler


@dataclass(eq=False)
class LockstepLoop:
    """State of one call: the session, and the current wave of the pipeline's loop."""

    original_scheduler: InitVar[Any]  # it is copied
    loop: Loop
    planner: Planner
    networks: Sequence[nn.Module]
    observer: Observer | None
    turn: RecordedTurn | None  # records the first turn for takeover; None: the loop turns once per wave
    drive_reason: str | None  # why it turns once per wave
    graphs: GraphRunner | None  # a recorded turn uses all of them, a driven loop network graphs. None: eager
    engine_reason: str | None  # why it runs eagerly
    overlap: str
    keep_states: bool
    initial_guess: Tensor | None  # [steps + 1, batch, ...], initial states; None: the method's own initial guess
    notify: Callable[[str], None]  # called with the reason why the rest of the call runs step by step; may raise
    replacements: Mapping[nn.Module, Callable[..., Any]]  # maps a network to the callable to use instead
    plan_only: bool  # choose the plan but run no waves: the loop gets its starting noise as the result
    strict: bool  # see `Session`
    stock: TimeStock | None = None  # see `Session`
    audited: bool = False  # see `Session`

    def __post_init__(self, original_scheduler: Any) -> None:
        self.scheduler = SchedulerProxy(copy_scheduler(original_scheduler), self)
        self.interrupted: Callable[[], bool] = lambda: False  # called before every wave; True ends the call early
        self.inpainting: Inpainting | None = None
        self.session: Session | None = None  # until the first step
        self.timesteps = torch.empty(0)  # of the steps in the loop
        self.steps = 0
        self.progress: Callable[[], None] = lambda: None  # shows the final steps on the pipe's progress bar
        self._start = self._calls = 0
        self._started: float | None = None
        self._wave: Evaluate | None = None
        self._handed: Tensor | None = None
        self._graphed: GraphedCalls | None = None
        # set at the first step
        self._network: RecordedNetwork | None = None
        self._noise: NoiseTable  # of the scheduler's grid
        self._steps: NoiseTable  # of the loop
        self._state: Tensor
        self._trajectory: Trajectory | None
        self._rows: RowInputs | None = None  # of a driven loop
        self._offset = 0

    @property
    def run(self) -> Run:
        """The current run; only after the first step."""
        assert self.session is not None
        return self.session.run

    @property
    def finished(self) -> bool:
        """Whether the samples are there."""
        return self.session is not None and self.run.sample is not None

    @property
    def final_steps(self) -> int:
        """Number of steps whose states no later wave changes."""
        return 0 if self.session is None else self._offset + self.run.final_steps

    def enter(self, start: int, timesteps: Tensor) -> None:
        """A loop over the timesteps begins, at step `start` of the scheduler's grid. It may only read them."""
        if self.steps == 0:
            telemetry.phase("trace")
            self._start, self.timesteps = start, timesteps

    def states(self) -> Tensor | None:
        """All states of a finished run, [steps + 1, batch, ...]; None if some were not kept or not computed."""
        if self.session is None or self._trajectory is None or self.run.sample is None or self._offset:
            return None
        return self._trajectory.stacked(self._state, self.run.sample)

    def state_after(self, step: int) -> Tensor:
        """The state after a final step, [batch, ...]; only with keep_states."""
        assert self._trajectory is not None
        state = self._trajectory.x[step + 1 - self._offset]
        assert state is not None, "a final step has been computed"
        return state

    def step(self, m: Tensor, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        """Take the guided output of a wave; return the states of the next wave, or the samples: [rows * samples, ...].

        A second entry is the predicted x0, which a loop with a single step may read.
        """
        if self.timesteps.numel() == 0:
            raise _not_driven("The pipeline steps its scheduler outside a loop over the timesteps")
        self.steps += 1
        if self._calls == 0:
            raise _not_driven("The pipeline stepped its scheduler twice with one call of its network")
        self._calls = 0
        if self.session is None:
            return self._first_step(m, x, options)
        if self._handed is not None and x is not self._handed:
            raise _not_driven("The pipeline changes its latents between two scheduler steps")
        return (self._next(self.session, m, x.dtype),)

    def _first_step(self, m: Tensor, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        session = self._begin(m, x, options)
        if self.plan_only:
            if self._network is not None and len(self.timesteps) > 1:
                session.price()
            return (self._end(self._state, x.dtype),) * 2
        if self._network is not None:
            return self._run_all_waves(session, self._network, x.dtype)
        self._wave = session.next(None)
        assert self._wave is not None
        if self.turn is not None and self.turn.calls:  # the recorded turn was answered with probes
            return (self._hand_out(x.dtype),)
        if len(self._wave.positions) > 1:  # the turn that has just ended is not the first wave, but one more
            session.run.counts.add(1, len(self._state))
            return (self._hand_out(x.dtype),)
        if len(self.timesteps) > 1:
            return (self._next(session, m, x.dtype),)
        x0 = self._noise.predict_x0(self._start, self._state, m[: len(self._state)].to(self._state.dtype))
        return self._next(session, m, x.dtype), x0.to(x.dtype)

    def _next(self, session: Session, m: Tensor, dtype: torch.dtype) -> Tensor:
        """Give the run the output of the current wave; return the next rows, or the samples."""
        run, wave = session.run, self._wave
        assert wave is not None
        run.received()
        if self.interrupted() and (newest := self.newest()) is not None:
            return self.interrupt(newest, dtype)
        if self.loop.copies > 1:
            m = m[: len(m) // self.loop.copies]
        self._wave = session.next(m.view_as(wave.x))
        if session.run is not run:  # restarted step by step
            self._make_rows()
        return self._hand_out(dtype)

    def _run_all_waves(self, session: Session, network: RecordedNetwork, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Run all waves of a recorded turn; return the samples."""
        x0: list[Tensor] = []

        def advance(run: Run, evaluate: Callable[[Evaluate], Tensor]) -> None:
            self._wave = run.next(None)
            while self._wave is not None:
                m = evaluate(self._wave)
                if len(self.timesteps) == 1:
                    x0[:] = [network.x0_of(self._wave, m).to(dtype)]
                run.received()
                if self.interrupted() and (newest := self.newest()) is not None:
                    self.interrupt(newest, dtype)
                    return
                self._wave = run.next(m)
                self.progress()

        session.complete(advance)
        return (self._hand_out(dtype), *x0)

    def newest(self) -> Tensor | None:
        """The newest whole sample, [batch, ...]; in an eager sequential run, the current state."""
        run = self.run
        if run.newest is not None or not run.plan.is_sequential or self._wave is None:
            return run.newest
        if self._network is None:
            return self._wave.x[0]
        # a replay hands out no states between checkpoints
        return self._network.state_of(self._wave) if run.engine.name != LoopGraph.name else None

    def interrupt(self, sample: Tensor, dtype: torch.dtype) -> Tensor:
        """End the call early with this sample; return it in the form that the loop expects."""
        assert self.session is not None
        self.session.interrupted = True
        return self._end(sample, dtype)

    def _end(self, sample: Tensor, dtype: torch.dtype) -> Tensor:
        self.run.stop(sample)
        self._wave = None
        return self._hand_out(dtype)

    def go_on_from(self, step: int, x: Tensor, reason: str) -> Tensor:
        """Drop all results beyond a final step; continue from the state x, [batch, ...], one step at a time.

        reason: for the report. Returns x in the form that the loop expects.
        """
        assert self.session is not None
        self.session.fall_back(reason)
        done = step + 1
        state = x.to(state_dtype(x.dtype))
        if done == len(self.timesteps):
            return self._end(state, x.dtype)
        carried = self._trajectory.carried[done - self._offset] if self._trajectory is not None else None
        self._offset, self._state = done, state
        rest = self._steps.part(done, len(self.timesteps), afresh=False)
        draws = self.session.inputs.draws
        draws = None if draws is None else draws[done:]
        carried = None if carried is None else carried.transpose(0, 1)
        self.session.go_on_from(state, rest, self._inputs(draws, x.dtype, rest.num_steps, carried))
        # new arguments: a callback may have changed the conditioning in place
        self._make_rows()
        self._wave = self.run.next(None)
        return self._hand_out(x.dtype)

    def scale(self, x: Tensor, timestep: Any) -> Tensor:
        """The states of the wave times their input scale, for all guidance branches."""
        if self.turn is not None:
            self.turn.scaled = True
        if self._wave is None or self._rows is None:
            return self.scheduler.inner.scale_model_input(x, timestep)  # type: ignore[no-any-return]
        scaled = self._rows.scale(self._wave, x)
        return RowStates.of(scaled, self) if isinstance(x, RowStates) and scaled is not x else scaled

    def for_rows(self, conditioning: Tensor, states: Tensor) -> Tensor:
        """Conditioning with an entry per branch and sample, repeated for the rows of `states`."""
        assert self._wave is not None
        assert self._rows is not None
        branches = len(states) // (len(self._wave.positions) * len(self._wave.samples))
        return self._rows.repeated(self._wave, "joined to the states", conditioning, branches)

    def call(self, call: NetworkCall) -> Any:
        """Make a call of the pipeline's loop with a timestep per row and repeated conditioning."""
        self._calls += 1
        if self._wave is not None and self._rows is not None:
            with telemetry.span("network", "network", len(self._wave.positions)):
                return self._rows.call(self._wave, call)
        if self._started is None:
            self._started = time.perf_counter()
        if self.turn is not None and self.session is None and (probe := self.turn.record(call)) is not None:
            return probe
        # the first wave is the starting noise alone: a plain call
        if not self.loop.checked:
            check_time(self.timesteps, call)
        with telemetry.span("network", "network", 1):
            return call.through(self.replacements.get(call.network, call.network), call.arguments)

    def _begin(self, m: Tensor, x: Tensor, options: dict[str, Any]) -> Session:
        """Make the session at the first step, when the number of steps, the noise and the samples are known."""
        turn, num_samples = self.turn, len(x) // self.loop.copies
        if m.shape != x.shape:
            raise UnsupportedPipeline(
                f"The pipeline steps latents of shape {tuple(x.shape)} with an output of shape {tuple(m.shape)}. It is "
                "not known how the step uses the other channels. Run this call on the original pipeline."
            )
        if turn is not None:
            if turn.calls:
                turn.drive_reason = turn.read_guidance(m[:num_samples], x[:num_samples])
                m = m.to(turn.calls[0].states.dtype)  # noise is drawn in the dtype of the network's output
            self.drive_reason = turn.drive_reason
        self._noise, generator = self.scheduler.table_and_generator(options)
        if self.loop.copies > 1 and bool((self._noise.input_scale != 1).any()):
            raise UnsupportedPipeline(
                f"The pipeline's loop overwrites its latents with what {type(self.scheduler.inner).__name__} scales "
                "for the network. They are not the scheduler's own. Use a scheduler that does not scale: DDIMScheduler."
            )
        noise = self._steps = self._noise.part(self._start, self._start + len(self.timesteps))
        self._state = state = x[:num_samples].to(state_dtype(x.dtype))
        # drawn for all copies, as in the stock step; the sample uses the first
        draws = draw_noise(noise, m, state.dtype, generator)
        draws = None if draws is None else draws[:, :num_samples]
        inputs = self._inputs(draws, x.dtype, noise.num_steps)
        if self.initial_guess is not None:
            check_warm_start(self.initial_guess, (noise.num_steps + 1, *state.shape))
        if turn is not None and turn.weights is not None:
            inputs = turn.inputs(inputs, num_samples)
            self._network = RecordedNetwork(turn, state, noise, inputs, self.replacements, self.overlap)
        telemetry.phase("plan")
        network, path = self._network, "drive" if self._network is None else "takeover"
        session = Session(
            self.planner,
            state,
            noise,
            inputs,
            path,
            network,
            self.graphs,
            self.observer,
            self._started,
            self.notify,
            stock=self.stock,
            audited=self.audited,
            strict=self.strict,
        )
        plan = session.plan
        few_turns = plan.is_sequential or (plan.options.fits_turns and plan.max_rows is None)
        if network is None and self.loop.counts and not few_turns:
            raise UnsupportedPipeline(
                "The pipeline's loop looks up its list of steps by turn, and this plan may take more turns than steps. "
                "Use method='srds' with pipelined=True, and neither in_flight nor max_rows."
            )
        self.session = session
        if network is None:
            if self.graphs is not None:
                self._graph_network_calls(self.graphs, session.run)
            self._make_rows()
        return session

    def _graph_network_calls(self, graphs: GraphRunner, run: Run) -> None:
        """Replay the network calls of the loop's turns from graphs; those of new widths are recorded."""
        graphed = graphs.network_calls(network_calls(self.networks, self._state.device, self.replacements), weigh=True)
        if isinstance(graphed, str):
            run.engine.reason = graphed
            graphs.refused(graphed)
            return
        self._graphed = graphed
        self.replacements = {
            network: graphed.through(self.replacements.get(network, network), id(network)) for network in self.networks
        }
        run.engine.name = graphed.graphs.name
        run.engine.reason = f"the loop is driven: {self.drive_reason}"

    def report(self, left_out: Sequence[str]) -> Report | None:
        """The report of the call until now; None before the first step. left_out: options that were not applied."""
        if self.session is None:
            return None
        if self.overlap == "streams" and self.run.engine.overlap == "batch" and has_two_lanes(self.run.program):
            why = "the loop is driven" if self._network is None else "a graph of the network holds all rows of a wave"
            left_out = [*left_out, f"overlap='streams' was left out: {why}"]
        return self.session.report(self.drive_reason, self.engine_reason, left_out)

    def close(self) -> None:
        """End the call: keep the graphs that it has recorded."""
        if self._graphed is not None and self.graphs is not None:
            self.graphs.finish(self._graphed, self.run.engine)

    def _make_rows(self) -> None:
        """Make the arguments of the run's network calls anew."""
        noise = self._steps.part(self._offset, len(self.timesteps), afresh=not self._offset)
        self._rows = RowInputs(self.run.program, noise, self._state, self.replacements)

    def _inputs(
        self, draws: Tensor | None, dtype: torch.dtype, num_steps: int, carried: Tensor | None = None
    ) -> SolverInputs:
        constrain = None
        if self.inpainting is not None and self.inpainting.mask is not None:
            inpainting, noise, first = self.inpainting, self._noise, self._start + self._offset
            last = self._start + len(self.timesteps)

            def constrain(x: Tensor, position: int, samples: tuple[int, ...]) -> Tensor:
                return inpainting.blend(x, first + position, samples, noise, last)

        self._trajectory = Trajectory(num_steps) if self.keep_states else None
        return SolverInputs(
            draws, constrain, self._trajectory, carried, NetworkInput(dtype), initial_guess=self.initial_guess
        )

    def _hand_out(self, dtype: torch.dtype) -> Tensor:
        """The next rows, or the samples, in the form that the loop expects."""
        if self._wave is None:
            assert self.run.sample is not None
            telemetry.phase("decode")
            if self._rows is not None:
                self._rows.forget()
            states = self.run.sample.to(dtype)
        else:
            states = self._wave.x.flatten(0, 1)
        if self.loop.copies > 1:
            states = torch.cat([states] * self.loop.copies)
        elif self.loop.joins and self._wave is not None:
            states = RowStates.of(states, self)
        # if the loop itself makes new states, they cannot be compared with these
        self._handed = None if self.loop.copies > 1 or self.loop.blends else states
        return states


def _not_driven(what: str) -> UnsupportedPipeline:
    return UnsupportedPipeline(f"{what}. Such a loop cannot be driven. Run this call on the original pipeline.")
