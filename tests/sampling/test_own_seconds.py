"""What a user's functions take is no time of the run: neither what is reported, nor what decides about plans."""

from __future__ import annotations

import time
from typing import Any

import pytest
from problems import noise, scheduler
from torch import Tensor

import srds_fast

STEPS = 4
SLEEP = 0.1


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


@pytest.mark.parametrize("method", ["srds", "sequential"])
@pytest.mark.parametrize("which", ["observer", "on_wave"])
def test_functions_of_the_user_take_no_time_of_the_run(method: str, which: str) -> None:
    called: list[Any] = []

    def slow(*given: Any) -> None:
        called.append(given)
        time.sleep(SLEEP)

    srds_fast.sample(denoiser, noise(1, 6), scheduler(), STEPS, method=method)  # reads the scheduler
    how: dict[str, Any] = {"observer": slow} if which == "observer" else {}
    began = time.perf_counter()
    with srds_fast.using(on_wave=slow if which == "on_wave" else None):
        report = srds_fast.sample(denoiser, noise(1, 6), scheduler(), STEPS, method=method, tolerance=0.0, **how).report
    assert len(called) >= 1
    assert report.seconds <= time.perf_counter() - began - len(called) * SLEEP
