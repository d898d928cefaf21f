"""Every accepted scheduler, whatever its class, gives its own loop's sample by every kind of method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_scheduler import HISTORIES, READ, is_sampled, made
from problems import GaussianMixture
from promises import SAME_SAMPLE
from thinned import thinned_product
from torch import Tensor

from srds_fast import sample
from srds_fast.schedulers.own_loop import OwnLoop
from srds_fast.schedulers.reader import InFloat64
from srds_fast.schedulers.verify import noise_table

STEPS, DIMENSIONS = 12, 8
MIXTURE = GaussianMixture.random(DIMENSIONS)
CLIP = {"clip_sample": True, "clip_sample_range": 0.8}
CLIPS = ("DDIM", "DDPM", "DDIMParallel", "DDPMParallel", "LCM", "TCD", "HeunDiscrete", "UnCLIP")
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
THRESHOLDS = ("DDIM", "DDPM", "LCM", "DPMSolverMultistep", "DPMSolverSinglestep", "EDMDPMSolverMultistep")
CLIPPED: list[tuple[str, dict[str, Any]]] = [
    *((name, CLIP) for name in CLIPS),
    *((name, THRESHOLD) for name in THRESHOLDS),
    ("CMStochasticIterative", {}),
]
# every method where steps need the most of earlier ones
CASES = [(each, name) for each in HISTORIES for name in SAME_SAMPLE]
ACCEPTED = [(name, config) for name, config in [*READ, *CLIPPED] if is_sampled(name, config)]
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


_own_samples: dict[tuple[str, torch.dtype], Tensor] = {}


def own_loop(scheduler: Any, denoiser: Any, x: Tensor, in_float64: bool) -> Tensor:
    """The scheduler's own loop; in_float64: it does not round to float32, as `sample` does not."""
    table = noise_table(scheduler)
    torch.manual_seed(5)  # for noise that does not come from the generator
    loop = OwnLoop(scheduler, table.call, generator=torch.Generator().manual_seed(5))
    with InFloat64(tuple(x.shape) if in_float64 else ()):
        for t in table.timesteps:
            x = loop.step(denoiser(loop.scaled(x), t.expand(len(x))), x)
    return x


def difference(case: tuple[str, dict[str, Any]], dtype: torch.dtype, **how: Any) -> float:
    """Of a sample to that of the scheduler's own loop, relative to the largest element."""
    name, config = case
    scheduler, denoiser = made(name, config, STEPS), network(name)
    shape = (2, DIMENSIONS, 1) if config is THRESHOLD else (2, DIMENSIONS)  # it wants channels and elements
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (x * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)

    def rounded(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x.flatten(1), t).view_as(x).to(dtype)

    # in what precision noise is drawn may depend on the rounding
    exactly = dtype == torch.float64 and noise_table(scheduler).spread is None
    key = repr(case), dtype
    if key not in _own_samples:  # it is the same for every method
        _own_samples[key] = own_loop(scheduler, rounded, x, in_float64=exactly)
    expected = _own_samples[key]
    steps = scheduler.num_inference_steps if name == "CMStochasticIterative" else STEPS
    torch.manual_seed(5)
    found = sample(rounded, x, scheduler, steps, generator=torch.Generator().manual_seed(5), **how)
    assert bool(expected.isfinite().all())
    assert found.report.num_inference_steps == noise_table(scheduler).num_steps
    assert scheduler.__dict__.get("_step_index") is None
    return float((found.sample - expected).abs().max() / expected.abs().max())


def tolerance(case: tuple[str, dict[str, Any]]) -> float:
    """In float64."""
    # a clipped x0 is read as x0 and eps of float32 coefficients, which add up to x only to seven digits
    stochastic = noise_table(made(*case, STEPS)).spread is not None
    return 1e-5 if stochastic or case in CLIPPED else 1e-9


@pytest.mark.parametrize(("case", "method"), thinned_product(ACCEPTED, METHODS), ids=str)
def test_exact_is_the_schedulers_own_loop(case: tuple[str, dict[str, Any]], method: str) -> None:
    assert difference(case, torch.float64, **METHODS[method]) < tolerance(case)


@pytest.mark.parametrize(("case", "method"), CASES, ids=str)
def test_every_method_carries_what_the_scheduler_keeps(case: tuple[str, dict[str, Any]], method: str) -> None:
    how = {"method": method, "tolerance": 0.0}
    assert difference(case, torch.float64, **how) < (1e-5 if tolerance(case) == 1e-5 else 1e-11)
    assert difference(case, torch.float32, **how) < 1e-5
