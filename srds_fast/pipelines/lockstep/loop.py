"""Lockstep: a pipeline's own loop, driven from its scheduler.

A call runs on a shallow copy of the pipe in which scheduler and networks are stand-ins. The loop then turns once per
wave instead of once per step: the scheduler's `step` takes the guided outputs of all rows, hands them to the solver
core and returns the next rows as "latents"; the networks give each row its own timestep and repeat the conditioning.
Prompt encoding, guidance and decoding are the pipe's own code, and nothing the user holds is changed.

Rows lie in the batch as (copy or guidance branch, row, sample).
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ... import telemetry
from ...engine.run import Observer, Run, step_by_step
from ...errors import DivergenceError, UnsupportedPipeline, UnsupportedScheduler
from ...kernels.wave_update import NetworkInput
from ...planner.choose import choose
from ...planner.context import context_of
from ...planner.plan import Plan
from ...planner.search import PlanFor, Pricing
from ...planner.settings import Settings
from ...sampling.rows import draw_noise, state_dtype
from ...schedulers.table import NoiseTable
from ...schedulers.verify import noise_table
from ...solvers.contract import Evaluate, Extras, Trajectory
from ...solvers.method import check_warm_start
from ..loop import Loop
from ..network_rows import RowInputs
from ..networks import Network, network_family
from .inpaint import Inpainting
from .proxies import DrivenNetwork, DrivenScheduler, RowStates, driven_progress

__all__ = ["Drive", "Loop", "driven_copy", "network_family"]


class Drive:
    """State of one driven call: the run, and the wave the loop is in.

    Args:
        scheduler: the pipe's scheduler; a copy of it is driven.
        loop: what is known of the pipeline's loop.
        plan_for: gives the plan, from the number of steps, whether they add noise, and what tells the costs of this
            call (None: they cannot be measured before it has begun).
        observer: sees every checkpoint.
        keep_states: keep the states of all steps, for callbacks.
        interrupted: asked before every wave whether to stop early.
        stepwise: told why, when a callback makes the rest of the call run step by step; may raise.
        instead: what is called in the place of a network.

    Attributes:
        progress: shows the steps that are final by now on the pipe's progress bar.
    """

    def __init__(
        self,
        scheduler: Any,
        loop: Loop,
        plan_for: PlanFor,
        observer: Observer | None = None,
        *,
        keep_states: bool = False,
        guess: Tensor | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        stepwise: Callable[[str], None] = lambda reason: None,
        instead: Mapping[nn.Module, Callable[..., Any]] = MappingProxyType({}),
    ) -> None:
        self._instead = instead
        self.scheduler = DrivenScheduler(_copy(scheduler), self)
        self.inpainting: Inpainting | None = None
        self.run: Run | None = None
        self.timesteps: Tensor | None = None
        self.steps = 0
        self.finished = False
        self.progress: Callable[[], None] = lambda: None
        self._loop = loop
        self._plan_for = plan_for
        self._observer = observer
        self._keep_states = keep_states
        self._guess = guess
        self._interrupted = interrupted
        self._stepwise = stepwise
        self._start = 0
        self._offset = 0
        self._trajectory: Trajectory | None = None
        self._noise: NoiseTable | None = None
        self._draws: Tensor | None = None
        self._rows: RowInputs | None = None
        self._parts: tuple[Plan, Tensor, NoiseTable, Extras] | None = None
        self._make_run: Callable[..., Run] | None = None
        self._wave: Evaluate | None = None
        self._handed: Tensor | None = None
        self._num_samples = 0
        self._calls = 0
        self._started: float | None = None

    @property
    def num_steps(self) -> int:
        """Steps the loop walks: all of the scheduler's, or a part."""
        assert self.timesteps is not None
        return len(self.timesteps)

    @property
    def final_steps(self) -> int:
        """Steps that no later wave changes."""
        return 0 if self.run is None else self._offset + self.run.final_steps

    def enter(self, start: int, timesteps: Tensor) -> None:
        """The loop begins, or someone reads the timesteps: from step `start` of the scheduler's grid on."""
        if self.steps == 0:
            telemetry.phase("trace")
            self._start, self.timesteps = start, timesteps

    def states(self) -> Tensor | None:
        """All states of a finished run, [steps + 1, batch, ...]; None where some were not kept, or not come to."""
        if self._trajectory is None or self.run is None or self.run.sample is None or self._offset:
            return None
        assert self._parts is not None
        return self._trajectory.stacked(self._parts[1], self.run.sample)

    def state_after(self, step: int) -> Tensor:
        """The state that a final step led to, [batch, ...]; only with keep_states."""
        assert self._trajectory is not None
        state = self._trajectory.x[step + 1 - self._offset]
        assert state is not None, "a final step has been computed"
        return state

    def step(self, m: Tensor, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        """Take the guided output of a wave, return the states of the next, or the samples: [rows * samples, ...].

        The second entry, where there is one, is the predicted x0: a loop of a single step may ask for it.
        """
        if self.timesteps is None:
            raise UnsupportedPipeline(
                "The pipeline steps its scheduler outside a loop over the timesteps. Such a loop cannot be driven. "
                "Run this call on the original pipeline."
            )
        self.steps += 1
        if self._calls == 0:
            raise UnsupportedPipeline(
                "The pipeline stepped its scheduler twice with one call of its network. Such a loop cannot be driven. "
                "Run this call on the original pipeline."
            )
        self._calls = 0
        x0: tuple[Tensor, ...] = ()
        if self.run is None:
            x0 = self._begin(m, x, options)
            assert self.run is not None
            self._wave = self.run.next(None)
            assert self._wave is not None
            if len(self._wave.positions) > 1:  # the turn that has just been made is not the first wave
                self.run.report.waves, self.run.report.rows = 2, 1 + len(self._wave.positions)
                self.run.report.evaluations += self._num_samples
                return (self._hand_out(x.dtype), *x0)
        elif self._handed is not None and x is not self._handed:
            raise UnsupportedPipeline(
                "The pipeline changes its latents between two scheduler steps. Such a loop cannot be driven. "
                "Run this call on the original pipeline."
            )
        assert self.run is not None
        assert self._wave is not None
        self.run.received()
        if self._interrupted() and (newest := self.newest()) is not None:
            return (self.interrupt(newest, x.dtype), *x0)
        if self._loop.copies > 1:
            m = m[: len(m) // self._loop.copies]
        try:
            self._wave = self.run.next(m.view_as(self._wave.x))
        except DivergenceError as error:
            self._step_by_step(error)
            self._wave = self.run.next(None)
        return (self._hand_out(x.dtype), *x0)

    @property
    def _turns_with_waves(self) -> bool:
        """Whether the pipeline's loop turns once a wave."""
        return True

    def _step_by_step(self, error: DivergenceError) -> None:
        """Begin again, one step after another, where a method that was chosen for the user did not settle."""
        assert self.run is not None
        if self.run.plan.prediction is None or self.run.plan.method == "sequential":
            raise error
        try:
            self._take_steps(error.what)
        except UnsupportedPipeline:  # strict: the error itself says more
            raise error from None

    def _take_steps(self, why: str) -> None:
        """Begin again, one step after another. why: in words."""
        assert self.run is not None
        assert self._parts is not None
        _, state, noise, extras = self._parts
        self.run = step_by_step(self.run.report, why, state, noise, extras, self._observer)
        self._rows = RowInputs(self.run.program, noise, state, instead=self._instead)
        reason = self.run.report.fallback_reason
        assert reason is not None
        self._stepwise(reason)

    def newest(self) -> Tensor | None:
        """The newest whole sample, [batch, ...]; of a sequential run, where it stands."""
        assert self.run is not None
        if self.run.newest is None and self.run.plan.method == "sequential" and self._wave is not None:
            return self._wave.x[0]
        return self.run.newest

    def interrupt(self, sample: Tensor, dtype: torch.dtype) -> Tensor:
        """End the call early with this sample; returns it as the loop carries it."""
        assert self.run is not None
        self.run.report.interrupted = True
        return self._end(sample, dtype)

    def _end(self, sample: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.run is not None
        self.run.stop(sample)
        self._wave = None
        telemetry.phase("decode")
        return self._hand_out(dtype)

    def go_on_from(self, step: int, x: Tensor, reason: str) -> Tensor:
        """Drop what was computed beyond a final step and go on from `x` one step at a time.

        Args:
            step: the last step that stays.
            x: the state after it, [batch, ...], in the dtype of the pipe.
            reason: for the report.

        Returns:
            x, as the loop carries it from here.
        """
        assert self.run is not None
        assert self._noise is not None
        report = self.run.report
        if report.fallback_reason is None:
            report.fallback_reason = reason
            self._stepwise(reason)
        done = step + 1
        if done == self.num_steps:
            return self._end(x.to(state_dtype(x.dtype)), x.dtype)
        self.run.leave()
        x0_prev = self._trajectory.x0[step - self._offset] if self._trajectory is not None else None
        self._offset = done
        rest = self._noise.part(self._start + done, self._start + self.num_steps, afresh=False)
        state = x.to(state_dtype(x.dtype))
        self._num_samples = len(x)
        plan = choose(rest.num_steps, Settings(method="sequential"))
        draws = None if self._draws is None else self._draws[done:]
        self.run = Run(plan, state, rest, "drive", self._extras(draws, x.dtype, rest.num_steps, x0_prev), report=report)
        # anew: a callback may have changed what conditioning was made from, in place
        self._rows = RowInputs(self.run.program, rest, state, instead=self._instead)
        self._wave = self.run.next(None)
        self.finished = False
        return self._hand_out(x.dtype)

    def scale(self, x: Tensor, timestep: Any) -> Tensor:
        """The states of the wave times their input scale, for all guidance branches."""
        if self._wave is None:
            return self.scheduler.inner.scale_model_input(x, timestep)  # type: ignore[no-any-return]
        assert self._rows is not None
        scaled = self._rows.scale(self._wave, x)
        return RowStates.of(scaled, self) if isinstance(x, RowStates) and scaled is not x else scaled

    def for_rows(self, conditioning: Tensor, states: Tensor) -> Tensor:
        """Conditioning with an entry per branch and sample, repeated for the rows of `states`."""
        assert self._wave is not None
        assert self._rows is not None
        branches = len(states) // (len(self._wave.positions) * len(self._wave.samples))
        return self._rows.repeated(self._wave, "joined to the states", conditioning, branches)

    def call(
        self, network: nn.Module, family: Network, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a network with per-row timesteps and repeated conditioning. names: of its parameters, in order."""
        self._calls += 1
        states: Tensor = kwargs[family.state] if family.state in kwargs else args[names.index(family.state)]
        if self._wave is None:  # the first wave is the starting noise alone: a plain call
            if self._started is None:
                self._started = time.perf_counter()
            if not self._loop.checked:
                self._check_time(network, family, dict(zip(names, args, strict=False)) | kwargs)
            with telemetry.span("network", "network", 1):
                return self._instead.get(network, network)(*args, **kwargs)
        if isinstance(states, RowStates):
            plain = states.as_subclass(Tensor)
            args, kwargs = (
                tuple(plain if arg is states else arg for arg in args),
                {name: plain if value is states else value for name, value in kwargs.items()},
            )
        assert self._rows is not None
        with telemetry.span("network", "network", len(self._wave.positions)):
            return self._rows.call(self._wave, network, family, names, args, kwargs)

    def _begin(self, m: Tensor, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        """The first step: now number of steps, noise and samples are known. Makes the run; it has not begun."""
        scheduler, options = self.scheduler.inner, self.scheduler.unusual(options)
        if m.shape != x.shape:
            raise UnsupportedPipeline(
                f"The pipeline steps latents of shape {tuple(x.shape)} with an output of shape {tuple(m.shape)}. What "
                "its other channels mean to the step is not known. Run this call on the original pipeline."
            )
        clip_epsilon = bool(options.pop("use_clipped_model_output", False))
        eta, generator = float(options.pop("eta", 0.0)), options.pop("generator", None)
        for name, value in options.items():
            raise UnsupportedScheduler(
                f"{type(scheduler).__name__}.step was given {name}={value!r}. The step then depends on more than "
                f"sample, network output and noise. Call the pipeline without it."
            )
        self._noise = noise_table(scheduler, clip_epsilon=clip_epsilon, eta=eta)
        if self._loop.copies > 1 and bool((self._noise.input_scale != 1).any()):
            raise UnsupportedPipeline(
                f"The pipeline's loop overwrites its latents with what {type(scheduler).__name__} scales for the "
                "network. They are then not the scheduler's own. Use a scheduler that does not scale, as DDIMScheduler."
            )
        noise = self._noise.part(self._start, self._start + self.num_steps)
        self._num_samples = len(x) // self._loop.copies
        state = x[: self._num_samples].to(state_dtype(x.dtype))
        # drawn for all copies, as the stock step does; the first one is the sample's
        draws = draw_noise(noise, m, state.dtype, generator)
        self._draws = None if draws is None else draws[:, : self._num_samples]
        extras = self._extras(self._draws, x.dtype, noise.num_steps)
        if self._guess is not None:
            check_warm_start(self._guess, (noise.num_steps + 1, *state.shape))
        telemetry.phase("plan")
        begun = time.perf_counter()
        plan = self._plan_for(noise.num_steps, noise.spread is not None, self._pricing(noise, state, extras))
        planning = time.perf_counter() - begun
        if plan.context is not None:
            plan.context.check(context_of(state.device, noise, self._networks()))
        self._started = None if self._started is None else self._started + planning
        at_once = plan.pipelined and plan.in_flight is None
        in_as_many_turns = at_once if plan.method == "srds" else plan.method in ("sequential", "chords")
        ahead_of_its_turns = plan.method == "sequential" or (in_as_many_turns and plan.max_rows is None)
        if self._loop.counts and self._turns_with_waves and not ahead_of_its_turns:
            raise UnsupportedPipeline(
                "The pipeline's loop looks up its list of steps by turn, and this plan may take more turns than steps. "
                "Use method='srds' with pipelined=True, and neither in_flight nor max_rows."
            )
        self._parts = plan, state, noise, extras
        self._make_run = functools.partial(Run, plan, state, noise, "drive", extras, started=self._started)
        self.run = self._make_run(observer=self._observer)
        self.run.report.planning_seconds = planning if plan.prediction is not None else 0.0
        self._rows = RowInputs(self.run.program, noise, state, instead=self._instead)
        if noise.num_steps > 1:
            return ()
        _, x0 = noise.step(0, state, m[: self._num_samples].to(state.dtype))
        return (x0.to(x.dtype),)

    def _networks(self) -> list[nn.Module]:
        """The networks of this call, where they are known."""
        return []

    def _pricing(self, noise: NoiseTable, state: Tensor, extras: Extras) -> Callable[[], Pricing] | None:
        """What tells the costs of this call. Of a loop that is driven the network is called by the loop alone."""
        return None

    def _extras(
        self, draws: Tensor | None, dtype: torch.dtype, num_steps: int, x0_prev: Tensor | None = None
    ) -> Extras:
        constrain = None
        if self.inpainting is not None and self.inpainting.mask is not None:
            assert self._noise is not None
            inpainting, noise, first = self.inpainting, self._noise, self._start + self._offset
            last = self._start + self.num_steps

            def constrain(x: Tensor, position: int, samples: tuple[int, ...]) -> Tensor:
                return inpainting.blend(x, first + position, samples, noise, last)

        self._trajectory = Trajectory(num_steps) if self._keep_states else None
        return Extras(draws, constrain, self._trajectory, x0_prev, NetworkInput(dtype), guess=self._guess)

    def _hand_out(self, dtype: torch.dtype) -> Tensor:
        """The next rows, or the samples: as the loop carries them."""
        assert self.run is not None
        if self._wave is None:
            assert self.run.sample is not None
            self.finished = True
            assert self._rows is not None
            self._rows.forget()
            states = self.run.sample.to(dtype)
        else:
            states = self._wave.x.flatten(0, 1)
        if self._loop.copies > 1:
            states = torch.cat([states] * self._loop.copies)
        elif self._loop.joins and self._wave is not None:
            states = RowStates.of(states, self)
        # where the loop itself makes the states anew, they cannot be known again
        self._handed = None if self._loop.copies > 1 or self._loop.blends else states
        return states

    def _check_time(self, network: nn.Module, family: Network, given: dict[str, Any]) -> None:
        """Hold what an unread loop tells its network in the first turn against what it would be told later."""
        assert self.timesteps is not None
        if "timestep" not in given:
            raise UnsupportedPipeline(
                f"The pipeline tells {type(network).__name__} no timestep. Rows at different times would be one to it. "
                "Run this call on the original pipeline."
            )
        told = torch.as_tensor(given["timestep"]).flatten()[:1].double().cpu()
        expected = family.time(self.timesteps[:1], given[family.state].dtype).double().cpu()
        if not torch.equal(told, expected):
            raise UnsupportedPipeline(
                f"The pipeline tells {type(network).__name__} the time {float(told)} where {float(expected)} was "
                "expected. Its unit is not known. Run this call on the original pipeline."
            )


def _copy(scheduler: Any) -> Any:
    """A copy to drive. Another thread may be setting the timesteps of the original: dict.copy() cannot be torn."""
    twin = object.__new__(type(scheduler))
    twin.__dict__.update(copy.deepcopy(vars(scheduler).copy()))
    return twin


def driven_copy(pipe: Any, cls: Any, loop: Loop, drive: Drive, parts: dict[str, Any]) -> Any:
    """A shallow copy of the pipe, of class `cls`, with stand-ins for its scheduler and its networks.

    Args:
        pipe: the user's pipeline; not changed.
        cls: the pipeline's own class.
        loop: what is known of its loop.
        drive: of this call.
        parts: components to use in place of the pipe's.
    """
    twin = object.__new__(cls)
    networks = {}
    for name in loop.networks:
        network = getattr(pipe, name)
        family = network_family(network)
        assert family is not None, "compile() checks the family of every network"
        networks[name] = DrivenNetwork(network, family, drive)
    twin.__dict__.update(
        {
            **pipe.__dict__,
            **parts,
            **networks,
            "scheduler": drive.scheduler,
            "progress_bar": functools.partial(driven_progress, functools.partial(cls.progress_bar, twin), drive),
            # offloading hooks belong to the networks, not to their stand-ins
            "maybe_free_model_hooks": functools.partial(cls.maybe_free_model_hooks, pipe),
        }
    )
    if loop.blends:
        drive.inpainting = Inpainting(twin)
    return twin
