"""`sample` on a list of noise levels: the samplers of k-diffusion by their formulas, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from published_samplers import SAMPLERS, denoised, karras, starting_noise
from torch import Tensor

import srds_fast
from srds_fast import InvalidArgument, UnsupportedScheduler, sample
from srds_fast.sampling import steps
from srds_fast.sampling.rows import draw_noise
from srds_fast.schedulers import NoiseTable, noise_table, table_of_sigmas
from srds_fast.schedulers.guess import trajectory_to

SIGMAS = karras(20).double()
X = starting_noise(SIGMAS, dtype=torch.float64)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_is_the_sampler_to_rounding(sampler: str) -> None:
    torch.manual_seed(0)
    expected = SAMPLERS[sampler](denoised, X, SIGMAS)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    found = sample(denoised, X, sigmas=SIGMAS, sampler=sampler, exact=True)
    torch.testing.assert_close(found.sample, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.report.num_inference_steps == (39 if sampler == "heun" else 20)


def test_options_of_the_ancestral_step() -> None:
    torch.manual_seed(0)
    expected = SAMPLERS["euler_ancestral"](denoised, X, SIGMAS, eta=0.5, s_noise=0.9)
    torch.manual_seed(0)
    options: dict[str, Any] = {"sigmas": SIGMAS, "sampler": "euler_ancestral", "eta": 0.5, "s_noise": 0.9}
    found = sample(denoised, X, **options, method="sequential").sample
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.manual_seed(0)
    told = list[tuple[float, float]]()

    def noise_sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        told.append((float(sigma), float(sigma_next)))
        return torch.randn_like(X)

    found = sample(denoised, X, **options, method="sequential", noise_sampler=noise_sampler).sample
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert told == list(zip(SIGMAS.tolist(), SIGMAS.tolist()[1:], strict=False))[:-1], "none at the step to 0"


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_other_predictions_are_the_same_network(prediction: str) -> None:
    def network(x: Tensor, sigma: Tensor) -> Tensor:
        x0, level = denoised(x, sigma), sigma[:, None]
        eps = (x - x0) / level
        return eps if prediction == "eps" else (eps - level * x0) / (level**2 + 1).sqrt()

    expected = sample(denoised, X, sigmas=SIGMAS, method="sequential").sample
    found = sample(network, X, sigmas=SIGMAS, prediction=prediction, method="sequential").sample
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_rectified_flow(sampler: str) -> None:
    """With noise the step is that of ComfyUI, `sample_euler_ancestral_RF`: down, scaled to the next level, and up."""
    levels, x = torch.linspace(1, 0, 21, dtype=torch.float64), starting_noise(torch.ones(1), dtype=torch.float64)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        alpha = 1 - sigma
        # x / alpha has the levels of the other samplers; at alpha = 0 nothing is known of x0
        known = alpha > 0
        safe = torch.where(known, alpha, 1.0)
        x0 = torch.where(known[:, None], denoised(x / safe[:, None], sigma / safe), 0.0)
        return (x - x0) / sigma[:, None]

    state, noise = x, torch.Generator().manual_seed(0)
    for here, after in itertools.pairwise(levels):
        x0 = state - here * velocity(state, here.expand(len(x)))
        if sampler == "euler" or after == 0:
            state = after / here * state + (1 - after / here) * x0
            continue
        down = after * after / here
        scale = (1 - after) / (1 - down)
        up = (after**2 - (down * scale) ** 2) ** 0.5
        state = scale * (down / here * state + (1 - down / here) * x0)
        state = state + up * torch.randn(x.shape, dtype=x.dtype, generator=noise)
    options: dict[str, Any] = {"sigmas": levels, "prediction": "flow", "sampler": sampler}
    found = sample(velocity, x, **options, exact=True, generator=torch.Generator().manual_seed(0)).sample
    torch.testing.assert_close(found, state, rtol=1e-9, atol=1e-9)


def test_it_may_end_with_noise_left_and_in_a_stream() -> None:
    part = SIGMAS[:8]
    expected = SAMPLERS["euler"](denoised, X, part)
    torch.testing.assert_close(sample(denoised, X, sigmas=part, exact=True).sample, expected, rtol=1e-10, atol=1e-10)
    *_, last = srds_fast.stream(denoised, X, sigmas=part.tolist(), exact=True)
    torch.testing.assert_close(last.latents, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sigmas": None}, "Neither a scheduler nor sigmas"),
        ({"scheduler": DDIMScheduler()}, "scheduler is"),
        ({"num_inference_steps": 20}, "num_inference_steps is 20, and sigmas"),
        ({"sigmas": SIGMAS.flip(0)}, "do not descend"),
        ({"sigmas": [3.0, 2.0, 2.0, 0.0]}, r"sigmas\[2\] is 2"),
        ({"sigmas": [3.0, float("nan"), 0.0]}, r"sigmas\[1\] is nan"),
        ({"sigmas": [float("inf"), 1.0]}, "is inf"),
        ({"sigmas": [1.0, -1.0]}, "is -1"),
        ({"sigmas": [1.0]}, "noise levels of N steps"),
        ({"sigmas": "karras"}, "sigmas is 'karras'"),
        ({"sigmas": SIGMAS[None]}, "shape"),
        ({"prediction": "x1"}, "prediction is 'x1'"),
        ({"prediction": "flow"}, "from 1 down to 0"),
        ({"sampler": "dpm_fast"}, "Known are euler"),
        ({"sampler": ["euler"]}, "sampler is"),
        ({"eta": 0.5}, "add no noise"),
        ({"sampler": "euler_ancestral", "eta": 2.0}, "eta is 2.0"),
        ({"sampler": "euler_ancestral", "s_noise": float("nan")}, "s_noise is nan"),
        ({"noise_sampler": 3}, "noise_sampler is 3"),
        ({"sampler": "euler_ancestral", "noise_sampler": lambda a, b: X[:1]}, "of the shape of x"),
        ({"noise_sampler": lambda a, b: X, "generator": torch.Generator()}, "together with generator"),
        ({"clip_epsilon": True}, "together with sigmas"),
        ({"clip_epsilon": 1}, "clip_epsilon is 1"),
        ({"dummy_draws": [20]}, "dummy_draws"),
        ({"sigmas": None, "scheduler": DDIMScheduler()}, "num_inference_steps is None"),
        ({"sigmas": None, "scheduler": DDIMScheduler(), "num_inference_steps": 5, "prediction": "eps"}, "says itself"),
        ({"sigmas": None, "scheduler": table_of_sigmas(SIGMAS), "num_inference_steps": 5}, "has 20 steps"),
        ({"sigmas": None, "scheduler": table_of_sigmas(SIGMAS), "eta": 0.5}, "eta was given together"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        sample(denoised, X, **{"sigmas": SIGMAS, **change})


def test_a_table_takes_the_place_of_a_scheduler() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(12)
    table = noise_table(scheduler)
    assert isinstance(table, NoiseTable)
    assert table_of_sigmas(SIGMAS) is table_of_sigmas(SIGMAS.clone()), "programs are kept by table"

    def network(x: Tensor, t: Tensor) -> Tensor:
        return x.tanh() * (t[:, None] / 1000)

    expected = sample(network, X, DDIMScheduler(clip_sample=False), 12, method="sequential").sample
    assert torch.equal(sample(network, X, table, method="sequential").sample, expected)
    assert torch.equal(sample(network, X, table, 12, method="sequential").sample, expected)


@pytest.mark.parametrize("method", ["sequential", "srds", "collocation", "auto"])
def test_eps_of_the_clipped_x0(method: str) -> None:
    """`ddim_sample` of denoising-diffusion-pytorch, with the noise that it draws and does not use at eta = 0."""
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    abar = scheduler.alphas_cumprod.double()
    times = torch.linspace(-1, 999, 26).int().flip(0).tolist()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 1.2 * x + 0.1 * (t[:, None] / 1000).sin()

    torch.manual_seed(0)
    x = X / SIGMAS[0]
    for t, after in itertools.pairwise(times):
        x0 = ((x - (1 - abar[t]).sqrt() * network(x, torch.full((2,), t))) / abar[t].sqrt()).clamp(-1, 1)
        eps = (x - abar[t].sqrt() * x0) / (1 - abar[t]).sqrt()
        x = x0
        if after >= 0:
            torch.randn_like(x)
            x = abar[after].sqrt() * x0 + (1 - abar[after]).sqrt() * eps
    state = torch.get_rng_state()
    torch.manual_seed(0)
    settings: dict[str, Any] = {"method": method, "clip_epsilon": True, "dummy_draws": range(24)}
    found = sample(network, X / SIGMAS[0], scheduler, 25, **settings).sample
    assert float((found - x).abs().mean()) <= (1e-6 if method == "sequential" else 4e-3)
    assert torch.equal(torch.get_rng_state(), state)
    without = sample(network, X / SIGMAS[0], scheduler, 25, method="sequential").sample
    assert float((without - x).abs().mean()) > 1e-3, "the clip acts"


def test_clip_epsilon_where_the_step_does_not_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that clips x0 and keeps its eps, as a class of the user's may do."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    table = noise_table(scheduler)
    monkeypatch.setattr(steps, "noise_table", lambda scheduler, **options: table)
    with pytest.raises(UnsupportedScheduler, match="do not make eps again"):
        sample(denoised, X, scheduler, 10, clip_epsilon=True)


def test_draws_that_are_not_used_come_beside_those_that_are() -> None:
    """A loop that also draws in its last step, at t = 0."""
    for method in ("sequential", "srds"):
        torch.manual_seed(0)
        expected = sample(lambda x, t: x * 0.1, X, DDPMScheduler(), 8, method=method).sample
        torch.randn_like(X)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        found = sample(lambda x, t: x * 0.1, X, DDPMScheduler(), 8, method=method, dummy_draws=[7]).sample
        assert torch.equal(found, expected)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "heun"])
def test_a_guess_of_the_sample_is_a_trajectory_to_it(sampler: str) -> None:
    """That of a network which predicts the guess everywhere, with the noise of the call."""
    guess = denoised(X / SIGMAS[0], SIGMAS[-2:-1])

    def run(network: Any, **settings: Any) -> srds_fast.SampleResult:
        torch.manual_seed(0)
        return sample(network, X, sigmas=SIGMAS, sampler=sampler, **settings)

    found = run(lambda x, sigma: guess.repeat(len(x) // 2, 1), method="sequential", keep_trajectory=True)
    table = table_of_sigmas(SIGMAS, sampler=sampler, dtype=torch.float64)
    torch.manual_seed(0)
    draws = draw_noise(table, X, X.dtype)
    torch.testing.assert_close(trajectory_to(table, X, guess, draws), found.trajectory, rtol=1e-10, atol=1e-10)
    expected = run(denoised, method="sequential").sample
    for method in ("collocation", "parataa"):
        warm = run(denoised, method=method, warm_start=expected)
        assert float((warm.sample - expected).abs().mean()) <= 4e-3
        assert warm.report.waves <= run(denoised, method=method).report.waves
    with pytest.raises(InvalidArgument, match="warm_start has shape"):
        run(denoised, method="collocation", warm_start=X[:1])
