"""`sample()`: parallel-in-time sampling with any callable denoiser."""

from __future__ import annotations

import copy
import functools
import logging
import os
import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import telemetry
from ..caches import cached
from ..engine import cancellation
from ..engine.cancellation import Cancel, OnWave
from ..engine.costs import Costs
from ..engine.distributed import call as distributed
from ..engine.distributed.digests import digest, digest_of_weights, versions
from ..engine.distributed.ranks import ranks_of
from ..engine.graphs.cache import Graphs
from ..engine.graphs.cache_key import function_key, modules_of
from ..engine.graphs.capturable import Capturable, NetworkCalls, Through
from ..engine.run import Observer, core_of
from ..engine.x0_previews import Due, preview
from ..errors import Cancelled, DivergenceError, InvalidArgument, shown
from ..kernels.common.dispatch import implementation
from ..kernels.wave_update import NetworkInput
from ..planner.curve_cache import CurveCache
from ..planner.exploration import STOCK, Exploration
from ..planner.plan import SLIDES, STATES_KEPT, Plan, refuse_beside
from ..planner.settings import GRAPH_ENGINES, Settings
from ..schedulers.own_loop import OwnLoop
from ..schedulers.refusal import refused
from ..schedulers.table import NoiseTable
from ..schedulers.verify import noise_table
from ..solvers.checks import check_switch
from ..solvers.contract import Checkpoint, Core, SolverInputs, Trajectory
from ..solvers.method import Method
from ..solvers.program import Program
from ..solvers.registry import DEFAULT, check_warm_start, check_warm_start_method
from ..telemetry.report import BY_SEQUENTIAL, Report, stock_report
from .arguments import (
    check_conditioning,
    check_functions,
    check_generator,
    check_noise,
    check_scheduler,
    check_signature,
)
from .planner import Planner
from .rows import Denoiser, Generators, RowDenoiser, draw_noise, state_dtype
from .session import Session
from .trials import TurnClock

logger = logging.getLogger("srds_fast")


@dataclass(frozen=True)
class SampleResult:
    """The result of `sample`.

    Attributes:
        sample: [batch, ...], with the dtype and device of the starting noise.
        report: the report of the call.
        trajectory: [N + 1, batch, ...], the last computed state of every step, from the starting noise to the sample,
            in the dtype of the state; only with `keep_trajectory`.
    """

    sample: Tensor = field(repr=False)
    report: Report
    trajectory: Tensor | None = field(default=None, repr=False)


def sample(
    denoiser: Denoiser,
    x: Tensor,
    scheduler: Any,
    num_inference_steps: int,
    *,
    cond: Mapping[str, Tensor] | None = None,
    generator: Generators = None,
    eta: float | None = None,
    method: str | Method = DEFAULT,
    tolerance: float = 4e-3,
    exact: bool = False,
    num_blocks: int | None = None,
    max_iterations: int | None = None,
    coarse_solver: str = "auto",
    pipelined: bool = True,
    in_flight: int | None = None,
    max_rows: int | None = None,
    engine: str = "auto",
    graphs: Graphs | None = None,
    plan: Plan | None = None,
    observer: Observer | None = None,
    warm_start: Tensor | None = None,
    keep_trajectory: bool = False,
    explore: float = 3.0,
    cache_dir: str | os.PathLike[str] | None = None,
    latency: str = "adaptive",
    same: str = "sample",
    strict: bool = False,
    parallel: Any = None,
    cancel: Cancel | None = None,
    on_wave: OnWave | None = None,
) -> SampleResult:
    """Sample with a diffusion denoiser, parallel in time.

    Args:
        denoiser: `denoiser(x, t, **cond) -> m`. x is [rows, ...] in the dtype of the starting noise, already scaled as
            by the scheduler's `scale_model_input`. t is [rows] in the scheduler's unit; every row has its own. m has
            the shape of x and is what the scheduler's `prediction_type` says. The denoiser must treat rows
            independently; guidance happens inside it. Each row belongs to one sample; their order is not specified.
        x: starting noise, [batch, ...], any state shape: pixels, latents, action trajectories, audio, points. Multiply
            it by the scheduler's `init_noise_sigma` as usual. The state is kept in float32 (float64 if x is float64).
        scheduler: a diffusers scheduler of a supported class; it is copied, not changed.
        num_inference_steps: N, fine steps of the sequential sampler. Of a scheduler with two network calls a step, as
            Heun, each call is a step here: N becomes 2 N - 1.
        cond: tensors [batch, ...], gathered for the rows of each call and passed by name.
        generator: draws the noise that stochastic schedulers (DDPM, EulerAncestral, LCM, DDIM with eta) add: one, one
            per sample, or None for torch's global one. All noise is drawn before the first call, in the order of the
            sequential sampler.
        eta: 0 to 1, of the step of DDIM, where 0 is deterministic and 1 adds the noise of DDPM, or of TCD. None: the
            step's own default, 0 for DDIM and 0.3 for TCD.
        method, tolerance, exact, num_blocks, max_iterations, coarse_solver, pipelined, in_flight, max_rows, plan,
            explore, cache_dir, latency, same: as in `srds_fast.compile`.
        engine: as in `srds_fast.compile`, but graphs need a place to be kept: see `graphs`.
        graphs: where recordings are kept from call to call: make a `srds_fast.Graphs()` and pass it each time. The
            first call of a kind runs without graphs and is recorded; later ones are replayed. What the denoiser does
            in Python is then not done again. Weights that it takes from modules it is, is bound to or names may change
            in any way; it must not read tensors from elsewhere.
        observer: called with a copy of every `Checkpoint`.
        warm_start: [N + 1, batch, ...], the trajectory of a related sample with the same starting noise. Methods that
            refine all points (collocation, parataa, paradigms) start from it. The closer it is, the fewer waves they
            need. The final sample is the same.
        keep_trajectory: return the states of all steps, N + 1 times the memory of x.
        strict: raise DivergenceError if the method diverges. Otherwise the call starts again, one step after another,
            with the reason in the report. A sample that is NaN or Inf, but finite when the method runs again, is an
            error in any case: the network gave two answers to the same input.
        parallel: as in `srds_fast.compile`: ranks that share the rows of each wave. All call `sample` with the same
            arguments, x too.
        cancel, on_wave: as in `srds_fast.using`, for this call.

    Returns:
        SampleResult with the samples and the report.

    Raises:
        InvalidArgument: a setting, x, cond or the denoiser's output is not as described.
        UnsupportedScheduler: the scheduler or one of its options is not supported, or not by the method; the message
            holds the line to write.
        PlanMismatch: the plan is for another number of steps.
        DivergenceError: the network returned NaN or Inf; with `strict` also: the method diverged. It holds the report.
        Cancelled: `cancel` was set before a wave. It holds the report.
        RankMismatch, RankFailed, RankLost: with `parallel`, see there.
    """
    return sampled(**locals())


def sampled(
    denoiser: Denoiser,
    x: Tensor,
    scheduler: Any,
    num_inference_steps: int,
    *,
    cond: Mapping[str, Tensor] | None,
    generator: Generators,
    eta: float | None,
    method: str | Method,
    tolerance: float,
    exact: bool,
    num_blocks: int | None,
    max_iterations: int | None,
    coarse_solver: str,
    pipelined: bool,
    in_flight: int | None,
    max_rows: int | None,
    engine: str,
    graphs: Graphs | None,
    plan: Plan | None,
    observer: Observer | None,
    warm_start: Tensor | None,
    keep_trajectory: bool,
    explore: float,
    cache_dir: str | os.PathLike[str] | None,
    latency: str,
    same: str,
    strict: bool,
    parallel: Any,
    cancel: Cancel | None,
    on_wave: OnWave | None,
    previews: bool = False,
) -> SampleResult:
    """`sample`. previews: the observer is shown predicted x0 too, see `Session`."""
    settings = Settings(
        method,
        tolerance,
        exact,
        num_blocks,
        max_iterations,
        coarse_solver,
        pipelined,
        max_rows,
        engine,
        in_flight,
        explore,
        latency,
        same,
    )
    refuse_beside(plan, settings, Settings(method=DEFAULT))
    cond = {} if cond is None else cond
    check_switch("keep_trajectory", keep_trajectory)
    check_switch("strict", strict)
    check_functions(denoiser, observer)
    check_noise(x)
    check_conditioning(cond, len(x))
    check_signature(denoiser, cond)
    check_scheduler(scheduler, num_inference_steps, eta)
    check_generator(generator, len(x))
    if not isinstance(graphs, Graphs | None):
        raise InvalidArgument(f"graphs is {shown(graphs)}. Keep graphs = srds_fast.Graphs() and pass it to each call.")
    planner = Planner(settings, plan, costs_of_denoisers, CurveCache.of(cache_dir))
    if warm_start is not None:
        check_warm_start_method(planner.options)
    if planner.engine in GRAPH_ENGINES and graphs is None:
        raise InvalidArgument(
            f"engine is {planner.engine!r} and graphs is None. A recording is useful only if later calls can find it. "
            "Keep graphs = srds_fast.Graphs() and pass it to each call."
        )
    eager = functools.partial(_log_once, "runs without graphs")
    ranks = ranks_of(parallel)
    runner = None if graphs is None or ranks is not None else planner.graph_runner(graphs, x.is_cuda, True, eager)
    scheduler = copy.deepcopy(scheduler)
    with torch.device("cpu"):  # whatever the default device is
        scheduler.set_timesteps(num_inference_steps)
    state = x.to(state_dtype(x.dtype))
    timeline = telemetry.Timeline()
    session: Session | None = None
    try:
        with (
            cancellation.watching(cancel, on_wave, always=ranks is not None),
            telemetry.call(getattr(denoiser, "__name__", type(denoiser).__name__), lambda: x.device, timeline),
            distributed.sharing(ranks, forget=costs_of_denoisers.clear) as shared,
        ):
            telemetry.phase("plan")
            noise = noise_table(scheduler, eta=eta)
            if noise.learned is not None:
                raise refused(scheduler, "its steps take the size of their noise from further channels of the network")
            if shared is not None:
                shared.compare(
                    {
                        **versions(),
                        "number of steps": digest(num_inference_steps),
                        "scheduler": digest(sorted(noise.numbers.items())),
                        "starting noise": digest([x, warm_start]),
                        "cond": digest(cond),
                        "generator": digest(generator),
                        "observer": repr(observer is not None),
                        "network": digest_of_weights(modules_of(denoiser)),
                        "setting": repr((settings, keep_trajectory, strict, None if plan is None else plan.signature)),
                    }
                )
            if warm_start is not None:
                check_warm_start(warm_start, (noise.num_steps + 1, *x.shape))
            inputs = SolverInputs(
                draws=distributed.of_first(draw_noise(noise, x, state.dtype, generator)),
                trajectory=Trajectory(noise.num_steps) if keep_trajectory else None,
                network=NetworkInput(x.dtype),
                scaled=True,
                initial_guess=warm_start,
            )
            stock = None
            if (observer is None or previews) and not keep_trajectory and noise.spread is None:
                stock = _StockLoop(denoiser, x, scheduler, cond, noise)
            session = Session(
                planner,
                state,
                noise,
                inputs,
                "sample",
                _DenoiserNetwork(denoiser, x, state, noise, inputs, cond, x.dtype),
                runner,
                observer,
                notify=functools.partial(_log_once, "runs step by step"),
                stock=None if stock is None else stock.seconds,
                previews=previews,
                strict=strict,
            )
            if stock is not None and session.exploration is not None and session.exploration.chose_stock:
                return stock.result(session.exploration, observer)
            found = session.complete().sample
    except DivergenceError as error:
        if error.report is not None:  # it is from the run, and not from a function of the user's
            error.report = replace(error.report, timeline=timeline.sums)
        raise
    except Cancelled as error:
        error.report = None if session is None else replace(session.report(), timeline=timeline.sums)
        raise
    assert found is not None
    trajectory = None if inputs.trajectory is None else inputs.trajectory.stacked(state, found)
    report = session.report()
    if timeline.sums is not None:
        report = replace(report, timeline=timeline.sums)
    logger.debug("sample: %s", report)
    return SampleResult(found.to(x.dtype), report, trajectory)


# measured for the denoisers of all calls; `reset` of a compiled pipeline clears them
costs_of_denoisers = Costs()


@dataclass(frozen=True)
class _StockLoop:
    """The loop that a user would write without this package: a denoiser and the steps of a scheduler."""

    denoiser: Denoiser
    x: Tensor
    scheduler: Any  # with its timesteps set
    cond: Mapping[str, Tensor]
    noise: NoiseTable

    @torch.no_grad()
    def __call__(self, turned: Callable[[int, Tensor, Tensor], None]) -> Tensor:
        """turned: told the number of each step, the state that it departs from, and the network's output there."""
        loop, x, watch = OwnLoop(self.scheduler, self.noise.call), self.x, cancellation.current()
        for step, t in enumerate(self.noise.timesteps):
            if watch is not None:
                watch.wave(1, step)
            m = self.denoiser(loop.scaled(x), t.to(x.device).expand(len(x)), **self.cond)
            turned(step, x, m)
            x = distributed.of_first(loop.step(m, x))
        return x

    def seconds(self, turns: int) -> float:
        """Seconds of all turns, by the first ones."""
        clock = TurnClock(turns, self.x.device)
        return clock.seconds(lambda: self(lambda *_: clock.turned()))

    def result(self, exploration: Exploration, observer: Observer | None) -> SampleResult:
        """The sample and the report of a call that runs on this loop, as an exploration has chosen.

        observer: of a stream.
        """
        seconds, found = self._timed(observer)
        steps = self.noise.num_steps
        report = stock_report(
            steps,
            seconds,
            path="sample",
            plan_reason=exploration.why,
            plan_state=exploration.state,
            plan_changed=exploration.taken(STOCK),
            stopped_by=[BY_SEQUENTIAL] * len(found),
            estimated_error=[None] * len(found),
            ranks=distributed.size(),
        )
        return SampleResult(found, report)

    def _timed(self, observer: Observer | None) -> tuple[float, Tensor]:
        due, samples, dtype = Due(self.noise.num_steps), tuple(range(len(self.x))), state_dtype(self.x.dtype)

        def show(step: int, x: Tensor, m: Tensor) -> None:
            if observer is not None and due.is_now(step + 1):
                observer(preview(step + 1, self.noise.predict_x0(step, x.to(dtype), m.to(dtype)), samples))

        started = time.perf_counter()
        found = self(show)
        if observer is not None:
            observer(Checkpoint(0, found, samples, None, exact=True).copied(final=True))
        if found.is_cuda:
            torch.cuda.synchronize(found.device)
        return time.perf_counter() - started, found


@dataclass(frozen=True)
class _DenoiserNetwork:
    """See `srds_fast.sampling.network.Network`."""

    denoiser: Denoiser
    x: Tensor
    state: Tensor
    noise: NoiseTable
    inputs: SolverInputs
    cond: Mapping[str, Tensor]
    dtype: torch.dtype
    modules: tuple[nn.Module, ...] = ()  # a denoiser may use modules that cannot be found

    @property
    def kind(self) -> Hashable:
        shapes = tuple((name, value.shape, value.dtype) for name, value in self.cond.items())
        return _cost_key(self.denoiser), shapes

    @property
    def conditions(self) -> Hashable:
        return tuple((name, value.shape, value.dtype) for name, value in self.cond.items())

    @property
    def modules_found(self) -> tuple[nn.Module, ...]:
        return modules_of(self.denoiser)

    def evaluator(self, program: Program) -> RowDenoiser:
        return RowDenoiser(self.denoiser, self.x, self.noise, program, self.cond)

    def capturable(self, plan: Plan, program: Program) -> Capturable:
        inputs, noise, cond = self.inputs, self.noise, self.cond

        def begin(static: Mapping[str, Tensor], two_lanes: bool) -> tuple[Core, RowDenoiser]:
            assert not two_lanes
            given = {name: static[f"cond.{name}"] for name in cond}
            evaluator = RowDenoiser(self.denoiser, static["x"], noise, program, given)
            return core_of(plan, static["x"], noise, program, inputs.with_tensors(static)), evaluator

        def through(graphed: Through) -> RowDenoiser:
            return RowDenoiser(graphed(self.denoiser, None), self.x, noise, program, cond)

        return Capturable(
            (plan.signature, noise, inputs.network, implementation(self.state.device)),
            {"x": self.state, **inputs.tensors(), **{f"cond.{name}": value for name, value in cond.items()}},
            NetworkCalls(modules_of(self.denoiser), self.x.device, function_key(self.denoiser)),
            begin,
            through,
            plan.options.num_checkpoints(plan.max_iterations),
            program,
            inputs.network,
            self.dtype,
            why_no_loop=SLIDES if plan.slides else STATES_KEPT if inputs.trajectory is not None else None,
        )


def _cost_key(denoiser: Denoiser) -> Hashable:
    """Identifies a denoiser for cost measurements: its code and networks. Other closure values may change per call."""
    networks = tuple(weakref.ref(network) for network in modules_of(denoiser))
    code = getattr(denoiser, "__code__", None)
    owner = getattr(denoiser, "__self__", None if networks or code else denoiser)
    try:
        return code or type(denoiser), networks, None if owner is None else weakref.ref(owner)
    except TypeError:  # no weak reference: its cost cannot be remembered
        return object()


@cached
def _log_once(how: str, reason: str) -> None:
    logger.warning("sample %s: %s", how, reason)
