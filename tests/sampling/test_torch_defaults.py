"""Samples do not depend on torch's default device and dtype: every table and placeholder names its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import pytest
import tiny
import torch
from calls import assert_close, latents
from diffusers import DDIMScheduler, DDPMWuerstchenScheduler
from every_scheduler import READ, is_sampled, made
from fixed_points import FORMS
from promises import SAME_SAMPLE
from torch import Tensor

import srds_fast
from srds_fast.schedulers.own_loop import OwnLoop, StepCall
from srds_fast.solvers.method import Method
from srds_fast.solvers.registry import BY_NAME

STEPS = 13


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "meta": lambda: torch.device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}
METHODS: dict[str, Method] = {name: BY_NAME[name]() for name in SAME_SAMPLE} | FORMS
defaults = pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)
# of this one the noise is a path whose package, torchsde, recurses without end for times in bfloat16
RECURSES = "CosineDPMSolverMultistep"
SCHEDULERS = {name: config for name, config in reversed(READ) if is_sampled(name, config) and name != RECURSES}
WEIGHTS = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) / 8**0.5
NOISE = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x @ WEIGHTS) * (0.5 + t[:, None].float() / 2000)


def by_hand(scheduler: Any) -> Tensor:
    """The loop of the scheduler itself; it draws from a generator with seed 2."""
    torch.manual_seed(2)  # some draw from the global generator
    loop, x = OwnLoop(scheduler, StepCall.of(scheduler), generator=torch.Generator().manual_seed(2)), NOISE
    # the last timestep of Wuerstchen is where the last step arrives
    for t in loop.timesteps[:-1] if isinstance(scheduler, DDPMWuerstchenScheduler) else loop.timesteps:
        x = loop.step(denoiser(loop.scaled(x), t.expand(2)), x)
    return x


@defaults
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_gives_the_sample_of_the_loop_by_hand(method: Method, default: Any) -> None:
    """The first sample of its kind: no table of another default is kept yet."""
    scheduler = DDIMScheduler(clip_sample=False, beta_end=0.0199 + 1e-6 * list(METHODS.values()).index(method))
    with default():
        found = srds_fast.sample(denoiser, NOISE, scheduler, STEPS, method=method, exact=True).sample
    scheduler.set_timesteps(STEPS)
    assert_close(found, by_hand(scheduler))


@defaults
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_gives_the_sample_of_its_loop_or_a_typed_error(name: str, default: Any) -> None:
    """A scheduler that makes tensors of the default dtype takes other steps by it, by hand too."""
    scheduler = made(name, SCHEDULERS[name], STEPS)
    steps = int(getattr(scheduler, "num_inference_steps", None) or STEPS)
    scheduler.set_timesteps(steps)
    expected = by_hand(copy.deepcopy(scheduler))
    with default():
        try:
            twin = copy.deepcopy(scheduler)
            twin.set_timesteps(steps)
            expected = by_hand(twin)
        except (RuntimeError, TypeError):  # its own loop does not run by this default
            pass
        with suppress(srds_fast.SrdsFastError):
            torch.manual_seed(2)
            found = srds_fast.sample(
                denoiser, NOISE, scheduler, steps, exact=True, generator=torch.Generator().manual_seed(2)
            )
            assert_close(found.sample, expected, 1e-4)


def test_a_scheduler_that_was_made_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        scheduler = DDIMScheduler()
    with pytest.raises(srds_fast.UnsupportedScheduler, match="hold no numbers"):
        srds_fast.sample(denoiser, NOISE, scheduler, STEPS)


@pytest.mark.parametrize("name", ["stable_diffusion", "flux", "ddim"])
def test_pipelines_give_the_image_of_stock_whatever_the_default_dtype(name: str) -> None:
    build, call = tiny.PIPELINES[name]
    pipe = build()
    call = {name: value for name, value in call.items() if name != "output_type"}
    with default_dtype(torch.bfloat16):
        expected = latents(pipe, **call)
        for settings in ({"method": "srds", "exact": True}, {"method": "sequential"}, {"method": "collocation"}):
            assert_close(latents(srds_fast.compile(pipe, **settings), **call), expected, 1e-2)
    assert_close(latents(srds_fast.compile(pipe, method="srds", exact=True), **call), latents(pipe, **call), 1e-4)
