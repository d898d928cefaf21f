"""Every accepted scheduler, whatever its class, gives its own loop's sample by every kind of method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_scheduler import READ, has_table, made
from problems import GaussianMixture
from thinned import thinned_product
from torch import Tensor

from srds_fast import sample
from srds_fast.schedulers.reader import InFloat64, fresh_copy, next_sample, step_options
from srds_fast.schedulers.verify import noise_table

STEPS, DIMENSIONS = 20, 8
MIXTURE = GaussianMixture.random(DIMENSIONS)
CLIP = {"clip_sample": True, "clip_sample_range": 0.8}
CLIPS = ("DDIM", "DDPM", "DDIMParallel", "DDPMParallel", "LCM", "TCD", "HeunDiscrete", "UnCLIP")
CLIPPED: list[tuple[str, dict[str, Any]]] = [(name, CLIP) for name in CLIPS]
ACCEPTED = [(name, config) for name, config in [*READ, *CLIPPED] if has_table(name, config)]
METHODS = {
    "sequential": {"method": "sequential"},
    "srds": {"method": "srds", "exact": True},
    "collocation": {"method": "collocation", "exact": True},
}


def network(name: str) -> Any:
    """The eps of a mixture in closed form where timesteps are those of a diffusion, else a smooth function."""
    if name.startswith(("Flow", "EDM", "CM", "LTX", "MiniMax", "CogVideoX", "UnCLIP", "DPMSolverMultistepInverse")):
        return lambda x, t: torch.tanh(x) * (0.5 + t.to(x)[:, None] / 2000)
    return lambda x, t: MIXTURE(x, t.long())


def own_loop(scheduler: Any, denoiser: Any, x: Tensor, in_float64: bool) -> Tensor:
    """The scheduler's own loop; in_float64: it does not round to float32, as `sample` does not."""
    trial = fresh_copy(scheduler)
    options = step_options(trial, None)
    if "generator" in options:
        options["generator"] = torch.Generator().manual_seed(5)
    with InFloat64(tuple(x.shape) if in_float64 else ()):
        for t in trial.timesteps:
            scaled = trial.scale_model_input(x, t) if hasattr(trial, "scale_model_input") else x
            x = next_sample(trial.step(denoiser(scaled, t.expand(len(x))), t, x, **options))
    return x


@pytest.mark.parametrize(("case", "method"), thinned_product(ACCEPTED, METHODS), ids=str)
def test_exact_is_the_schedulers_own_loop(case: tuple[str, dict[str, Any]], method: str) -> None:
    name, config = case
    scheduler, denoiser = made(name, config, STEPS), network(name)
    x = torch.randn(2, DIMENSIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x *= float(getattr(scheduler, "init_noise_sigma", 1.0))
    # in what precision noise is drawn may depend on the rounding
    stochastic = noise_table(scheduler).spread is not None
    expected = own_loop(scheduler, denoiser, x, in_float64=not stochastic)
    steps = scheduler.num_inference_steps if name == "CMStochasticIterative" else STEPS
    given = {"generator": torch.Generator().manual_seed(5), **METHODS[method]}
    found = sample(denoiser, x, scheduler, steps, **given)
    assert bool(expected.isfinite().all())
    assert found.report.num_inference_steps == len(scheduler.timesteps)
    # a clipped x0 is read as x0 and eps of float32 coefficients, which add up to x only to seven digits
    tolerance = 1e-5 if stochastic or config is CLIP else 1e-9
    assert float((found.sample - expected).abs().max() / expected.abs().max()) < tolerance
    assert scheduler.__dict__.get("_step_index") is None
