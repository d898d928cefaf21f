"""The session of one call of a pipeline: made at the loop's first step, and asked by callbacks and interrupts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ... import telemetry
from ...engine.distributed import call as distributed
from ...engine.graphs.loop_graph import LoopGraph
from ...engine.graphs.network_graphs import GraphedCalls
from ...engine.graphs.runner import GraphRunner
from ...engine.run import Observer, Run
from ...errors import UnsupportedPipeline
from ...kernels.wave_update import NetworkInput
from ...planner.search import Pricing
from ...sampling.planner import Planner
from ...sampling.recorded.network import RecordedNetwork
from ...sampling.rows import Generators, draw_noise, state_dtype
from ...sampling.session import Session
from ...sampling.trials import TimeStock
from ...schedulers.private_draws import PrivateDraws
from ...schedulers.table import NoiseTable
from ...solvers.contract import Checkpoint, Constrain, Evaluate, SolverInputs, Trajectory
from ...solvers.registry import check_warm_start
from ..kinds import KindOfLoop
from ..module_state import ModuleState, NetworkChanged
from ..networks import network_calls
from .constraint import Arrival
from .memory import LoopMemory


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
    networks: Sequence[nn.Module]  # those that the loop calls
    replacements: Mapping[nn.Module, Callable[..., Any]]  # maps a network to the callable to use instead
    generators: Sequence[torch.Generator]  # of the caller, that the loop may draw from
    memory: LoopMemory  # of earlier calls
    kind: KindOfLoop | None  # everything the loop depends on beyond its scheduler; None: remember nothing
    is_known: Callable[[], bool]  # whether its loop was rehearsed in full before, see `known_classes`
    engine_reason: str | None  # why it runs eagerly
    stock: TimeStock | None = None  # see `Session`
    audited: bool = False  # see `Session`
    draws: PrivateDraws | None = None  # what the loop draws without a generator; None: from the global ones
    draws_of_first: PrivateDraws | None = None  # the same where the call is one of several ranks: what rank 0 draws
    # gets modules called before the loop, with what they returned, for previews: the observer is shown x0 too then
    seen: list[tuple[Any, Any]] | None = None


def refuse_other_shapes(m: Tensor, x: Tensor, *, learned: bool) -> None:
    """Raise UnsupportedPipeline unless the first step's output and state have the same shape.

    learned: the output also holds a predicted variance, see `NoiseTable.learned`.
    """
    if m.shape != (x.shape if not learned else (len(x), 2 * x.shape[1], *x.shape[2:])):
        raise UnsupportedPipeline(
            f"The pipeline steps latents of shape {tuple(x.shape)} with an output of shape {tuple(m.shape)}. It is "
            "not known how the step uses the other channels. Run this call on the original pipeline."
        )


class LeaveWaves(BaseException):
    """A callback asks something of the loop, whose next turn ends with the answer.

    No `Exception`, as `cancellation.Left`: it is no fault of the waves.
    """


class Callback(Protocol):
    """What is told of the final steps, see `callbacks`."""

    def tell(self) -> None:
        """Tell it of the steps that have become final. Raises LeaveWaves."""

    def why_turns(self) -> str | None:
        """Why only turns of the loop can tell, as a clause, or None."""


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
        self.progress: Callable[[], None] = lambda: None  # shows the final steps on the pipe's progress bar
        self.callback: Callback | None = None
        self.told = 0  # final steps that it was told of
        self.wave: Evaluate | None = None  # the one that is run now
        self.network: RecordedNetwork | None = None  # in the waves of a takeover
        self.graphed: GraphedCalls | None = None  # the network calls of the loop's own turns, through graphs
        self._replays = True  # whether graphs still do what the networks do
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

    def graph_network_calls(self, why: str | None) -> None:
        """Replay the network calls of the loop's own turns from graphs. why: the loop makes its own turns."""
        settings, engine = self.settings, self.run.engine
        if settings.graphs is None:
            return
        calls = network_calls(settings.networks, self.state.device, settings.replacements)
        graphed = settings.graphs.network_calls(calls, weigh=True)
        if isinstance(graphed, str):
            engine.reason = graphed
            settings.graphs.refused(graphed)
            return
        self.graphed = graphed
        settings.replacements = {
            network: graphed.through(settings.replacements.get(network, network), id(network))
            for network in settings.networks
        }
        engine.name = graphed.graphs.name
        engine.reason = f"the pipeline's own loop runs for the rows: {why}"

    def change(self) -> NetworkChanged | None:
        """After a wave: what was changed in a network since rows were first evaluated by it, or None.

        This is seen at the end, before a callback is told of steps, and, where a hook might change a network, always.
        """
        held, calls_back = self.held, self.settings.calls_back
        assert held is not None
        hooked, told = held.foreign_hook is not None, calls_back and self.final_steps > self.told
        if self.in_order and (calls_back or not hooked):
            return None
        if not (self.wave is None or told or hooked) or (told and held.is_same()):
            return None
        part = held.changed(in_order=self.in_order)
        if told:  # what the networks hold as the callback is called
            self.held = ModuleState(self.settings.networks)
        return None if part is None else NetworkChanged(part, hooked)

    def end_replays(self) -> None:
        """A network holds something else now: its graphs do what it did before."""
        self._replays = False
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
        m = table.prediction_of(m, x)
        self._noise = table
        noise = self._steps = table.part(self.start, self.start + len(self.timesteps))
        self.state = distributed.of_first(x[:batch].to(state_dtype(x.dtype)))
        with self.settings.draws or nullcontext():
            draws = distributed.of_first(draw_noise(noise, m, self.state.dtype, generator, sample_dtype=x.dtype))
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
        # a turn is made at one step, and so are the calls that turns of different steps make differently
        inputs = replace(inputs, together=network is None or len(network.variants) > 1)
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
            previews=settings.seen is not None,
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

    def newest(self) -> Tensor:
        """The newest whole sample, [batch, ...]; before the first one, the state that has come furthest for certain.

        That is where the wave under way departs first: the stock loop would return such a state, too. A replay hands
        out no states before its first sample: there it is the starting noise.
        """
        run, wave = self.run, self.run.handed_out
        if run.newest is not None:
            return run.newest
        if wave is None or run.engine.name == LoopGraph.name:
            return self.state
        row = wave.positions.index(min(wave.positions))
        return wave.x[row] if self.network is None else self.network.state_of(wave, row)

    def interrupt(self, sample: Tensor) -> None:
        """End the run early with this sample."""
        assert self.session is not None
        self.session.interrupted = True
        iteration = max(self.run.shown, 0)
        self.stop(sample)
        if (observer := self.settings.observer) is not None:
            found = Checkpoint(iteration, sample, tuple(range(len(sample))), None, exact=False)
            observer(found.copied(final=True))

    def stop(self, sample: Tensor) -> None:
        """End the run with this sample."""
        self.run.stop(sample)
        self.wave = None

    def go_on_from(self, step: int, x: Tensor, why: str) -> None:
        """Drop all results beyond a final step; continue from the state x, [batch, ...], one step at a time.

        why: as a clause.
        """
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
        if self.network is not None:
            self.network = None  # the loop makes turns now
            if self._replays:
                self.graph_network_calls(why)

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
