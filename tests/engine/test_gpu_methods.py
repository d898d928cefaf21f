"""The methods beside SRDS, and the planner, on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from twins import Twins

import srds_fast
from srds_fast import zoo
from srds_fast.solvers.chords import Chords
from srds_fast.solvers.fixed_point import grid
from srds_fast.solvers.fixed_point.options import Collocation, ParaDiGMS, ParaTAA

pytestmark = pytest.mark.gpu

METHODS = {
    "collocation": Collocation(num_nodes=8),
    "parataa": ParaTAA(),
    "parataa, published": ParaTAA.published(window=8),
    "paradigms": ParaDiGMS(window=6),
    "chords": Chords(3),
}
STEPS = 20


# whose waves are kernels, and what their steps may do beside
FUSED = {
    "collocation": Collocation(num_nodes=8),
    "parataa": ParaTAA(),
    "parataa, 5 differences": ParaTAA(history=5),
    "picard": ParaDiGMS(window=None, step_tolerance=None),
}
SCHEDULERS: dict[str, Any] = {
    "ddim": None,
    "momentum": DPMSolverMultistepScheduler(**tiny.SD_BETAS),
    "noise": EulerAncestralDiscreteScheduler(**tiny.SD_BETAS),
}


def latents(pipe: Any, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.as_tensor(pipe("a", num_inference_steps=STEPS, generator=generator, output_type="latent").images)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_run_on_is_the_sequential_sampler(method: str) -> None:
    pipe = tiny.stable_diffusion().to("cuda")
    expected = latents(srds_fast.compile(pipe, method="sequential", engine="eager"))
    found = latents(srds_fast.compile(pipe, method=METHODS[method], exact=True, engine="eager"))
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_network_graphs_equal_an_eager_run(method: str) -> None:
    """Also of windows that slide."""
    pipe = tiny.stable_diffusion().to("cuda")
    twins = Twins("stable_diffusion", pipe, None, "network-graphs", method=METHODS[method])
    for seed in (0, 1):
        twins.same(seed, num_inference_steps=STEPS)
    assert twins.report.engine == "network graphs", twins.report.engine_reason


def test_a_replay_of_chords_equals_an_eager_run() -> None:
    twins = Twins("stable_diffusion", tiny.stable_diffusion().to("cuda"), method=METHODS["chords"])
    twins.first(num_inference_steps=STEPS)
    twins.replayed(1, num_inference_steps=STEPS)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("method", FUSED)
def test_kernels_and_their_references_give_the_same(
    method: str, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And two runs through the kernels the same bits."""
    pipe = tiny.stable_diffusion(SCHEDULERS[scheduler]).to("cuda")
    found = []
    for implementation in ("triton", "triton", "torch"):
        if implementation == "torch":
            monkeypatch.setenv("SRDS_FAST_KERNELS", "torch")
            grid.grid_of.cache_clear()
        fast = srds_fast.compile(pipe, method=FUSED[method], max_iterations=3, tolerance=1e-30, engine="eager")
        found.append(latents(fast))
        assert fast.report.kernels == implementation
        assert fast.report.waves == 3
    grid.grid_of.cache_clear()
    assert torch.equal(found[0], found[1])
    assert float((found[2] - found[0]).abs().max()) <= 1e-3 * float(found[2].abs().max())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("method", FUSED)
def test_replays_of_them_are_eager_runs(method: str, scheduler: str) -> None:
    twins = Twins("stable_diffusion", tiny.stable_diffusion(SCHEDULERS[scheduler]).to("cuda"), method=FUSED[method])
    twins.first(num_inference_steps=STEPS)
    for seed in (1, 2):
        twins.replayed(seed, num_inference_steps=STEPS)


def test_the_digits_are_within_the_tolerance_by_every_method() -> None:
    pipe = zoo.load("digits").to("cuda")
    call: dict[str, Any] = {"num_inference_steps": 50, "guidance_scale": 5.0, "output_type": "latent"}

    def drawn(each: Any) -> torch.Tensor:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(4)]
        return torch.as_tensor(each(zoo.prompts("digits")[:4], generator=generators, **call).images)

    expected = drawn(srds_fast.compile(pipe, method="sequential"))
    for method in ("srds", "collocation", "parataa"):
        fast = srds_fast.compile(pipe, method=method)
        assert float((drawn(fast) - expected).abs().flatten(1).mean(1).max()) < 6e-3
        assert fast.report.waves < 25


def test_auto_measures_replays_and_is_not_slower_than_it_says() -> None:
    pipe = zoo.load("digits").to("cuda")
    pipe.set_progress_bar_config(disable=True)
    fast = srds_fast.compile(pipe)
    call: dict[str, Any] = {"num_inference_steps": 100, "guidance_scale": 5.0, "output_type": "latent"}
    ratios = []  # the least: others may use the device
    for _ in range(6):
        fast("the digit one", **call)
        if fast.report.predicted_seconds is not None:
            ratios.append(fast.report.seconds / fast.report.predicted_seconds)
    plan = fast.plan_for("the digit one", measure=True, **call)
    assert plan.prediction is not None
    assert plan.prediction.curve.nbytes is not None
    assert min(ratios) < 2
