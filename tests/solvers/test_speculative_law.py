"""The law of speculative samples: that of the sequential sampler, and what tests of it can find.

A path has the law of the sampler if and only if the noise of its steps, (x' - f(x)) / s, is independent and normal. It
can be computed of every step, so a few hundred paths show more than twenty thousand final samples: 2,000 paths of 50
steps of a mixture in the plane are 196,000 numbers, in which a correlation of 0.01 with the state is found at the level
1e-5 with a probability of 1/2. The final samples are compared as well: with 20,000 of each kind, a shift of a
projection by a tenth of its standard deviation is found at the level 1e-6 (D = 0.04 against 0.026).

LEVEL is that of each test: a p-value below it is a fault. Seeds are fixed, so a test that passes does so every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cores import feed, table
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from laws import energy, innovation_tests, innovations, ks_normal, ks_projected, ks_uniform, paired
from problems import GaussianMixture, noise
from promises import noisy
from torch import Tensor

import srds_fast
from srds_fast.methods import Speculative
from srds_fast.planner.choose import choose
from srds_fast.planner.settings import Settings
from srds_fast.solvers import speculative
from srds_fast.solvers.contract import SolverInputs, Trajectory
from srds_fast.solvers.speculative import Drafts, log_ratio, reflected, uniforms

LEVEL = 1e-4
# samples of one call, so that all of its rows fit into the caches
BATCH = 2000


@pytest.mark.parametrize("size", [0.05, 0.7, 3.0])
@pytest.mark.parametrize("dimensions", [1, 3])
def test_the_coupling_has_both_marginals_and_accepts_as_often_as_can_be(size: float, dimensions: int) -> None:
    count, std = 200_000, 0.4
    generator = torch.Generator().manual_seed(dimensions)
    z = torch.randn(1, count, dimensions, dtype=torch.float64, generator=generator)
    mean = noise(1, 1, dimensions, seed=5)
    away = torch.nn.functional.normalize(noise(1, 1, dimensions, seed=6), dim=-1) * size * std
    drafted, spread = (mean + away).expand_as(z), torch.full((1, 1, 1), std, dtype=torch.float64)
    ratio = log_ratio(drafted, mean.expand_as(z), spread, z)
    accepted = torch.rand(ratio.shape, dtype=torch.float64, generator=generator).log() < ratio
    flipped = reflected(z[0], away[0].expand_as(z[0]))
    proposed, found = drafted + std * z, torch.where(accepted[..., None], drafted + std * z, mean + std * flipped)
    for each, centre in ((proposed, mean + away), (found, mean)):
        noise_of = ((each - centre) / std)[0]
        along = noise_of @ torch.nn.functional.normalize(away[0, 0], dim=-1)
        assert min(ks_normal(noise_of), ks_normal(along)) > LEVEL
        assert float((noise_of.T @ noise_of / count - torch.eye(dimensions)).abs().max()) < 5 * math.sqrt(2 / count)
    overlap = 1 - math.erf(size / 2 / math.sqrt(2))  # 1 - TV = 2 Phi(-size / 2)
    share = float(accepted.double().mean())
    assert abs(share - overlap) < 4 * math.sqrt(overlap * (1 - overlap) / count)


def test_steps_without_noise_are_accepted_only_where_the_draft_is_right() -> None:
    mean, std = torch.zeros(1, 2, 3), torch.zeros(1, 1, 1)
    drafted = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 1e-3, 0.0]]])
    assert log_ratio(drafted, mean, std, torch.ones(1, 2, 3)).tolist() == [[0.0, -math.inf]]


def test_the_numbers_that_decide_are_uniform_and_of_each_sample_alone() -> None:
    draws = noise(50, 400, 2)
    found = uniforms(draws)
    assert found.shape == (400, 50)
    assert ks_uniform(found) > LEVEL
    of_noise = 0.5 * (1 + torch.erf(draws[..., 0].T / math.sqrt(2)))
    for shift in range(3):  # of steps
        one, other = found[:, : 50 - shift] - 0.5, of_noise[:, shift:] - 0.5
        assert abs(float((one * other).sum()) * 12 / math.sqrt(one.numel())) < 4
    assert torch.equal(uniforms(draws[:, [7, 3]]), found[[7, 3]])


class Paths(NamedTuple):
    """states: [N + 1, samples, dimensions]; means: of their steps, without noise; sequential: samples of the same z."""

    states: Tensor
    means: Tensor
    spreads: Tensor
    sequential: Tensor

    def tests(self) -> dict[str, float]:
        departs = self.states[:-1][self.spreads > 0]
        return innovation_tests(innovations(self.states, self.means, self.spreads), departs)


class Case(NamedTuple):
    scheduler: Any
    steps: int = 50
    dimensions: int = 2
    window: int = 8
    eta: float = 0.0


CASES = {
    "ddpm": Case(noisy()),
    "ddpm-clipped": Case(DDPMScheduler(clip_sample_range=1.5), steps=30),
    "ddpm-64": Case(noisy(), steps=30, dimensions=64, window=16),
    "ddim-eta": Case(DDIMScheduler(clip_sample=False), steps=30, eta=1.0),
    "euler-ancestral": Case(
        EulerAncestralDiscreteScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"), steps=30
    ),
}


def paths(case: Case, count: int, method: Any = None, begin: int = 0) -> Paths:
    """Paths of speculative sampling, or of another method, on a mixture in closed form. begin: number of the first."""
    network, grid = GaussianMixture.random(case.dimensions), table(case.steps, case.scheduler, case.eta)
    method = method or Speculative(window=case.window)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t.long())

    found = []
    for first in range(begin, begin + count, BATCH):
        size = min(BATCH, begin + count - first)
        x = noise(size, case.dimensions, seed=first) * float(case.scheduler.init_noise_sigma)

        def sampled(method: Any, x: Tensor = x, seed: int = first + 1) -> Any:
            generator = torch.Generator().manual_seed(seed)
            how = {"eta": case.eta, "generator": generator, "method": method, "keep_trajectory": True}
            return srds_fast.sample(denoiser, x, case.scheduler, case.steps, **how)

        states = sampled(method).trajectory
        outputs = [
            denoiser(grid.input_scale[step] * states[step], grid.timesteps[step].expand(size))
            for step in range(case.steps)
        ]
        means = torch.stack([grid.step(step, states[step], m)[0] for step, m in enumerate(outputs)])
        found.append((states, means, sampled("sequential").sample))
    assert grid.spread is not None
    states, means, sequential = zip(*found, strict=True)
    return Paths(torch.cat(states, 1), torch.cat(means, 1), grid.spread, torch.cat(sequential))


@pytest.mark.parametrize("name", CASES)
def test_the_noise_of_every_step_is_new_and_normal(name: str) -> None:
    found = paths(CASES[name], 300 if CASES[name].dimensions == 2 else 100)
    assert min(found.tests().values()) > LEVEL, found.tests()
    assert not torch.allclose(found.states[-1], found.sequential), "it is another sample"


def test_samples_in_step_with_each_other_have_the_law_too() -> None:
    """As turns of a loop must be: the windows of all slide as far as that of the one that is replaced first."""
    case, count = CASES["ddpm"], 120
    grid, network = table(case.steps, case.scheduler), GaussianMixture.random(case.dimensions)
    states = []
    for first in range(0, count, 4):
        x, draws = noise(4, 2, seed=first), noise(case.steps, 4, 2, seed=first + 1)
        states.append(path_together(x, draws, grid, network))
    path = torch.cat(states, 1)
    means = torch.stack(
        [grid.step(step, path[step], network(path[step], grid.timesteps[step].expand(count)))[0] for step in range(50)]
    )
    assert grid.spread is not None
    tests = Paths(path, means, grid.spread, path[-1]).tests()
    assert min(tests.values()) > LEVEL, tests


def path_together(x: Tensor, draws: Tensor, grid: Any, network: Callable[..., Tensor]) -> Tensor:
    """The states of a run whose samples are at the same steps in every wave."""
    plan = choose(grid.num_steps, Settings(method=Speculative(window=8)))
    trajectory = Trajectory(grid.num_steps)
    inputs = SolverInputs(draws, trajectory=trajectory, together=True)
    sample, waves, _ = feed(plan.options.core(x, grid, plan.program(), inputs, bitwise=False), network, grid)
    assert all(wave.shifts is None for wave in waves)
    found = trajectory.stacked(x, sample)
    assert found is not None
    return found


def always(*given: Tensor) -> Tensor:
    return torch.ones_like(log_ratio(*given))


def without_the_square(drafted: Tensor, mean: Tensor, std: Tensor, z: Tensor) -> Tensor:
    away = (drafted - mean).double()
    found = log_ratio(drafted, mean, std, z) + (away.square().sum(2) / (2 * std[..., 0].double() ** 2))
    return found.nan_to_num(-math.inf, posinf=-math.inf)


def by_its_own_noise(draws: Tensor) -> Tensor:
    """The decision uses the noise of the draft that it decides on."""
    return (0.5 * (1 + torch.erf(draws[..., 0].double().T / math.sqrt(2)))).clamp(1e-12, 1 - 1e-12)


def looks_ahead(drafts: Drafts, *given: Any) -> None:
    """The draft of a step is made of the evaluation at the step behind it, which has seen its noise."""
    slide(drafts, *given)
    drafts._intercept = torch.cat([drafts._intercept[1:], drafts._intercept[-1:]])


slide = Drafts._slide
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "no reflection": (speculative, "reflected", lambda z, away: z),
    "all is accepted": (speculative, "log_ratio", always),
    "the ratio without its square": (speculative, "log_ratio", without_the_square),
    "the ratio of the other Gaussian": (speculative, "log_ratio", lambda g, f, std, z: log_ratio(f, g, std, z)),
    "the noise of the draft decides": (speculative, "uniforms", by_its_own_noise),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    assert min(paths(CASES["ddpm"], 800).tests().values()) < LEVEL


@pytest.mark.exhaustive
def test_a_draft_that_looks_ahead_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bias is small: 20,000 paths show it."""
    monkeypatch.setattr(Drafts, "_slide", looks_ahead)
    assert min(paths(CASES["ddpm"], 20_000).tests().values()) < LEVEL


@pytest.mark.exhaustive
@pytest.mark.parametrize("dimensions", [2, 64])
def test_twenty_thousand_samples_are_like_the_sequential_ones(dimensions: int) -> None:
    """Steps, final samples against others of the sequential sampler, and against those of the same noise."""
    case = CASES["ddpm"] if dimensions == 2 else CASES["ddpm-64"]._replace(steps=20)
    found = paths(case, 20_000)
    assert min(found.tests().values()) > LEVEL, found.tests()
    last = found.states[-1]
    assert paired(last, found.sequential) > LEVEL
    others = paths(case, 20_000, method="sequential", begin=20_000).states[-1]
    assert ks_projected(last, others) > LEVEL
    assert energy(last, others) > 0.005


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", ["no reflection", "all is accepted", "the ratio of the other Gaussian"])
def test_final_samples_alone_show_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    others = paths(CASES["ddpm"], 20_000, method="sequential", begin=20_000).states[-1]
    monkeypatch.setattr(*FAULTS[fault])
    last = paths(CASES["ddpm"], 20_000).states[-1]
    assert ks_projected(last, others) < LEVEL
    assert energy(last, others) <= 0.005


def test_the_tests_themselves_tell_laws_apart() -> None:
    """By known answers: a shift and another spread are found, other noise of the same law is not."""
    one, other = noise(1500, 2, seed=1), noise(1500, 2, seed=2)
    assert min(ks_projected(one, other), energy(one, other), ks_normal(one)) > 0.01
    for changed in (other + torch.tensor([0.4, 0.0]), 1.4 * other):
        assert max(ks_projected(one, changed), 0.02 * energy(one, changed), ks_normal(changed)) <= LEVEL
    assert paired(one, one + 0.02 * other) > 0.01
    assert paired(one, one + 0.02 * other + 0.004) < LEVEL
