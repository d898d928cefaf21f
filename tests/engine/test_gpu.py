"""Eager runs, kernels, methods and the planner on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from problems import GaussianMixture, noise, scheduler
from torch import Tensor
from twins import Twins

import srds_fast
from srds_fast import zoo
from srds_fast.methods import Chords, Collocation, ParaDiGMS, ParaTAA
from srds_fast.solvers.fixed_point import grid

pytestmark = pytest.mark.gpu

STEPS = 20
EXACT = {"method": "srds", "exact": True}
METHODS = {
    "collocation": Collocation(num_nodes=8),
    "parataa": ParaTAA(),
    "parataa, published": ParaTAA.published(window=8),
    "paradigms": ParaDiGMS(window=6),
    "chords": Chords(3),
}
# whose waves are kernels, and what their steps may do besides
FUSED = {
    "collocation": Collocation(num_nodes=8),
    "collocation, 5 differences": Collocation(num_nodes=8, history=5),
    "collocation, responses": Collocation(history=0),
    "parataa": ParaTAA(),
    "parataa, 5 differences": ParaTAA(history=5),
    "picard": ParaDiGMS(window=None),
}
SCHEDULERS: dict[str, Any] = {
    "ddim": None,
    "momentum": DPMSolverMultistepScheduler(**tiny.SD_BETAS),
    "noise": EulerAncestralDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1),
}


def drawn(pipe: Any, device: str = "cuda", **call: Any) -> Tensor:
    """The result of a call from a fresh generator."""
    torch.manual_seed(7)
    return torch.as_tensor(pipe(**call, generator=torch.Generator(device).manual_seed(0))[0])


def latents(pipe: Any) -> Tensor:
    return drawn(pipe, "cpu", prompt="a", num_inference_steps=STEPS, output_type="latent")


def assert_near(found: Tensor, expected: Tensor, relative: float) -> None:
    assert found.device == expected.device
    assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


def test_sample_stays_on_the_device_and_is_exact() -> None:
    mixture = GaussianMixture.random()

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        assert x.is_cuda
        assert t.is_cuda
        return mixture(x.cpu(), t.cpu()).cuda()  # the closed form reads its noise levels from a table on the CPU

    x = noise(3, 64).cuda()
    expected = srds_fast.sample(denoiser, x, scheduler(), 30, method="sequential").sample
    found = srds_fast.sample(denoiser, x, scheduler(), 30, exact=True).sample
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "dtype", "relative"),
    [*((name, torch.float32, 1e-2) for name in tiny.PIPELINES), ("stable_diffusion", torch.float16, 3e-2)],
)
def test_every_pipeline_equals_stock(name: str, dtype: torch.dtype, relative: float) -> None:
    """float32 convolutions may run in TF32, so the bound is looser than on the CPU."""
    build, call = tiny.PIPELINES[name]
    pipe = build().to("cuda", dtype)
    expected = drawn(pipe, **call, num_inference_steps=9)
    for settings in ({"method": "sequential"}, EXACT):
        assert_near(drawn(srds_fast.compile(pipe, **settings), **call, num_inference_steps=9), expected, relative)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_noise_is_drawn_as_stock_draws_it_whatever_the_device_of_the_generator(device: str) -> None:
    pipe = tiny.stable_diffusion(SCHEDULERS["noise"]).to("cuda")
    states, images = [], []
    for each in (pipe, srds_fast.compile(pipe, **EXACT)):
        generator = torch.Generator(device).manual_seed(0)
        images.append(each("a cat", num_inference_steps=9, output_type="latent", generator=generator).images)
        states.append(generator.get_state())
    assert torch.equal(*states)
    assert_near(images[1], images[0], 1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one() -> None:
    """Triton launches on the current device, whatever the tensors' is."""
    pipe = tiny.stable_diffusion().to("cuda:1")
    fast = srds_fast.compile(pipe, **EXACT)
    assert_near(latents(fast), latents(pipe), 1e-3)
    assert fast.report.kernels == "triton"


def check_kernels(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and their references give the same; two runs through the kernels the same bits."""
    found = []
    for implementation in ("triton", "triton", "torch"):
        if implementation == "torch":
            monkeypatch.setenv("SRDS_FAST_KERNELS", "torch")
            grid.grid_of.cache_clear()
        sample, report = run()
        assert report.kernels == implementation
        found.append(sample.float())
    grid.grid_of.cache_clear()
    assert torch.equal(found[0], found[1])
    assert_near(found[2], found[0], 1e-3)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "flux", "pixart", "ddpm"])
def test_kernels_of_srds_equal_their_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, call = tiny.PIPELINES[name]
    fast = srds_fast.compile(build().to("cuda"), **EXACT)
    check_kernels(lambda: (drawn(fast, **call, num_inference_steps=9), fast.report), monkeypatch)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("method", FUSED)
def test_kernels_of_methods_equal_their_references(
    method: str, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.stable_diffusion(SCHEDULERS[scheduler]).to("cuda")

    def run() -> tuple[Tensor, Any]:
        fast = srds_fast.compile(pipe, method=FUSED[method], max_iterations=3, tolerance=1e-30, engine="eager")
        found = latents(fast)
        assert fast.report.waves == 3
        return found, fast.report

    check_kernels(run, monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_network_graphs_equal_an_eager_run(method: str) -> None:
    """Also of windows that slide."""
    pipe = tiny.stable_diffusion().to("cuda")
    twins = Twins("stable_diffusion", pipe, None, "network-graphs", method=METHODS[method])
    for seed in (0, 1):
        twins.same(seed, num_inference_steps=STEPS)
    assert twins.report.engine == "network graphs", twins.report.engine_reason


@pytest.mark.parametrize(
    ("method", "scheduler"),
    [*((method, scheduler) for method in FUSED for scheduler in SCHEDULERS), ("chords", "ddim")],
)
def test_replays_of_methods_are_eager_runs(method: str, scheduler: str) -> None:
    pipe = tiny.stable_diffusion(SCHEDULERS[scheduler]).to("cuda")
    twins = Twins("stable_diffusion", pipe, method={**METHODS, **FUSED}[method])
    twins.first(num_inference_steps=STEPS)
    for seed in (1, 2):
        twins.replayed(seed, num_inference_steps=STEPS)


def test_auto_measures_replays_and_predicts_their_memory() -> None:
    fast = srds_fast.compile(zoo.load("digits").to("cuda"))
    call: dict[str, Any] = {"num_inference_steps": 100, "guidance_scale": 5.0, "output_type": "latent"}
    for _ in range(2):
        fast("the digit one", **call)
    assert fast.report.predicted_seconds is not None
    plan = fast.plan_for("the digit one", measure=True, **call)
    assert plan.prediction is not None
    assert plan.prediction.curve.nbytes is not None
