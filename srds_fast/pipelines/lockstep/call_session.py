"""The session of one call of a pipeline: made at the loop's first step, and asked by callbacks and interrupts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import telemetry
from ...engine.graphs.loop_graph import LoopGraph
from ...engine.graphs.network_graphs import GraphedCalls
from ...engine.graphs.runner import GraphRunner
from ...engine.run import Observer, Run
from ...errors import UnsupportedPipeline
from ...kernels.wave_update import NetworkInput
from ...planner.search import Pricing
from ...sampling.planner import Planner
from ...sampling.rows import Generators, draw_noise, state_dtype
from ...sampling.session import Session
from ...sampling.trials import TimeStock
from ...schedulers.private_draws import PrivateDraws
from ...schedulers.table import NoiseTable
from ...solvers.contract import Constrain, Evaluate, SolverInputs, Trajectory
from ...solvers.registry import check_warm_start
from ..module_state import ModuleState
from ..takeover.network import RecordedNetwork
from .constraint import Arrival


@dataclass
class CallSettings:
    """What is asked of one call."""

    planner: Planner
    observer: Observer | None
    graphs: GraphRunner | None  # a recorded turn uses all of them, turns for rows network graphs. None: eager
    overlap: str
    keep_states: bool
    calls_back: bool  # a callback is told of every step, with its state: `keep_states` is set, too
    initial_guess: Tensor | None  # [steps + 1, batch, ...], initial states; None: the method's own initial guess
    notify: Callable[[str], None]  # called with the reason why the rest of the call runs step by step; may raise
    plan_only: bool  # choose the plan but run no waves: the loop gets its starting noise as the result
    strict: bool  # see `Session`
    stock: TimeStock | None = None  # see `Session`
    audited: bool = False  # see `Session`
    draws: PrivateDraws | None = None  # what the loop draws without a generator; None: from the global ones
    interrupted: Callable[[], bool] = lambda: False  # asked before every wave; True ends the call early


def refuse_other_shapes(m: Tensor, x: Tensor) -> None:
    """Raise UnsupportedPipeline unless the first step's output and state have the same shape."""
    if m.shape != x.shape:
        raise UnsupportedPipeline(
            f"The pipeline steps latents of shape {tuple(x.shape)} with an output of shape {tuple(m.shape)}. It is "
            "not known how the step uses the other channels. Run this call on the original pipeline."
        )


class CallSession:
    """The session of one call. `session` is None until the loop's first step has been made.

    timesteps: of the loop's steps. start: the step of the scheduler's grid that it begins with. offset: steps that
    are done, of a run that continues another one. arrivals: what the loop does to states, by position from 1.
    started: when the first network call began.
    """

    def __init__(self, settings: CallSettings) -> None:
        self.settings = settings
        self.session: Session | None = None
        self.timesteps = torch.empty(0, device="cpu")
        self.start = self.offset = 0
        self.arrivals: list[Arrival] = []
        self.started: float | None = None
        self.held: ModuleState | None = None  # by the networks, when all rows so far were evaluated by them
        self.told = 0  # final steps that a callback was told of
        self.wave: Evaluate | None = None  # the one that is run now
        self.network: RecordedNetwork | None = None  # in a takeover
        self.graphed: GraphedCalls | None = None  # the network calls of the loop's own turns, through graphs
        self.state: Tensor  # starting noise, [batch, ...], in the dtype of the state
        self._noise: NoiseTable  # of the scheduler's grid
        self._steps: NoiseTable  # of the loop
        self._trajectory: Trajectory | None = None

    @property
    def run(self) -> Run:
        """The current run; only after the first step."""
        assert self.session is not None
        return self.session.run

    @property
    def in_order(self) -> bool:
        """Each step is evaluated after the one before has settled, as in the stock loop, and by the network itself."""
        ended = self.graphed is not None and self.graphed.ended is not None
        return self.run.plan.is_sequential and (ended or self.run.engine.name == "eager")

    def end_replays(self) -> None:
        """A network holds something else now: its graphs do what it did before."""
        if self.graphed is not None:
            self.graphed.end_as_changed()

    @property
    def final_steps(self) -> int:
        """Number of steps whose states no later wave changes."""
        return 0 if self.session is None else self.offset + self.run.final_steps

    def begin(
        self, table: NoiseTable, generator: Generators, m: Tensor, x: Tensor, batch: int
    ) -> tuple[NoiseTable, SolverInputs]:
        """Take the first step's output and state, [copies * batch, ...]; returns noise and inputs of the loop's steps.

        Noise is drawn for all copies of the batch, as the stock step does; the sample uses the first.
        """
        refuse_other_shapes(m, x)
        self._noise = table
        noise = self._steps = table.part(self.start, self.start + len(self.timesteps))
        self.state = x[:batch].to(state_dtype(x.dtype))
        with self.settings.draws or nullcontext():
            draws = draw_noise(noise, m, self.state.dtype, generator, sample_dtype=x.dtype)
        if (guess := self.settings.initial_guess) is not None:
            check_warm_start(guess, (noise.num_steps + 1, *self.state.shape))
        telemetry.phase("plan")
        return noise, self._inputs(None if draws is None else draws[:, :batch], x.dtype, noise.num_steps)

    def x0(self, m: Tensor) -> Tensor:
        """The predicted x0 of the first step, [batch, ...]."""
        return self._noise.predict_x0(self.start, self.state, m.to(self.state.dtype))

    def make(
        self,
        noise: NoiseTable,
        inputs: SolverInputs,
        network: RecordedNetwork | None = None,
        pricing: Pricing | None = None,
    ) -> Session:
        """Make the session.

        network: of a takeover; None: the loop makes turns for rows. pricing: what these cost; None: it is not known.
        """
        settings, self.network = self.settings, network
        self.session = Session(
            settings.planner if network is not None else settings.planner.without_trials(),
            self.state,
            noise,
            inputs,
            "drive" if network is None else "takeover",
            network,
            settings.graphs,
            settings.observer,
            self.started,
            settings.notify,
            stock=settings.stock,
            audited=settings.audited,
            strict=settings.strict,
            together=network is None,
            pricing=pricing,
        )
        return self.session

    def states(self) -> Tensor | None:
        """All states of a finished run, [steps + 1, batch, ...]; None if some were not kept or not computed."""
        if self.session is None or self._trajectory is None or self.run.sample is None or self.offset:
            return None
        return self._trajectory.stacked(self.state, self.run.sample)

    def state_after(self, step: int) -> Tensor:
        """The state after a final step, [batch, ...]; only with keep_states."""
        assert self._trajectory is not None
        state = self._trajectory.x[step + 1 - self.offset]
        assert state is not None, "a final step has been computed"
        return state

    def newest(self) -> Tensor | None:
        """The newest whole sample, [batch, ...]; in an eager sequential run, the current state."""
        run = self.run
        if run.newest is not None or not run.plan.is_sequential or self.wave is None:
            return run.newest
        if self.network is None:
            return self.wave.x[0]
        # a replay hands out no states between checkpoints
        return self.network.state_of(self.wave) if run.engine.name != LoopGraph.name else None

    def was_interrupted(self) -> bool:
        """End the run early with the newest whole sample, if the user asks for that."""
        if not self.settings.interrupted() or (newest := self.newest()) is None:
            return False
        self.interrupt(newest)
        return True

    def interrupt(self, sample: Tensor) -> None:
        """End the run early with this sample."""
        assert self.session is not None
        self.session.interrupted = True
        self.stop(sample)

    def stop(self, sample: Tensor) -> None:
        """End the run with this sample."""
        self.run.stop(sample)
        self.wave = None

    def go_on_from(self, step: int, x: Tensor) -> None:
        """Drop all results beyond a final step; continue from the state x, [batch, ...], one step at a time."""
        assert self.session is not None
        assert self._trajectory is not None
        carried, before = self._trajectory.carried[step + 1 - self.offset], self.state_after(step)
        self.offset, self.state = step + 1, x.to(state_dtype(x.dtype))
        rest = self._steps.part(self.offset, len(self.timesteps), afresh=False)
        draws = self.session.inputs.draws
        draws = None if draws is None else draws[len(draws) - rest.num_steps :]
        carried = None if carried is None else carried.transpose(0, 1)
        if carried is not None and rest.recovered is not None and rest.momentum is not None and rest.recovered[0]:
            # the step takes x_{i-1} from x as it was before the callback
            carried = carried - rest.recovered[0] / rest.momentum[0] * (before - self.state)
        self.session.go_on_from(self.state, rest, self._inputs(draws, x.dtype, rest.num_steps, carried))

    def _inputs(
        self, draws: Tensor | None, dtype: torch.dtype, num_steps: int, carried: Tensor | None = None
    ) -> SolverInputs:
        constrain: Constrain | None = None
        if self.arrivals:

            def constrain(x: Tensor, position: int, samples: tuple[int, ...]) -> Tensor:
                return self.arrivals[self.offset + position - 1].apply(x)

        self._trajectory = Trajectory(num_steps) if self.settings.keep_states else None
        guess = self.settings.initial_guess
        return SolverInputs(draws, constrain, self._trajectory, carried, NetworkInput(dtype), initial_guess=guess)
