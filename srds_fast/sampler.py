"""`sample()`: the solvers for any callable denoiser."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .denoiser import Denoiser, Generators, RowDenoiser, draw_noise, state_dtype
from .engine.eager import drain
from .errors import InvalidArgument, PlanMismatch
from .kernels.wave_update import NetworkInput
from .noise import noise_table
from .plan import MOST_STEPS, Plan, Settings, choose, refuse_beside
from .report import Report
from .run import Observer, Run
from .solvers.core import Extras


@dataclass(frozen=True)
class SampleResult:
    """What `sample` returns.

    Attributes:
        sample: [batch, ...], of the dtype and device of the starting noise.
        report: what ran.
    """

    sample: Tensor = field(repr=False)
    report: Report


def sample(
    denoiser: Denoiser,
    x: Tensor,
    scheduler: Any,
    num_inference_steps: int,
    *,
    cond: Mapping[str, Tensor] | None = None,
    generator: Generators = None,
    eta: float = 0.0,
    method: str = "srds",
    tolerance: float = 4e-3,
    exact: bool = False,
    num_blocks: int | None = None,
    max_iterations: int | None = None,
    coarse_solver: str = "auto",
    pipelined: bool = True,
    max_rows: int | None = None,
    engine: str = "auto",
    plan: Plan | None = None,
    observer: Observer | None = None,
) -> SampleResult:
    """Sample with a diffusion denoiser, parallel in time.

    Args:
        denoiser: `denoiser(x, t, **cond) -> m`, with x [rows, ...] in the dtype of the starting noise, already scaled
            as the scheduler's `scale_model_input` does, t [rows] in the scheduler's unit (every row has its own) and m
            of the shape of x, predicting what the scheduler's `prediction_type` says. It must treat rows
            independently; do guidance inside it. A row belongs to one sample; their order is the engine's business.
        x: starting noise, [batch, ...], any state shape: pixels, latents, action trajectories, audio, points. Multiply
            by the scheduler's `init_noise_sigma` as usual. The state is kept in float32 (float64 if x is).
        scheduler: a diffusers scheduler of a supported class; it is copied, not changed.
        num_inference_steps: N, fine steps of the sequential sampler.
        cond: tensors [batch, ...], gathered for the rows of each call and passed by name.
        generator: of the noise that stochastic schedulers (DDPM, EulerAncestral, DDIM with eta) add: one, one per
            sample, or None for torch's global one. All of it is drawn before the first call, in the order of the
            sequential sampler.
        eta: of DDIM: 0 is deterministic, 1 adds the noise of DDPM.
        method: "srds", "sequential" or "auto".
        tolerance: bound of the mean absolute difference to the sequential sample, per sample, in units of x. Data in
            [-1, 1]: one grey level is 1 / 127.5. 0 runs until nothing moves.
        exact: run until the result is the sequential one by construction.
        num_blocks: B, blocks the steps are cut into. Default: blocks of about sqrt(N) / 2 steps.
        max_iterations: iterations at most. Default: B, where the result is exact.
        coarse_solver: "2m" (DPM-Solver++(2M) jump), "ddim" (first order) or "auto" (2m; ddim where steps add noise).
        pipelined: start rows of the next iteration as soon as their input exists.
        max_rows: widest wave allowed.
        engine: "eager" or "auto".
        plan: a plan to run instead of choosing one; it fixes all settings above.
        observer: called with every `Checkpoint`.

    Returns:
        SampleResult with the samples and the report.

    Raises:
        InvalidArgument: a setting, x, cond or the denoiser's output is not as described.
        UnsupportedScheduler: the scheduler or one of its options is not supported; the message names the line to write.
        PlanMismatch: the plan is for another number of steps.
        DivergenceError: NaN or Inf from the network, or an unstable coarse solver; carries the report.
    """
    settings = Settings(
        method, tolerance, exact, num_blocks, max_iterations, coarse_solver, pipelined, max_rows, engine
    )
    refuse_beside(plan, settings, Settings(method="srds"))
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or x.numel() == 0:
        found = f"{x.dtype}, shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InvalidArgument(
            f"x is {found}. It must be a floating-point tensor [batch, ...] with at least one sample. "
            "Add a batch dimension with x.unsqueeze(0) if there is none."
        )
    cond = dict(cond or {})
    for name, value in cond.items():
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(x):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidArgument(
                f"cond[{name!r}] has {found}. Its first dimension must be the batch, {len(x)}. "
                "Repeat what is shared, and close over what is not per sample in the denoiser."
            )
    steps = num_inference_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise InvalidArgument(f"num_inference_steps is {steps!r}. It must be a whole number, 1 to {MOST_STEPS}.")

    if not isinstance(eta, int | float) or not 0 <= eta < math.inf:
        raise InvalidArgument(f"eta is {eta!r}. It scales the noise of a step, so it is a number of 0 or more.")
    if isinstance(generator, list | tuple) and len(generator) != len(x):
        raise InvalidArgument(
            f"{len(generator)} generators were given for {len(x)} samples. Pass one for each sample, or a single one."
        )

    if isinstance(scheduler, type) or not hasattr(scheduler, "set_timesteps"):
        raise InvalidArgument(
            f"scheduler is {scheduler!r}. It must be a diffusers scheduler that has been made. Pass DDIMScheduler()."
        )
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    noise = noise_table(scheduler, eta=float(eta))
    if plan is None:
        plan = choose(noise.num_steps, settings, stochastic=noise.spread is not None)
    elif plan.num_inference_steps != noise.num_steps:
        raise PlanMismatch(
            f"The plan is for {plan.num_inference_steps} steps, this call has {noise.num_steps}. A plan fits one "
            "number of steps. Leave plan out, or save one for this number."
        )
    state = x.to(state_dtype(x.dtype))
    draws = draw_noise(noise, x, state.dtype, generator)
    extras = Extras(draws=draws, network=NetworkInput(x.dtype), scaled=True)
    run = Run(plan, state, noise, "sample", extras, observer)
    drain(run.next, RowDenoiser(denoiser, x, noise, run.program, cond))
    assert run.sample is not None
    return SampleResult(run.sample.to(x.dtype), run.report)
