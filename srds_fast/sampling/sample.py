"""`sample()`: parallel-in-time sampling with any callable denoiser."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
from ..engine.graphs.cache_key import modules_of
from ..engine.run import Observer
from ..errors import Cancelled, DivergenceError, InvalidArgument, shown
from ..kernels.wave_update import NetworkInput
from ..planner.curve_cache import CurveCache
from ..planner.exploration import EXPLORING
from ..planner.plan import Plan, refuse_beside
from ..planner.settings import GRAPH_ENGINES, Settings
from ..schedulers.guess import trajectory_to
from ..solvers.checks import check_switch
from ..solvers.contract import Evaluated, SolverInputs, Trajectory
from ..solvers.method import Method
from ..solvers.registry import DEFAULT, check_warm_start, check_warm_start_method
from ..telemetry.report import Report
from .arguments import (
    check_conditioning,
    check_functions,
    check_generator,
    check_noise,
    check_signature,
)
from .denoiser_network import DenoiserNetwork
from .planner import Planner
from .rows import Denoiser, Generators, state_dtype
from .session import Session
from .steps import NoiseSampler, Steps
from .stock_loop import StockLoop

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
    scheduler: Any = None,
    num_inference_steps: int | None = None,
    *,
    sigmas: Tensor | Sequence[float] | None = None,
    prediction: str = "x0",
    sampler: str = "euler",
    cond: Mapping[str, Tensor] | None = None,
    generator: Generators = None,
    eta: float | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    clip_epsilon: bool = False,
    dummy_draws: Sequence[int] = (),
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
        scheduler: a diffusers scheduler of a supported class; it is copied, not changed. Or a
            `srds_fast.schedulers.NoiseTable`. None: `sigmas` say the steps.
        num_inference_steps: N, fine steps of the sequential sampler. Of a scheduler with two network calls a step, as
            Heun, each call is a step here: N becomes 2 N - 1. Left out with a table or sigmas.
        sigmas: in the place of a scheduler, as in k-diffusion and ComfyUI: N + 1 noise levels, descending, of which the
            last is mostly 0. t is then [rows] sigmas in the dtype of x, and x is not scaled: multiply the starting
            noise by sigmas[0].
        prediction: of sigmas: what the denoiser returns, "x0", "eps", "v" or "flow"; see
            `srds_fast.schedulers.table_of_sigmas`.
        sampler: of sigmas: the step, "euler", "ddim", "dpmpp_2m", "euler_ancestral" or "heun"; see there.
        cond: tensors [batch, ...], gathered for the rows of each call and passed by name.
        generator: draws the noise that stochastic schedulers (DDPM, EulerAncestral, LCM, DDIM with eta) add: one, one
            per sample, or None for torch's global one. All noise is drawn before the first call, in the order of the
            sequential sampler.
        eta: 0 to 1, of the step of DDIM, where 0 is deterministic and 1 adds the noise of DDPM, of TCD, or of
            euler_ancestral. None: the step's own default, 0 for DDIM, 0.3 for TCD, 1 for euler_ancestral.
        s_noise: of sampler="euler_ancestral": the noise is multiplied by this.
        noise_sampler: of sigmas: draws the noise in the place of `generator`, as noise_sampler(sigma, sigma_next).
        clip_epsilon: the steps make eps again of the clipped x0: `use_clipped_model_output` of DDIM, and what the
            loops of denoising-diffusion-pytorch do.
        dummy_draws: steps, 0 to N - 1, in which your loop draws noise that it does not use (`randn_like(x)` times a
            sigma of 0). So much is drawn too, and random states end where your loop leaves them.
        method, tolerance, exact, num_blocks, max_iterations, coarse_solver, pipelined, in_flight, max_rows, plan,
            explore, cache_dir, latency, same: as in `srds_fast.compile`.
        engine: as in `srds_fast.compile`, but graphs need a place to be kept: see `graphs`.
        graphs: where recordings are kept from call to call: make a `srds_fast.Graphs()` and pass it each time. The
            first call of a kind runs without graphs and is recorded; later ones are replayed. What the denoiser does
            in Python is then not done again. Weights that it takes from modules it is, is bound to or names may change
            in any way; it must not read tensors from elsewhere.
        observer: called with a copy of every `Checkpoint`.
        warm_start: [N + 1, batch, ...], the trajectory of a related sample with the same starting noise; or
            [batch, ...], a guess of the sample itself, with any starting noise. Methods that refine all points
            (collocation, parataa, paradigms) start from it. The closer it is, the fewer waves they need. The final
            sample is the same.
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


# of its arguments, by name
DEFAULTS = {name: each.default for name, each in inspect.signature(sample).parameters.items()}


@dataclass(frozen=True)
class Inside:
    """What other parts of this package ask of `sample`.

    Attributes:
        previews: the observer is shown predicted x0 too, see `Session`.
        together: no sample leaves the batch before all have converged.
        freeze: keep the plan of this kind of call for good, once it is chosen.
        known: what the costs of the denoiser are remembered by, where it is made anew for each call; None: itself.
        modules: those that such a denoiser calls.
        evaluated: is told what the network was given and has returned.
    """

    previews: bool = False
    together: bool = False
    freeze: bool = False
    known: Hashable = None
    modules: tuple[nn.Module, ...] = ()
    evaluated: Evaluated | None = None


def sampled(
    denoiser: Denoiser,
    x: Tensor,
    scheduler: Any,
    num_inference_steps: int | None,
    *,
    sigmas: Tensor | Sequence[float] | None,
    prediction: str,
    sampler: str,
    cond: Mapping[str, Tensor] | None,
    generator: Generators,
    eta: float | None,
    s_noise: float,
    noise_sampler: NoiseSampler | None,
    clip_epsilon: bool,
    dummy_draws: Sequence[int],
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
    inside: Inside = Inside(),
) -> SampleResult:
    """`sample`, with what only this package asks for."""
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
    steps = Steps(
        scheduler,
        num_inference_steps,
        sigmas,
        prediction,
        sampler,
        eta,
        s_noise,
        noise_sampler,
        clip_epsilon,
        dummy_draws,
    )
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
    runner = None if graphs is None else planner.graph_runner(graphs, x.is_cuda, True, eager, shared=ranks is not None)
    scheduler = steps.prepared()
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
            noise = steps.table(scheduler, x.dtype)
            if shared is not None:
                shared.compare(
                    {
                        **versions(),
                        "number of steps": digest(noise.num_steps),
                        "scheduler": digest(sorted(noise.numbers.items())),
                        "starting noise": digest([x, warm_start]),
                        "cond": digest(cond),
                        "generator": digest(generator),
                        "observer": repr(observer is not None),
                        "network": digest_of_weights(modules_of(denoiser)),
                        "setting": repr((settings, keep_trajectory, strict, None if plan is None else plan.signature)),
                    }
                )
            draws = distributed.of_first(steps.draws(noise, x, state.dtype, generator))
            if isinstance(warm_start, Tensor) and warm_start.shape == x.shape:
                warm_start = trajectory_to(noise, state, warm_start, draws)
            if warm_start is not None:
                check_warm_start(warm_start, (noise.num_steps + 1, *x.shape))
            inputs = SolverInputs(
                draws=draws,
                trajectory=Trajectory(noise.num_steps) if keep_trajectory else None,
                network=NetworkInput(x.dtype),
                scaled=True,
                initial_guess=warm_start,
                evaluated=inside.evaluated,
            )
            stock = None
            looked_at = (observer is not None and not inside.previews) or inside.evaluated is not None
            if scheduler is not None and not looked_at and not keep_trajectory and noise.spread is None:
                stock = StockLoop(denoiser, x, scheduler, cond, noise, steps.step_options)
            session = Session(
                planner,
                state,
                noise,
                inputs,
                "sample",
                DenoiserNetwork(denoiser, x, state, noise, inputs, cond, x.dtype, inside.known, inside.modules),
                runner,
                observer,
                notify=functools.partial(_log_once, "runs step by step"),
                stock=None if stock is None else stock.seconds,
                previews=inside.previews,
                strict=strict,
                together=inside.together,
            )
            exploration = session.exploration
            if stock is not None and exploration is not None and exploration.chose_stock:
                return SampleResult(*stock.result(exploration, observer))
            found = session.complete().sample
            if inside.freeze and exploration is not None and exploration.state != EXPLORING:
                exploration.hold()
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


@cached
def _log_once(how: str, reason: str) -> None:
    logger.warning("sample %s: %s", how, reason)
