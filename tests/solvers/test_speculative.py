"""Speculative sampling: what it refuses, what it keeps, and known answers. Its law: test_speculative_law.py."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from calls import assert_close, drive, latents, look
from cores import feed, table
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from problems import GaussianMixture, noise, scheduler
from promises import noisy
from torch import Tensor

import srds_fast
from srds_fast import InvalidArgument, PlanMismatch, UnsupportedScheduler
from srds_fast.methods import Speculative
from srds_fast.planner.choose import candidates, choose
from srds_fast.planner.settings import Settings
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers.contract import SolverInputs

STEPS = 40
MIXTURE = GaussianMixture.random(6)


def network(x: Tensor, t: Tensor) -> Tensor:
    """Elementwise, so that a row has the same bits in a batch of any size."""
    return torch.tanh(3 * x) * (0.3 + t.to(x)[:, None] / 2000)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def run(x: Tensor, generator: Any, **settings: Any) -> Any:
    settings = {"method": Speculative(window=8), **settings}
    return srds_fast.sample(network, x, noisy(), STEPS, generator=generator, **settings)


def test_a_sample_does_not_depend_on_its_companions_or_on_the_width_of_waves() -> None:
    x = noise(3, 6)
    together = run(x, seeds(1, 2, 3))
    alone = [run(x[i : i + 1], seeds(i + 1)) for i in range(3)]
    for i, each in enumerate(alone):
        assert torch.equal(each.sample[0], together.sample[i])
    assert len({each.report.waves for each in alone}) > 1, "each has windows of its own"
    assert together.report.waves == max(each.report.waves for each in alone) < STEPS / 2
    narrow = run(x, seeds(1, 2, 3), max_rows=3)
    assert torch.equal(narrow.sample, together.sample)
    assert narrow.report.peak_rows == 3
    assert narrow.report.waves > together.report.waves
    assert narrow.report.rows == together.report.rows


@pytest.mark.parametrize("several", [False, True])
def test_generators_end_where_those_of_the_stock_loop_do(several: bool) -> None:
    x = noise(2, 6)
    states = []
    for method in ("sequential", "speculative"):
        generators = seeds(4, 5) if several else seeds(4)
        run(x, generators if several else generators[0], method=method)
        states.append([each.get_state() for each in generators])
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_with_a_window_of_one_step_it_is_the_sequential_sampler(eta: float) -> None:
    for stock in (noisy(), DDPMScheduler(), scheduler(), DDIMScheduler(), EulerAncestralDiscreteScheduler()):
        x = noise(2, 6) * float(stock.init_noise_sigma)
        how = {"eta": eta if isinstance(stock, DDIMScheduler) else None}
        found, expected = (
            srds_fast.sample(network, x, stock, 12, generator=seeds(1)[0], method=method, **how)
            for method in (Speculative(window=1), "sequential")
        )
        torch.testing.assert_close(found.sample, expected.sample, rtol=1e-9, atol=1e-9)
        assert (found.report.waves, found.report.rows) == (12, 12)


def test_where_one_clean_sample_is_predicted_everywhere_the_second_wave_is_the_last() -> None:
    """The first one has no evaluation to draft with, and the second one those of all steps."""
    data, grid = noise(1, 6, seed=1), table(STEPS, noisy())

    def point(x: Tensor, t: Tensor) -> Tensor:
        steps = (t[:, None] == grid.timesteps).int().argmax(1)
        return (x - grid.alpha[steps][:, None] * data) / grid.sigma[steps][:, None]

    method = Speculative(window=STEPS, data_std=1e-3)
    found = srds_fast.sample(point, noise(2, 6), noisy(), STEPS, generator=seeds(1)[0], method=method)
    assert found.report.waves == 2
    torch.testing.assert_close(found.sample, data.expand(2, 6), rtol=0, atol=1e-4)


def test_momentum_is_carried_through_drafts() -> None:
    """DPM-Solver++(2M) SDE looks back at one x0. With a window of one step it is the sequential sampler."""
    stock = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2, use_karras_sigmas=True)
    stock.set_timesteps(12)
    grid = noise_table(stock)
    if (why := Speculative().why_not(grid)) is not None:
        with pytest.raises(UnsupportedScheduler, match=why[:20]):
            srds_fast.sample(network, noise(2, 6), stock, 12, method="speculative")
        return
    found, expected = (
        srds_fast.sample(network, noise(2, 6), stock, 12, generator=seeds(1)[0], method=method)
        for method in (Speculative(window=1), "sequential")
    )
    torch.testing.assert_close(found.sample, expected.sample, rtol=1e-9, atol=1e-9)


def test_constraints_hold_in_every_state() -> None:
    """As in inpainting: a part of every state is known."""
    grid, x = table(STEPS, noisy()), noise(3, 6)
    known = torch.arange(6) < 3
    seen: list[tuple[int, ...]] = []

    def constrain(state: Tensor, position: int, samples: tuple[int, ...]) -> Tensor:
        seen.append(samples)
        return torch.where(known, float(position), state)

    plan = choose(STEPS, Settings(method=Speculative(window=8)))
    inputs = SolverInputs(noise(STEPS, 3, 6, seed=3), constrain)
    sample, waves, _ = feed(plan.options.core(x, grid, plan.program(), inputs, bitwise=False), network, grid)
    assert bool((sample[:, :3] == STEPS).all())
    assert len(waves) < STEPS
    assert set(seen) == {(0, 1, 2)}
    for wave in waves:
        assert wave.shifts is None
        for position, state in list(zip(wave.positions, wave.x, strict=True))[1:]:
            assert bool((state[:, :3] == position).all())


REFUSED: list[tuple[Any, dict[str, Any], Any, str]] = [
    (scheduler(), {}, UnsupportedScheduler, "its steps add no noise .those of DDIM do with eta above 0"),
    (noisy(), {"exact": True}, InvalidArgument, "exact=True was given together with method='speculative'"),
    (noisy(), {"tolerance": 0.0}, InvalidArgument, "tolerance=0 was given together with method='speculative'"),
    (noisy(), {"max_iterations": 3}, InvalidArgument, "max_iterations was given together with a window"),
]


@pytest.mark.parametrize(("stock", "settings", "error", "says"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_it_cannot_do_is_refused(stock: Any, settings: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        srds_fast.sample(network, noise(1, 6), stock, 12, method="speculative", **settings)


def test_steps_whose_noise_is_not_known_are_refused() -> None:
    grid = table(12, noisy())
    assert Speculative().why_not(grid) is None
    assert "noise in a way of their own" in str(Speculative().why_not(replace(grid, step_noise=object())))  # type: ignore[arg-type]
    assert "how much noise" in str(Speculative().why_not(replace(grid, learned=object())))  # type: ignore[arg-type]
    pipe = tiny.stable_diffusion()
    with pytest.raises(UnsupportedScheduler, match="its steps add no noise"):
        latents(srds_fast.compile(pipe, method="speculative"), prompt="a cat", num_inference_steps=2)


def test_a_plan_that_asks_for_the_sequential_sample_too_is_no_plan(tmp_path: Any) -> None:
    plan = choose(12, Settings(method="speculative"))
    plan.save(tmp_path / "plan.json")
    assert srds_fast.Plan.load(tmp_path / "plan.json") == plan
    replace(plan, exact=True).save(tmp_path / "plan.json")
    with pytest.raises(PlanMismatch, match="exact=True was given together"):
        srds_fast.Plan.load(tmp_path / "plan.json")


def test_auto_takes_another_sample_only_if_it_may() -> None:
    def methods(stochastic: bool, **settings: Any) -> set[str]:
        return {plan.method for plan in candidates(50, Settings(**settings), stochastic)}

    assert "speculative" not in methods(stochastic=True)
    assert "speculative" not in methods(stochastic=False, same="law")
    assert "speculative" not in methods(stochastic=True, same="law", exact=True)
    assert methods(stochastic=True, same="law") == methods(stochastic=True) | {"speculative"}
    with pytest.raises(InvalidArgument, match="same is 'seed'"):
        Settings(same="seed")


class Slow:
    """A network whose calls take as long as so many rows, told by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.now += 1.0 + 0.02 * len(x)
        return MIXTURE(x, t.long())


def test_auto_runs_it_where_it_is_the_fastest_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Slow(monkeypatch)
    for same, method in (("law", "speculative"), ("sample", "parataa")):
        srds_fast.sampling.sample.costs_of_denoisers.clear()
        how: dict[str, Any] = {"method": "auto", "same": same}
        for _ in range(4):
            found = srds_fast.sample(denoiser, noise(1, 6), noisy(), 30, generator=seeds(1)[0], **how)
        assert found.report.method == method, found.report
        assert ("same law" in found.report.stopped_by) == (same == "law")


@pytest.mark.parametrize("path", ["takeover", "drive", "callback"])
@pytest.mark.parametrize("images", [1, 2])
def test_pipelines(path: str, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of one step shows that the network calls are right at steps of their own; guidance is on."""
    if path == "drive":
        drive(monkeypatch)
    pipe = tiny.stable_diffusion(DDPMScheduler())
    call: dict[str, Any] = {"prompt": "a cat", "num_images_per_prompt": images, "seed": list(range(images))}
    call |= {"num_inference_steps": 4}
    told: list[int] = []

    def tell(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        told.append(step)
        return look(pipe, step, timestep, tensors)

    more = {"callback_on_step_end": tell} if path == "callback" else {}
    one = srds_fast.compile(pipe, method=Speculative(window=1))
    assert_close(latents(one, **call, **more), latents(pipe, **call), 1e-4)
    fast = srds_fast.compile(pipe, method=Speculative(window=3))
    told.clear()
    found = latents(fast, **call, **more)
    assert fast.report.path == ("drive" if path == "drive" else "takeover")
    assert set(fast.report.stopped_by) == {"same law"}
    assert fast.report.rows > fast.report.waves
    assert torch.equal(latents(fast, **call, **more), found)
    assert path != "callback" or told == [*range(4), *range(4)]
    if path == "takeover" and images > 1:  # each as if alone, up to the rounding of another batch
        alone = latents(fast, **{**call, "num_images_per_prompt": 1, "seed": [1]})
        assert_close(alone[0], found[1], 1e-3)


def test_previews_show_each_sample_at_its_own_step() -> None:
    with srds_fast.stream(network, noise(3, 6), noisy(), STEPS, generator=seeds(1, 2, 3), method="speculative") as seen:
        *previews, last = seen
    assert {each.kind for each in previews} == {"x0 preview"}
    assert previews[0].latents.shape == last.latents.shape
    expected = srds_fast.sample(network, noise(3, 6), noisy(), STEPS, generator=seeds(1, 2, 3), method="speculative")
    assert torch.equal(last.latents, expected.sample)


def test_an_interrupt_gives_the_states_that_samples_have_reached() -> None:
    pipe = tiny.stable_diffusion(DDPMScheduler())
    fast = srds_fast.compile(pipe, method=Speculative(window=3))
    call: dict[str, Any] = {"prompt": "a cat", "num_images_per_prompt": 2, "seed": [0, 1], "num_inference_steps": 5}
    latents(fast, **call)
    count = threading.local()

    def stop(*_: Any) -> None:
        count.calls = getattr(count, "calls", 0) + 1
        if count.calls == 3:
            fast._interrupt = True

    hook = pipe.unet.register_forward_pre_hook(stop)
    found = latents(fast, **call)
    hook.remove()
    assert (fast.report.interrupted, fast.report.stopped_by) == (True, ["interrupted"] * 2)
    assert bool(found.isfinite().all())
