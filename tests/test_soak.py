"""Many calls, one after another and at the same time: memory stays where it is, and bits are those of a call alone."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from problems import GaussianMixture, noise
from promises import call_of, stock_of
from torch import Tensor

import srds_fast
from srds_fast import caches
from srds_fast.solvers.registry import BY_NAME

BOUND = 2_000_000
THREADS = 8
MIXTURES = {size: GaussianMixture.random(dimensions=size) for size in range(2, 12)}


@pytest.fixture(autouse=True)
def _small_caches() -> Iterator[None]:
    """So small that entries are given up all the time."""
    caches.limit(0)  # what must stay for pipelines of other tests is not counted
    caches.limit(sum(caches.sizes().values()) + BOUND)
    yield
    caches.limit(caches.DEFAULT_LIMIT)


def sampled(number: int, method: str) -> Tensor:
    """A call of another number of steps, batch and size each time."""
    size = 2 + number % 10
    x = noise(1 + number % 3, size, seed=number)
    steps = 4 + number % 37
    return srds_fast.sample(MIXTURES[size], x, stock_of(method), steps, **call_of(method)).sample


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """48 calls; with `-m exhaustive` 240 as well, and with `--hypothesis-profile full` 1,000 in their place."""
    if metafunc.function is test_memory_is_flat:
        many = 1000 if metafunc.config.getoption("--hypothesis-profile") == "full" else 240
        metafunc.parametrize("calls", [48, pytest.param(many, marks=pytest.mark.exhaustive)])


def test_memory_is_flat(calls: int) -> None:
    """Of `sample` and of a pipeline; objects that the collector knows stand for memory."""
    pipe = tiny.ddim()
    fast = srds_fast.compile(pipe, method="srds")
    before = sum(caches.sizes().values())
    methods, objects = itertools.cycle(BY_NAME), []
    for number in range(calls):
        if number % 10 == 9:  # kinds that come again, and others
            fast(batch_size=1 + number % 3, num_inference_steps=4 + number % 17, output_type="pt")
        else:
            sampled(number, next(methods))
        assert sum(caches.sizes().values()) <= before + BOUND
        if number % (calls // 8) == calls // 8 - 1:
            gc.collect()
            objects.append(len(gc.get_objects()))
    # caches are full after a half
    assert max(objects[-2:]) <= 1.1 * max(objects[3:5])


def test_threads_get_the_bits_of_calls_alone() -> None:
    """Eight at a time, with every method, while they push each other's tables out of the caches."""
    work = [(number, method) for number in range(6) for method in BY_NAME]
    alone = [sampled(*each) for each in work]
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(lambda each: sampled(*each), work))
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def test_threads_on_one_pipeline_get_the_bits_of_calls_alone() -> None:
    fast = srds_fast.compile(tiny.stable_diffusion(), method="srds")
    call: dict[str, Any] = {"prompt": "a cat", "height": 16, "width": 16, "output_type": "latent"}

    def latents(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found: Tensor = fast(**call, num_inference_steps=5 + seed % 3, generator=generator)[0]
        return found

    alone = list(map(latents, range(2 * THREADS)))
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(latents, range(2 * THREADS)))
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
