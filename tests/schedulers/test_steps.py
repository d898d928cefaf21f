from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
)

from srds_fast.schedulers import steps
from srds_fast.schedulers.steps import first_order, second_order
from srds_fast.schedulers.verify import noise_table

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("clip_epsilon", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_one_step_in_coefficients_is_the_definition(prediction: str, clip: bool, clip_epsilon: bool) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=clip)
    scheduler.set_timesteps(20)
    table = noise_table(scheduler, clip_epsilon=clip_epsilon)
    x, m = torch.randn(2, 20, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for index in range(20):
        a, b, c, _ = first_order(table, index, index + 1)
        x0 = table.p[index] * x[index] + table.q[index] * m[index]
        found = a * x[index] + b * m[index] + c * (x0 if table.clip is None else x0.clamp(-table.clip, table.clip))
        torch.testing.assert_close(found, table.step(index, x[index], m[index])[0], rtol=1e-12, atol=1e-12)


def test_the_2m_jump_is_diffusers_dpm_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that shares no code: DPMSolverMultistep takes the boundaries as its own grid."""
    monkeypatch.setattr(steps, "LONGEST_EXTRAPOLATION", math.inf)
    ddim = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **SD)
    ddim.set_timesteps(100)
    table = noise_table(ddim)
    bounds = range(0, 100, 10)
    oracle = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, lower_order_final=False, **SD)
    oracle.set_timesteps(timesteps=[int(table.timesteps[b]) for b in bounds])
    generator = torch.Generator().manual_seed(0)
    theirs = ours = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=generator)
    x0_before = None
    for block in range(9):  # the last jump arrives at DPM-Solver's own final sigma, not at DDIM's
        here = bounds[block]
        m = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
        theirs = oracle.step(m, oracle.timesteps[block], theirs).prev_sample
        a, b, c, d = second_order(table, bounds[block - 1] if block else None, here, here + 10)
        x0 = table.p[here] * ours + table.q[here] * m
        ours = a * ours + b * m + c * x0 + (d * x0_before if x0_before is not None else 0)
        x0_before = x0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_2m_jump_does_not_extrapolate_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit takes hold where a jump is longer than half the one before, and nowhere else."""
    ddim = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SD)
    ddim.set_timesteps(100)
    table = noise_table(ddim)
    long, short = ((80, 90, 100), (0, 50, 51))
    limited = [second_order(table, *jump) for jump in (long, short)]
    monkeypatch.setattr(steps, "LONGEST_EXTRAPOLATION", math.inf)
    assert second_order(table, *long) != limited[0]
    assert second_order(table, *short) == limited[1]


def test_the_2m_jump_falls_to_first_order_where_a_log_snr_is_infinite() -> None:
    zero_end = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    zero_end.set_timesteps(10)
    table = noise_table(zero_end)
    assert second_order(table, 4, 7, 10) == first_order(table, 7, 10)
    pure_noise = DDIMScheduler(
        clip_sample=False, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    pure_noise.set_timesteps(10)
    table = noise_table(pure_noise)
    assert second_order(table, 0, 3, 6) == first_order(table, 3, 6)
    assert second_order(table, 3, 6, 9) != first_order(table, 6, 9)
