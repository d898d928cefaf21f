"""What a user's code reads from the pipeline, in a callback or after a call, is what the stock loop shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
from calls import assert_close, latents
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from thinned import thinned_product

import srds_fast
from srds_fast import UnsupportedPipeline

MODES: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "exact": {"method": "srds", "exact": True},
    "collocation": {"method": "collocation"},
}


def _sd(scheduler: Any, name: str = "stable_diffusion") -> Callable[[], tuple[Any, dict[str, Any]]]:
    build, call = tiny.PIPELINES[name]
    return lambda: (build(scheduler(**tiny.SD_BETAS)), call)


PIPES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "euler": _sd(EulerDiscreteScheduler),
    "two calls a step": _sd(HeunDiscreteScheduler),
    "a corrector": _sd(UniPCMultistepScheduler),
    "a part of the grid": _sd(EulerDiscreteScheduler, "stable_diffusion_xl_img2img"),
    "flux": lambda: (tiny.flux(), tiny.PIPELINES["flux"][1]),
}


@pytest.mark.parametrize(("make", "mode"), thinned_product(PIPES, MODES))
def test_a_callback_reads_the_step_that_it_is_told_of(make: str, mode: str) -> None:
    pipe, call = PIPES[make]()
    seen: list[Any] = []

    def read(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        scheduler, now = pipe.scheduler, getattr(pipe, "_current_timestep", None)
        sigma = scheduler.sigmas[scheduler.step_index]
        timesteps = [float(each) for each in scheduler.timesteps]
        seen.append((step, scheduler.step_index, float(sigma), timesteps, now, pipe.num_timesteps))
        return tensors

    latents(pipe, **call, callback_on_step_end=read)
    stock, seen[:] = list(seen), []
    latents(srds_fast.compile(pipe, **MODES[mode]), **call, callback_on_step_end=read)
    assert seen == stock


def test_an_edit_by_the_sigma_of_the_step_is_that_of_stock() -> None:
    def edit(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * (1 + 0.01 * pipe.scheduler.sigmas[pipe.scheduler.step_index])}

    pipe, call = PIPES["euler"]()
    for settings in MODES.values():
        fast = srds_fast.compile(pipe, **settings)
        assert_close(*(latents(each, **call, callback_on_step_end=edit) for each in (fast, pipe)))


def _brighter(scheduler: Any) -> None:
    scheduler.sigmas *= 1.1


def _others(scheduler: Any) -> None:
    scheduler.set_timesteps(5)


@pytest.mark.parametrize("change", [_brighter, _others])
def test_a_callback_that_changes_the_scheduler_is_refused_and_changes_no_later_call(change: Any) -> None:
    pipe, call = PIPES["euler"]()
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    expected = latents(pipe, **call)

    def act(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            change(pipe.scheduler)
        return tensors

    with pytest.raises(UnsupportedPipeline, match="of the scheduler at step 3"):
        latents(fast, **call, callback_on_step_end=act)
    assert_close(latents(fast, **call, callback_on_step_end=lambda pipe, i, t, tensors: tensors), expected)


@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
def test_after_a_call_the_pipeline_tells_what_it_was_called_with(name: str) -> None:
    build, call = tiny.PIPELINES[name]
    pipe, fast = build(), srds_fast.compile(build(), method="srds")
    for each in (pipe, fast):
        latents(each, **call, guidance_scale=3.0, num_inference_steps=5)
    names = [name for name in vars(pipe) if isinstance(getattr(type(pipe), name[1:], None), property)]
    assert {"_guidance_scale", "_num_timesteps"} < set(names)
    assert {name: getattr(fast, name[1:]) for name in names} == {name: getattr(pipe, name[1:]) for name in names}
    assert fast.guidance_scale == 3.0
    assert not set(names) & set(vars(fast)), "calls on the user's own pipeline steer their loops by these"
    latents(fast, **call, guidance_scale=4.0, num_inference_steps=4)
    assert (fast.guidance_scale, fast.num_timesteps) == (4.0, 4)
