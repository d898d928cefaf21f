"""Bounds of a predicted x0."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from srds_fast.kernels.common.clamping import Threshold, clamp_slope, clamped, range_of


@given(st.floats(0.5, 1.0), st.floats(1.0, 4.0), st.floats(0.1, 10.0))
def test_a_threshold_is_that_of_diffusers_for_each_x0_alone(quantile: float, most: float, size: float) -> None:
    x0 = size * torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    config = SimpleNamespace(dynamic_thresholding_ratio=quantile, sample_max_value=most)
    threshold = Threshold(quantile, most)
    for found, rows in zip(clamped(x0, threshold), x0, strict=True):
        expected = DDPMScheduler._threshold_sample(SimpleNamespace(config=config), rows)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(clamped(rows, threshold, leading=1), expected)
    assert float(clamped(x0, threshold).abs().max()) <= range_of(threshold) + 1e-6


def test_nan_stays_in_its_x0_and_an_infinite_one_becomes_nan() -> None:
    x0 = torch.zeros(2, 2, 4)
    x0[0, 1, 2], x0[1, 0, 0] = torch.nan, torch.inf
    for clip in (1.0, Threshold(0.9, 2.0)):
        found = clamped(x0, clip)
        assert bool(found[0, 1, 2].isnan())
        assert bool(found[1, 0, 0].isnan())
        assert bool(found[0, 0].isfinite().all())


@pytest.mark.parametrize("clip", [0.5, Threshold(0.6, 8.0)])
def test_the_slope_is_that_of_elements_which_do_not_move_the_bound(clip: float | Threshold) -> None:
    x0 = 2 * torch.randn(3, 2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bound = clip.of(x0, 2) if isinstance(clip, Threshold) else clip
    inside = (x0.abs() < 0.9 * bound) | (x0.abs() > 1.3 * bound)  # far from the quantile
    step = 1e-7
    found = torch.zeros_like(x0)
    for element in range(x0.shape[-1]):
        moved = x0.clone()
        moved[..., element] += step
        found[..., element] = (clamped(moved, clip) - clamped(x0, clip))[..., element] / step
    torch.testing.assert_close(found[inside], clamp_slope(x0, clip)[inside], rtol=1e-4, atol=1e-6)
