"""A network call that fails, at every wave, with every method: never a wrong sample, and the next call is as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import tiny
import torch
from faults import FAULTS, Calls, every_wave
from problems import GaussianMixture, noise
from promises import SAME_SAMPLE, call_of, same_law, stock_of
from thinned import thinned, thinned_product
from torch import Tensor, nn

import srds_fast
from srds_fast.solvers.registry import BY_NAME

STEPS = 5
MIXTURE = GaussianMixture.random(dimensions=8)
# class, arguments of a call, name of the network: with and without guidance, and with clipped pixels
PIPELINES = {
    "stable_diffusion": "unet",
    "flux": "transformer",
    "ddim": "unet",
}


@pytest.mark.parametrize(("method", "fault"), thinned_product(BY_NAME, FAULTS))
def test_sample(method: str, fault: str) -> None:
    x, stock = noise(2, 8, dtype=torch.float32), stock_of(method)

    def run(calls: Calls, **settings: Any) -> Tensor:
        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            return calls(MIXTURE(x, t))

        how = call_of(method, exact=True) | settings
        return srds_fast.sample(denoiser, x, stock, STEPS, **how).sample

    # a method that gives another sample gives the sequential one where it falls back
    right = [run(Calls(), method="sequential", exact=False), *([run(Calls())] if same_law(method) else [])]

    def is_right(found: Tensor) -> bool:
        return any(torch.allclose(found, expected, rtol=1e-4, atol=1e-4) for expected in right)

    assert every_wave(FAULTS[fault], run, is_right) > 0


@contextmanager
def through(network: nn.Module, calls: Calls) -> Iterator[None]:
    """The outputs of a network go through `calls`."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (calls(output[0]), *output[1:])
        return type(output)(calls(output[0]))

    handle = network.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def own_error(run: Callable[[Calls], object], fault: str) -> tuple[type[BaseException], ...]:
    """What the stock pipeline raises after this fault."""
    try:
        run(Calls(FAULTS[fault], 2))
    except BaseException as error:
        return (type(error),)
    return ()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every method with every fault, on one of the pipelines; with `--hypothesis-profile full`, on each of them."""
    if metafunc.function is test_pipelines:
        full = metafunc.config.getoption("--hypothesis-profile") == "full"
        names, pairs = list(PIPELINES), enumerate(product(SAME_SAMPLE, FAULTS))
        cases = [(*pair, name) for number, pair in pairs for name in (names if full else [names[number % len(names)]])]
        metafunc.parametrize(("method", "fault", "name"), thinned(cases))


def test_pipelines(method: str, fault: str, name: str) -> None:
    build, call = tiny.PIPELINES[name]
    pipe = build()
    fast = srds_fast.compile(pipe, method=method, exact=True)
    network = getattr(pipe, PIPELINES[name])
    arguments = {**call, "num_inference_steps": STEPS}

    def run_on(pipe: Any, calls: Calls) -> Tensor:
        with through(network, calls):
            found = pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]
        return torch.as_tensor(found)

    expected = run_on(pipe, Calls())
    run_on(fast, Calls())  # rehearses the loop
    assert fast.report.path != "stock"
    own = own_error(lambda calls: run_on(pipe, calls), fault)
    made = every_wave(
        replace(FAULTS[fault], ends_in=(*FAULTS[fault].ends_in, *own)),
        lambda calls: run_on(fast, calls),
        lambda found: torch.allclose(found, expected, rtol=1e-3, atol=1e-3),
    )
    assert made > 0
