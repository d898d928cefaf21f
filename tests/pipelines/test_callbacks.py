"""Callbacks and interrupts: what the user's function sees and may do in a loop that turns once per wave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import tiny
import torch
from calls import assert_close, by_turns, denoiser, drive, latents, look, watched
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from thinned import thinned, thinned_product
from torch import Tensor

import srds_fast
from srds_fast import UnsupportedPipeline

STEPS = 9
Callback = Callable[[Any, int, Any, dict[str, Any]], Any]


def at(when: int | None, act: Callable[[Any, dict[str, Any]], dict[str, Any] | None]) -> Callback:
    """A callback that acts at one step, or at every step."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return (act(pipe, tensors) if when in (None, step) else None) or {}

    return callback


def times(factor: float) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    return lambda pipe, tensors: {"latents": tensors["latents"] * factor}


def in_place(name: str, factor: float) -> Callable[[Any, dict[str, Any]], None]:
    """What was repeated for the rows before the change must not be used after it."""

    def act(pipe: Any, tensors: dict[str, Any]) -> None:
        (tensors[name][1] if name == "image" else tensors[name]).mul_(factor)

    return act


def change_the_last(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 2} if step == pipe.num_timesteps - 1 else {}


change = at(4, times(1.1))
change_every_step = at(None, times(1.01))
CHANGES: dict[str, tuple[Callback, str]] = {
    "change": (change, "latents at step 4"),
    "in-place": (at(2, in_place("latents", 1.1)), "latents at step 2"),
    "every-step": (change_every_step, "latents at step 0"),
    "last": (change_the_last, "latents at step"),
    "guidance": (at(3, lambda pipe, tensors: setattr(pipe, "_guidance_scale", 2.0)), "guidance_scale at step 3"),
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
MODES: dict[str, dict[str, Any]] = {"sequential": {"method": "sequential"}, "exact": {"exact": True}}


def listen(pipe: Any, call: dict[str, Any], callback: Callback, **more: Any) -> tuple[Tensor, list[Any]]:
    """Latents of the call, and (step, timestep, latents, number of timesteps) as the callback was told."""
    told: list[Any] = []

    def tell(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        told.append((step, float(timestep), tensors["latents"].clone(), pipe.num_timesteps))
        return callback(pipe, step, timestep, tensors)

    return latents(pipe, **{**call, "output_type": "latent", **more}, callback_on_step_end=tell), told


def assert_as_stock(
    pipe: Any, call: dict[str, Any], callback: Callback, settings: dict[str, Any], path: str = "takeover", **more: Any
) -> str:
    """The sample, and all that the callback is told, are those of the stock loop; returns the fallback reason."""
    expected, stock_told = listen(pipe, call, callback, **more)
    fast = srds_fast.compile(pipe, **{"method": "srds", **settings})
    listen(fast, call, look, **more)  # finds out how the loop runs
    with watched(denoiser(pipe)) as calls:
        found, told = listen(fast, call, callback, **more)
    assert fast.report.path == path
    assert fast.report.waves == len(calls)
    assert_close(found, expected)
    for (*ours, state, length), (*theirs, stock_state, stock_length) in zip(told, stock_told, strict=True):
        assert (ours, length) == (theirs, stock_length)
        assert_close(state, stock_state)
    reason: str = fast.report.fallback_reason
    return reason


@pytest.mark.parametrize(
    ("callback_and_mode", "case"),
    # every callback in every case, and both in both modes
    thinned(
        ((callback, mode), case)
        for (i, callback), (j, mode), (k, case) in product(
            enumerate(["look", *CHANGES]), enumerate(MODES), enumerate(CASES)
        )
        if (i + k) % len(MODES) == j
    ),
    ids=lambda value: "-".join(value),
)
def test_a_callback_sees_and_does_what_it_would_in_the_stock_loop(
    callback_and_mode: tuple[str, str], case: tuple[str, str]
) -> None:
    (kind, mode), (name, scheduler) = callback_and_mode, case
    callback, what = CHANGES.get(kind, (look, ""))
    build, call = tiny.PIPELINES[name]
    reason = assert_as_stock(build(SCHEDULERS[scheduler]()), call, callback, MODES[mode])
    assert reason is None if kind == "look" else f"the callback changed {what}" in reason


@pytest.mark.parametrize("kind", ["look", *CHANGES])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_holds_where_the_loop_makes_its_own_turns(
    kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive(monkeypatch)
    callback, what = CHANGES.get(kind, (look, ""))
    build, call = tiny.PIPELINES["stable_diffusion"]
    reason = assert_as_stock(build(), call, callback, MODES[mode], path="drive")
    assert reason is None if kind == "look" else f"the callback changed {what}" in reason


def test_what_each_step_makes_anew_is_shown_by_turns_of_the_loop(sd: Any) -> None:
    fast = srds_fast.compile(sd, method="sequential")
    found = latents(fast, prompt="a cat", **by_turns(fast))
    assert fast.report.path == "drive"
    assert "is given noise_pred, which each step makes anew" in fast.report.drive_reason
    assert_close(found, latents(sd, prompt="a cat"))
    latents(fast, prompt="a cat", callback_on_step_end=look)
    assert fast.report.path == "takeover", "what holds for one callback does not for another"


@pytest.mark.parametrize("mode", MODES)
def test_a_dictionary_that_the_user_gave_may_be_written_into(mode: str) -> None:
    pipe = tiny.stable_diffusion()
    tiny.add_lora(pipe.unet)

    def listened(pipe: Any) -> Tensor:
        given = {"scale": 1.0}
        change = at(3, lambda pipe, tensors: given.update(scale=0.2))
        return listen(pipe, {"prompt": "a cat", "cross_attention_kwargs": given}, change)[0]

    fast = srds_fast.compile(pipe, **{"method": "srds", **MODES[mode]})
    assert_close(listened(fast), listened(pipe))


def test_out_of_memory_in_a_callback_is_the_user_s(sd: Any) -> None:
    """It is not taken for a wave that did not fit."""

    def decode(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise torch.OutOfMemoryError("no room for the picture")

    fast = srds_fast.compile(sd, method="srds")
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="no room for the picture"):
            listen(fast, {"prompt": "a"}, decode)


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
    assert torch.equal(told[-1][2], found)
    for (*ours, state, _), (*theirs, stock_state, _) in zip(told, stock_told, strict=True):
        assert ours == theirs
        assert state.shape == stock_state.shape
        assert float((state - stock_state).abs().mean()) < 0.1 * float(stock_state.abs().mean())
    assert float((found - expected).abs().flatten(1).mean(1).max()) <= 4e-3


def test_an_official_callback_that_cuts_guidance_off(sd: Any) -> None:
    call = {"prompt": "a cat", "callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.4)}
    fast = srds_fast.compile(sd, exact=True, method="srds")
    assert_close(latents(fast, **call), latents(sd, **call))
    assert "the callback changed prompt_embeds, guidance_scale at step 3" in fast.report.fallback_reason


def _replace_embeds(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Returned without having been shown."""
    return {"prompt_embeds": torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1))}


def _repaint_all(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """It is shown the real mask."""
    assert 0 < float(tensors["mask"].mean()) < 1
    return {"mask": torch.ones_like(tensors["mask"])}


@pytest.mark.parametrize(
    ("name", "act", "shown", "changed", "mode"),
    [
        ("stable_diffusion", _replace_embeds, [], "prompt_embeds", "exact"),
        *(
            ("stable_diffusion", in_place("prompt_embeds", 0.2), ["prompt_embeds"], "prompt_embeds", mode)
            for mode in MODES
        ),
        ("stable_diffusion_controlnet_2", in_place("image", -1), ["image"], "image", "exact"),
        ("stable_diffusion_inpaint", _repaint_all, ["mask"], "mask", "exact"),
    ],
)
def test_other_tensors_may_be_changed(name: str, act: Any, shown: list[str], changed: str, mode: str) -> None:
    build, call = tiny.PIPELINES[name]
    more = {"callback_on_step_end_tensor_inputs": ["latents", *shown]}
    reason = assert_as_stock(build(), call, at(3, act), MODES[mode], **more)
    assert f"changed {changed} at step 3" in reason


@torch.inference_mode()
def test_errors_of_a_callback_come_through_and_the_next_call_works(sd: Any) -> None:
    assert_as_stock(sd, {"prompt": "a"}, change, MODES["exact"], path="drive")
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


def test_without_a_fine_step_a_callback_runs_the_stock_loop(sd: Any) -> None:
    fast = srds_fast.compile(sd, max_iterations=0, method="srds")
    found, told = listen(fast, {"prompt": "a"}, look)
    assert len(told) == STEPS
    assert "max_iterations=0" in fast.report.fallback_reason
    assert torch.equal(found, listen(sd, {"prompt": "a"}, look)[0])


@pytest.mark.parametrize("settings", [{"tolerance": 0.0}, {"method": "sequential"}], ids=["srds", "sequential"])
def test_an_interrupt_from_a_callback_gives_the_newest_whole_sample(sd: Any, settings: dict[str, Any]) -> None:
    fast = srds_fast.compile(sd, **{"method": "srds", **settings})
    call = {"prompt": "a cat", "num_inference_steps": 16}
    checkpoints = []
    if settings.get("method") != "sequential":  # which has none
        checkpoints = [each.latents for each in fast.stream(**call, generator=torch.Generator().manual_seed(0))]

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 9
        return tensors

    found, told = listen(fast, call, interrupt)
    assert len(told) == 10
    assert fast.report.interrupted
    assert "interrupted" in str(fast.report)
    if settings.get("method") == "sequential":
        assert_close(found, listen(sd, call, look)[1][9][2])
    else:
        distances = [float((found - checkpoint).abs().max()) for checkpoint in checkpoints[:-1]]
        assert min(distances) <= 1e-5 * float(found.abs().max())
    assert_close(listen(fast, {"prompt": "a"}, look)[0], listen(sd, {"prompt": "a"}, look)[0])


def test_an_interrupt_from_another_thread_ends_the_call_early(sd: Any) -> None:
    fast = srds_fast.compile(sd, tolerance=0.0, method="srds")
    latents(fast, prompt="a cat", num_inference_steps=25)  # checks the network

    def interrupt_at_the_16th_wave(states: Tensor) -> None:
        if len(calls) == 16:
            thread = threading.Thread(target=setattr, args=(fast, "_interrupt", True))
            thread.start()
            thread.join()

    with watched(sd.unet, interrupt_at_the_16th_wave) as calls:
        image = latents(fast, prompt="a cat", num_inference_steps=25)
    assert len(calls) == fast.report.waves == 16
    assert fast.report.interrupted
    assert image.shape == (1, 4, 16, 16)
    latents(fast, prompt="a cat")
    assert not fast.report.interrupted


@pytest.mark.parametrize(
    ("scheduler", "step"),
    thinned_product([HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler], [3, 4]),
)
def test_latents_changed_between_two_calls_of_a_step_are_those_of_stock(scheduler: Any, step: int) -> None:
    """What the second call keeps of the first one is not changed with them."""

    def change(pipe: Any, now: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 1.05} if now == step else tensors

    pipe = tiny.stable_diffusion(scheduler(**tiny.SD_BETAS))
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 8, "callback_on_step_end": change}
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    assert_close(latents(fast, **call), latents(pipe, **call))
    assert "the callback changed latents" in fast.report.fallback_reason
