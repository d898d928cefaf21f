"""Schedulers that carry more from step to step than one x0: any that is linear, and known answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from every_scheduler import HISTORIES, made
from hypothesis import given
from hypothesis import strategies as st
from problems import GaussianMixture, noise
from promises import SAME_SAMPLE
from torch import Tensor

from srds_fast import sample
from srds_fast.methods import SRDS
from srds_fast.schedulers.steps import first_order, guessed_history, second_order
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers.contract import Checkpoint

MIXTURE = GaussianMixture.random(8)
# those that draw no noise; their tables are made by the tests: a process that runs none of these need not wait for them
DETERMINISTIC = [(name, config) for name, config in HISTORIES if name != "SASolver" and "algorithm_type" not in config]


class Adams(PNDMScheduler):
    """A class of which the package knows nothing: a DDIM step with a weighted mean of the last outputs."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__(skip_prk_steps=True)
        self.weights = weights
        self.outputs: list[Tensor] = []

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps)
        ratio = self.config.num_train_timesteps // num_inference_steps
        self.timesteps = torch.arange(num_inference_steps).flip(0) * ratio
        self.outputs = []

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        self.outputs = [model_output, *self.outputs][: len(self.weights)]
        weights = self.weights[: len(self.outputs)]
        mean = sum(weight / sum(weights) * output for weight, output in zip(weights, self.outputs, strict=True))
        before = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        after = self._get_prev_sample(sample, int(timestep), before, mean)
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)


@given(
    st.lists(st.floats(0.1, 1.0), min_size=2, max_size=5),
    st.integers(1, 12),
    st.sampled_from(sorted(SAME_SAMPLE)),
    st.integers(0, 99),
)
def test_every_method_is_exact_with_a_linear_class_that_nobody_knows(
    weights: list[float], num_steps: int, method: str, seed: int
) -> None:
    scheduler, x = Adams(weights), noise(2, 8, seed=seed)
    found = sample(lambda x, t: MIXTURE(x, t.long()), x, scheduler, num_steps, method=method, tolerance=0.0)
    scheduler.set_timesteps(num_steps)
    expected = x
    for t in scheduler.timesteps:
        expected = scheduler.step(MIXTURE(expected, t.expand(2)), t, expected).prev_sample
    torch.testing.assert_close(found.sample, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    scheduler.set_timesteps(num_steps)
    memory = noise_table(scheduler).memory
    assert memory is None or memory.vectors <= len(weights)


@pytest.mark.parametrize(("name", "config"), DETERMINISTIC, ids=str)
def test_jumps_arrive_with_the_history_of_a_constant_x0(name: str, config: dict[str, Any]) -> None:
    """Where x0 is the same everywhere, so is eps: the coarse sweep is the sample already, and no block corrects it."""
    scheduler, data, seen = made(name, config), noise(1, 8, seed=1), list[Checkpoint]()
    table, x = noise_table(scheduler), noise(2, 8) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    assert table.draws is None

    def point(scaled: Tensor, t: Tensor) -> Tensor:
        """The output of a network that predicts the same x0 at every state."""
        steps = (t[:, None] == table.timesteps).int().argmax(1)
        scale, p, q = (column[steps][:, None] for column in (table.input_scale, table.p, table.q))
        return (data - p * scaled / scale) / q

    how: dict[str, Any] = {"method": "srds", "max_iterations": 3, "tolerance": 0.0, "observer": seen.append}
    found = sample(point, x, scheduler, 20, **how).sample
    assert len(seen) == 4
    for checkpoint in seen:
        # schedulers compute their coefficients in float32
        torch.testing.assert_close(checkpoint.sample, found, rtol=0, atol=1e-4 * float(found.abs().max()))


@pytest.mark.parametrize(("far", "cut"), [(0, 1), (0, 7), (5, 6), (4, 9), (9, 15)])
@pytest.mark.parametrize(("name", "config"), DETERMINISTIC, ids=str)
def test_what_is_guessed_of_earlier_steps_is_their_history(
    name: str, config: dict[str, Any], far: int, cut: int
) -> None:
    """x0 goes along a line in log-SNR from one step to another one, and is constant before."""
    table = noise_table(made(name, config))
    log_snr = (table.alpha / table.sigma).log()
    way = (log_snr[cut] - log_snr) / (log_snr[cut] - log_snr[far])
    way = way.nan_to_num(1.0, 0.0, 0.0).clamp(max=1.0)  # 0 / 0: two steps at one level
    generator = torch.Generator().manual_seed(0)
    clean, eps, drift = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    x, carried = None, None
    for index in range(cut):
        x0 = clean + (way[index] if index >= far else 1.0) * drift
        if index <= far:  # from there on the scheduler leads
            x = table.alpha[index] * x0 + table.sigma[index] * eps
        assert x is not None
        x, carried = table.step(index, x, (x0 - table.p[index] * x) / table.q[index], carried)
    assert x is not None
    assert carried is not None
    own_eps = (x - table.alpha[cut] * clean) / table.sigma[cut]
    found = guessed_history(table, cut, far)
    assert len(found) == len(carried) == table.carried(cut)
    size = max(float(carried.abs().max()), 1.0) if len(carried) else 1.0
    for guess, vector in zip(found, carried, strict=True):
        expected = guess.x0 * clean + guess.eps * own_eps + guess.drift * drift
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-9 * size)


def test_two_steps_at_one_level_tell_no_slope() -> None:
    """PNDM makes its second step twice. A jump from there has no line to go along."""
    table = noise_table(made("PNDM", {"skip_prk_steps": True}))
    assert table.sigma[1] == table.sigma[2]
    assert second_order(table, 1, 2, 5) == first_order(table, 2, 5)
    assert second_order(table, 0, 2, 5) != first_order(table, 2, 5)


def test_the_report_says_what_is_carried_and_what_did_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of methods that refine all points, the kernels look back at one x0 at most."""
    monkeypatch.setattr("srds_fast.sampling.session.implementation", lambda device: "triton")
    cases = {"DDIM": 1, "DPMSolverMultistep": 2, "HeunDiscrete": 2, "UniPCMultistep": 3, "PNDM": 4}
    for name, vectors in cases.items():
        config = {"PNDM": {"skip_prk_steps": True}, "DDIM": {"clip_sample": False}}.get(name, {})
        for method, looks_back in (("sequential", False), ("srds", False), ("parataa", True), ("collocation", True)):
            scheduler = made(name, config)
            x = noise(1, 8) * float(scheduler.init_noise_sigma)
            report = sample(lambda x, t: MIXTURE(x, t.long()), x, scheduler, 12, method=method).report
            assert report.state_vectors == vectors
            assert report.kernels == ("torch" if looks_back and vectors > 2 else "triton")


@pytest.mark.parametrize(
    ("name", "config"), [("HeunDiscrete", {}), ("KDPM2Discrete", {}), ("PNDM", {}), ("UniPCMultistep", {})], ids=str
)
def test_blocks_may_hold_one_step_of_two_at_one_level(name: str, config: dict[str, Any]) -> None:
    scheduler = made(name, config)
    x, turns = noise(2, 8) * float(scheduler.init_noise_sigma), len(scheduler.timesteps)
    found, expected = (
        sample(lambda x, t: MIXTURE(x, t.long()), x, scheduler, 20, method=method, tolerance=0.0).sample
        for method in (SRDS(num_blocks=turns), "sequential")
    )
    assert torch.equal(found, expected)
