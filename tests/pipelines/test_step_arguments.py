"""Schedulers whose steps are called in their own way, in real pipelines: what a loop gives them, and what it gets."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from calls import assert_close
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
from torch import Tensor

import srds_fast
from bench.workloads.classes import CASES
from srds_fast.pipelines.previews import StockPreviews

STEPS = 6


def cogvideox(cls: type = CogVideoXPipeline) -> Any:
    pipe = CASES["CogVideoXPipeline"].build()
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    pipe.__class__ = cls
    return pipe


def called(pipe: Any, call: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """What a call returns first, and the state of its generator afterwards."""
    given = {name: each.to(dtype) if _is_number(each) else each for name, each in call.items()}
    generator = torch.Generator().manual_seed(0)
    found = pipe.to(dtype)(**given, num_inference_steps=STEPS, generator=generator)[0]
    return torch.as_tensor(found[0] if isinstance(found, list | tuple) else found).double(), generator.get_state()


def _is_number(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().mean() / expected.abs().mean())


@pytest.mark.parametrize("how", [{"method": "sequential"}, {"method": "collocation", "exact": True}], ids=str)
def test_two_draws_a_step_leave_the_generator_where_stock_does(how: dict[str, Any]) -> None:
    call = CASES["CogVideoXPipeline"].call
    expected, state = called(cogvideox(), call)
    fast = srds_fast.compile(cogvideox(), **how)
    for _ in range(2):  # the second call knows its kind
        found, ours = called(fast, call)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
        assert torch.equal(ours, state)
        assert fast.report.path != "stock"


@pytest.mark.parametrize("name", ["IFPipeline", "SanaSprintPipeline"])
def test_the_size_of_the_noise_or_the_level_is_known_to_the_step_alone(name: str) -> None:
    """Deep Floyd's network predicts how much noise a step adds; SCM tells no noise level but by its x0."""
    call = CASES[name].call
    expected, state = called(CASES[name].build(), call)
    for how in ({"method": "sequential"}, {"method": "srds", "exact": True}):
        fast = srds_fast.compile(CASES[name].build(), **how)
        for _ in range(2):  # the second call knows its kind
            found, ours = called(fast, call)
            assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
            assert torch.equal(ours, state)
            assert fast.report.path == "drive"


def test_previews_are_what_the_step_predicts_whatever_noise_it_adds() -> None:
    call = {**CASES["IFPipeline"].call, "num_inference_steps": STEPS}
    pipe, expected, stock = CASES["IFPipeline"].build(), [], []
    step = pipe.scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def step_and_keep(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **{**kwargs, "return_dict": True})
        expected.append(found.pred_original_sample)
        return (found.prev_sample,)

    pipe.scheduler.step = step_and_keep
    StockPreviews(lambda shown: stock.append(shown.sample)).look_at(pipe.scheduler)
    pipe(**call, generator=torch.Generator().manual_seed(0))
    fast = srds_fast.compile(CASES["IFPipeline"].build(), method="sequential")
    *previews, _ = fast.stream(**call, generator=torch.Generator().manual_seed(0))
    assert fast.report.path == "drive"
    assert len(previews) == len(stock) == STEPS - 1
    for ours, theirs, x0 in zip(previews, stock, expected, strict=False):
        assert_close(ours.latents, x0)
        assert_close(theirs, x0)


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "StableCascadePriorPipeline"])
def test_half_precision_loses_no_more_than_stock(name: str) -> None:
    """The loop of the one converts outputs, that of the other its timesteps: draws and steps then differ by more."""
    case = CASES[name]

    def build() -> Any:
        return cogvideox() if name == "CogVideoXPipeline" else case.build()

    expected, state = called(build(), case.call, torch.bfloat16)
    whole, _ = called(build(), case.call)
    fast = srds_fast.compile(build(), method="sequential")
    found, ours = called(fast, case.call, torch.bfloat16)
    assert fast.report.path != "stock"
    assert torch.equal(ours, state)
    assert off(found, expected) < max(0.05, 2 * off(whole, expected))


class Stepping:
    """Changes one of the arguments that a pipeline gives its scheduler."""

    def __init__(self, scheduler: Any, change: Any) -> None:
        self._scheduler, self._change = scheduler, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._scheduler.__class__

    def step(self, m: Tensor, old: Any, t: Tensor, back: Any, x: Tensor, **options: Any) -> Any:
        return self._scheduler.step(m, *self._change(old, t, back), x, **options)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda old, t, back: (old, t - 1, back), "the timestep that it gives its scheduler is not one of its loop"),
        (
            lambda old, t, back: (old, t, back and back - 1),
            "the timestep_back that it gives its scheduler is not one of its loop",
        ),
        (
            lambda old, t, back: (old if back is None else torch.zeros(1), t, back),
            "is not what the step before has returned",
        ),
    ],
)
def test_a_loop_that_gives_other_arguments_runs_as_stock(change: Any, why: str) -> None:
    class Changed(CogVideoXPipeline):
        def prepare_extra_step_kwargs(self, generator: Any, eta: Any) -> Any:  # before the loop, on the call's own copy
            self.__dict__["scheduler"] = Stepping(self.scheduler, change)
            return {"eta": eta, "generator": generator}

    call = CASES["CogVideoXPipeline"].call
    expected, state = called(cogvideox(Changed), call)
    fast = srds_fast.compile(cogvideox(Changed), method="srds")
    found, ours = called(fast, call)
    assert fast.report.path == "stock"
    assert why in fast.report.fallback_reason
    assert torch.equal(found, expected)
    assert torch.equal(ours, state)
