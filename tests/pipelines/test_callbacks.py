"""Callbacks and interrupts: what the user's function sees and may do in a loop that turns once per wave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import tiny
import torch
from calls import assert_close
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from thinned import thinned_product
from torch import Tensor

import srds_fast
from srds_fast import UnsupportedPipeline

STEPS = 9
Callback = Callable[[Any, int, Any, dict[str, Any]], Any]


def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors


def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 1.1} if step == 4 else {}


def change_in_place(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 2:
        tensors["latents"].mul_(1.1)
    return {}


def change_every_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 1.01}


def change_the_last(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 2} if step == pipe.num_timesteps - 1 else {}


def change_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 3:
        pipe._guidance_scale = 2.0
    return {}


CHANGES: dict[str, tuple[Callback, str]] = {
    "change": (change, "latents at step 4"),
    "in-place": (change_in_place, "latents at step 2"),
    "every-step": (change_every_step, "latents at step 0"),
    "last": (change_the_last, "latents at step"),
    "guidance": (change_guidance, "guidance_scale at step 3"),
}
SCHEDULERS = {
    "own": lambda: None,
    "multistep": lambda: DPMSolverMultistepScheduler(**tiny.SD_BETAS, steps_offset=1),
    "noisy": lambda: EulerAncestralDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1),
}
CASES = [
    *(("stable_diffusion", scheduler) for scheduler in SCHEDULERS),
    ("stable_diffusion_inpaint", "multistep"),
    ("stable_diffusion_xl_img2img", "noisy"),
    ("stable_diffusion_controlnet", "own"),
    ("stable_diffusion_3", "own"),
    ("flux", "own"),
]


def listen(pipe: Any, call: dict[str, Any], callback: Callback, **more: Any) -> tuple[Tensor, list[Any]]:
    """Latents of the call, and (step, timestep, latents, number of timesteps) as the callback was told."""
    told: list[Any] = []

    def tell(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        told.append((step, float(timestep), tensors["latents"].clone(), pipe.num_timesteps))
        return callback(pipe, step, timestep, tensors)

    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": STEPS, **call, "output_type": "latent", **more}
    return pipe(**call, generator=generator, callback_on_step_end=tell)[0], told


def assert_told_alike(ours: list[Any], theirs: list[Any]) -> None:
    assert [(step, timestep, length) for step, timestep, _, length in ours] == [
        (step, timestep, length) for step, timestep, _, length in theirs
    ]
    for (_, _, found, _), (_, _, expected, _) in zip(ours, theirs, strict=True):
        assert_close(found, expected)


def assert_as_stock(pipe: Any, call: dict[str, Any], callback: Callback, settings: dict[str, Any], **more: Any) -> Any:
    """The sample, and all that the callback is told, are those of the stock loop; returns the report."""
    expected, stock_told = listen(pipe, call, callback, **more)
    fast = srds_fast.compile(pipe, **{"method": "srds", **settings})
    found, told = listen(fast, call, callback, **more)
    assert_close(found, expected)
    assert_told_alike(told, stock_told)
    assert fast.report.waves == waves_run(pipe, fast, call, callback, **more)
    return fast.report


MODES = {"sequential": {"method": "sequential"}, "exact": {"exact": True}}


@pytest.mark.parametrize(
    ("callback_and_mode", "case"),
    thinned_product(product(["look", *CHANGES], MODES), CASES),
    ids=lambda value: "-".join(value),
)
def test_a_callback_sees_and_does_what_it_would_in_the_stock_loop(
    callback_and_mode: tuple[str, str], case: tuple[str, str]
) -> None:
    (kind, mode), (name, scheduler) = callback_and_mode, case
    callback, what = CHANGES.get(kind, (look, ""))
    build, call = tiny.PIPELINES[name]
    reason = assert_as_stock(build(SCHEDULERS[scheduler]()), call, callback, MODES[mode]).fallback_reason
    assert reason is None if kind == "look" else f"the callback changed {what}" in reason


def waves_run(pipe: Any, fast: Any, call: dict[str, Any], callback: Callback, **more: Any) -> int:
    """Calls of the network in a call like the last one."""
    calls: list[int] = []
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = network.register_forward_pre_hook(lambda *given: calls.append(1))
    listen(fast, call, callback, **more)
    handle.remove()
    return len(calls)


def test_a_change_is_logged_once_and_strict_refuses_it(sd: Any, caplog: Any) -> None:
    fast = srds_fast.compile(sd, method="srds")
    caplog.set_level("WARNING", "srds_fast")
    for _ in range(2):
        listen(fast, {"prompt": "a"}, change_every_step)
    assert [record.message for record in caplog.records if record.name == "srds_fast"] == [
        "StableDiffusionPipeline runs step by step: the callback changed latents at step 0."
    ]
    with pytest.raises(UnsupportedPipeline, match="the callback changed latents at step 4"):
        listen(srds_fast.compile(sd, strict=True, method="srds"), {"prompt": "a"}, change)


def test_every_step_is_told_once_when_a_run_stops_early(sd: Any) -> None:
    """Beyond the exact prefix a state is the one of the last iteration: within the tolerance of stock's."""
    call = {"prompt": ["a", "b"], "num_inference_steps": 25}
    expected, stock_told = listen(sd, call, look)
    fast = srds_fast.compile(sd, method="srds")
    found, told = listen(fast, call, look)
    assert fast.report.waves < 25
    assert fast.report.fallback_reason is None
    assert [entry[:2] for entry in told] == [entry[:2] for entry in stock_told]
    assert torch.equal(told[-1][2], found)
    for (_, _, state, _), (_, _, stock_state, _) in zip(told, stock_told, strict=True):
        assert state.shape == stock_state.shape
        assert float((state - stock_state).abs().mean()) < 0.1 * float(stock_state.abs().mean())
    assert float((found - expected).abs().flatten(1).mean(1).max()) <= 4e-3


def test_an_official_callback_that_cuts_guidance_off(sd: Any) -> None:
    callback = SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    call = {"prompt": "a cat", "num_inference_steps": STEPS, "output_type": "latent", "callback_on_step_end": callback}
    expected = sd(**call, generator=torch.Generator().manual_seed(0))[0]
    fast = srds_fast.compile(sd, exact=True, method="srds")
    found = fast(**call, generator=torch.Generator().manual_seed(0))[0]
    assert_close(found, expected)
    assert "guidance_scale, prompt_embeds at step 3" in fast.report.fallback_reason.replace(
        "prompt_embeds, guidance_scale", "guidance_scale, prompt_embeds"
    )


def _replace_embeds(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Returned without having been shown."""
    other = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1))
    return {"prompt_embeds": other} if step == 3 else {}


def _dim_embeds(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """In place: what was repeated for the rows before the change must not be used after it."""
    if step == 3:
        tensors["prompt_embeds"].mul_(0.2)
    return {}


def _invert_image(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 3:
        tensors["image"][1].mul_(-1)
    return {}


def _repaint_all(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """It is shown the real mask."""
    assert 0 < float(tensors["mask"].mean()) < 1 or step > 3
    return {"mask": torch.ones_like(tensors["mask"])} if step == 3 else {}


@pytest.mark.parametrize(
    ("name", "callback", "shown", "changed", "mode"),
    [
        ("stable_diffusion", _replace_embeds, [], "prompt_embeds", "exact"),
        ("stable_diffusion", _dim_embeds, ["prompt_embeds"], "prompt_embeds", "exact"),
        ("stable_diffusion", _dim_embeds, ["prompt_embeds"], "prompt_embeds", "sequential"),
        ("stable_diffusion_controlnet_2", _invert_image, ["image"], "image", "exact"),
        ("stable_diffusion_inpaint", _repaint_all, ["mask"], "mask", "exact"),
    ],
)
def test_other_tensors_may_be_changed(name: str, callback: Callback, shown: list[str], changed: str, mode: str) -> None:
    build, call = tiny.PIPELINES[name]
    more = {"callback_on_step_end_tensor_inputs": ["latents", *shown]}
    pipe = build()
    expected, stock_told = listen(pipe, call, callback, **more)
    fast = srds_fast.compile(pipe, **{"method": "srds", **MODES[mode]})
    found, told = listen(fast, call, callback, **more)
    assert_close(found, expected)
    assert_told_alike(told, stock_told)
    assert f"changed {changed} at step 3" in fast.report.fallback_reason


def test_errors_of_a_callback_come_through_and_the_next_call_works(sd: Any) -> None:
    fast = srds_fast.compile(sd, exact=True, method="srds")
    call = {"prompt": "a cat"}

    def fails(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        listen(fast, call, fails)
    with pytest.raises(AttributeError) as expected:
        listen(sd, call, lambda *given: None)
    with pytest.raises(AttributeError) as found:
        listen(fast, call, lambda *given: None)
    assert str(found.value) == str(expected.value)
    assert_close(listen(fast, call, look)[0], listen(sd, call, look)[0])


def test_a_callback_in_inference_mode(sd: Any) -> None:
    with torch.inference_mode():
        assert_as_stock(sd, {"prompt": "a"}, change, MODES["exact"])


def test_without_a_fine_step_a_callback_runs_the_stock_loop(sd: Any) -> None:
    fast = srds_fast.compile(sd, max_iterations=0, method="srds")
    found, told = listen(fast, {"prompt": "a"}, look)
    assert len(told) == STEPS
    assert "max_iterations=0" in fast.report.fallback_reason
    assert torch.equal(found, listen(sd, {"prompt": "a"}, look)[0])


@pytest.mark.parametrize("settings", [{"tolerance": 0.0}, {"method": "sequential"}], ids=["srds", "sequential"])
def test_an_interrupt_from_a_callback_gives_the_newest_whole_sample(sd: Any, settings: dict[str, Any]) -> None:
    checkpoints = []
    for refinement in srds_fast.compile(sd, **{"method": "srds", **settings}).stream(
        "a cat", num_inference_steps=16, generator=torch.Generator().manual_seed(0)
    ):
        checkpoints.append(refinement.latents)

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 9
        return tensors

    fast = srds_fast.compile(sd, **{"method": "srds", **settings})
    found, told = listen(fast, {"prompt": "a cat", "num_inference_steps": 16}, interrupt)
    assert len(told) == 10
    assert fast.report.interrupted
    assert "interrupted" in str(fast.report)
    if settings.get("method") == "sequential":
        _, stock_told = listen(sd, {"prompt": "a cat", "num_inference_steps": 16}, look)
        assert_close(found, stock_told[9][2])
    else:
        # the stream was taken over, a call with a callback is driven: guidance is rounded in another order
        distances = [float((found - checkpoint).abs().max()) for checkpoint in checkpoints[:-1]]
        assert min(distances) <= 1e-5 * float(found.abs().max())
    assert_close(listen(fast, {"prompt": "a"}, look)[0], listen(sd, {"prompt": "a"}, look)[0])


def test_an_interrupt_from_another_thread_ends_the_call_early(sd: Any) -> None:
    fast = srds_fast.compile(sd, tolerance=0.0, method="srds")
    calls: list[int] = []

    def interrupt_at_the_16th_wave(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 16:
            thread = threading.Thread(target=setattr, args=(fast, "_interrupt", True))
            thread.start()
            thread.join()

    handle = sd.unet.register_forward_pre_hook(interrupt_at_the_16th_wave)
    try:
        image = fast("a cat", num_inference_steps=25, output_type="latent").images
    finally:
        handle.remove()
    assert len(calls) == fast.report.waves == 16
    assert fast.report.interrupted
    assert image.shape == (1, 4, 16, 16)
    fast("a cat", num_inference_steps=10, output_type="latent")
    assert not fast.report.interrupted
