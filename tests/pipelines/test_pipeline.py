"""`compile(pipe)`: the drop-in against the pipeline it was made from. Real component classes, tiny sizes."""

from __future__ import annotations

import functools
import inspect
import threading
import time
from functools import partial
from typing import Any

import calls
import numpy as np
import pytest
import tiny
import torch
from calls import assert_close, of_waves, watched
from diffusers import (
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    RePaintScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

import srds_fast
from srds_fast import InvalidArgument, PlanMismatch, UnsupportedPipeline, UnsupportedScheduler
from srds_fast.solvers import program
from srds_fast.solvers.convergence import estimated_error

EXACT_MODES: list[dict[str, Any]] = [
    {"method": "sequential"},
    {"exact": True},
    {"exact": True, "pipelined": False, "coarse_solver": "ddim", "num_blocks": 3},
    {"exact": True, "max_rows": 2},
]
latents = partial(calls.latents, prompt="a cat")


@pytest.mark.parametrize("settings", EXACT_MODES, ids=lambda value: "-".join(value))
@pytest.mark.parametrize("pipeline", ["stable_diffusion", "ddim", "ddim-clipped"])
def test_float64_equals_stock_to_ten_digits(pipeline: str, settings: dict[str, Any]) -> None:
    pipe = tiny.PIPELINES[pipeline.removesuffix("-clipped")][0]().to(torch.float64)
    call: dict[str, Any] = {"prompt": "a cat"}
    if pipeline != "stable_diffusion":
        clipped = True if pipeline == "ddim-clipped" else None
        call = {"batch_size": 2, "output_type": "pt", "use_clipped_model_output": clipped}
    fast = srds_fast.compile(pipe, **{"method": "srds", **settings})
    assert_close(calls.latents(fast, **call), calls.latents(pipe, **call), 1e-10)


@pytest.mark.parametrize(
    ("output_type", "return_dict"), [("pil", True), ("np", False), ("pt", True), ("latent", False), ("latent", True)]
)
def test_the_output_is_the_pipelines_own(sd: Any, output_type: str, return_dict: bool) -> None:
    call = {"prompt": ["a", "b"], "num_inference_steps": 6, "output_type": output_type, "return_dict": return_dict}
    fast = srds_fast.compile(sd, exact=True, method="srds")
    found, expected = (each(**call, generator=torch.Generator().manual_seed(0)) for each in (fast, sd))
    assert type(found) is type(expected)
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert type(ours) is type(theirs)
        if output_type != "latent":
            grey = 1 if output_type == "pil" else 1 / 255
            assert np.abs(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)).max() <= grey


@pytest.mark.parametrize("name", ["stable_diffusion", "flux", "ddim"])
def test_the_drop_in_looks_like_the_pipe_and_what_is_set_on_one_is_set_on_both(name: str, tmp_path: Any) -> None:
    pipe = tiny.PIPELINES[name][0]()
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    assert isinstance(fast, type(pipe))
    assert type(fast).__name__ == type(pipe).__name__
    assert inspect.signature(fast.__call__) == inspect.signature(pipe.__call__)
    assert repr(fast) == repr(pipe)
    assert fast.original is pipe
    assert fast.components.keys() == pipe.components.keys()
    if name == "stable_diffusion":
        fast.save_pretrained(tmp_path)
        again = StableDiffusionPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert_close(latents(again), latents(pipe))
        pipe.scheduler = EulerDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1, timestep_spacing="leading")
        assert_close(latents(fast), latents(pipe))
        fast.vae.enable_slicing()
        assert pipe.vae.use_slicing
    assert fast.to(dtype=torch.float64) is fast
    assert calls.denoiser(pipe).dtype == torch.float64
    if name == "stable_diffusion":
        assert latents(fast).dtype == torch.float64


def test_waves_rows_and_plan_agree_with_the_program(sd: Any) -> None:
    fast = srds_fast.compile(sd, num_blocks=5, max_iterations=2, tolerance=0.0, method="srds")
    assert fast.report is None
    with watched(sd.unet) as seen:
        latents(fast, prompt=["a", "b"], num_inference_steps=25)
    planned = program.srds(25, 5, 2)
    report = fast.report
    seen = of_waves(seen, report)
    assert report.waves == planned.num_waves == len(seen) == 13
    assert report.rows == planned.num_rows == 48
    assert sum(map(len, seen)) == 2 * 2 * planned.num_rows  # two guidance branches, two prompts
    assert (report.method, report.engine, report.path, report.iterations) == ("srds", "eager", "takeover", 2)
    assert report.fallback_reason is None
    assert "waves" in str(report)
    assert "13" in str(report)
    assert fast.plan_for("a", num_inference_steps=25).program().num_waves == 13


def test_the_seconds_hold_every_network_call(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the first one, which is made before the solver knows its starting noise."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    fast = srds_fast.compile(sd, method="sequential")
    with watched(sd.unet, lambda states: clock.append(clock.pop() + 1.0)):
        latents(fast, num_inference_steps=3)
    assert fast.report.seconds == 3.0


def test_the_printed_plan_is_what_a_stopped_call_costs(sd: Any) -> None:
    """Rows begun for iterations that were never needed are part of the cost."""
    fast = srds_fast.compile(sd, method="srds")
    latents(fast, num_inference_steps=36)
    report = fast.report
    assert report.iterations < report.num_blocks
    line = (
        f"after iteration {report.iterations}: waves {report.waves}, rows {report.rows}, peak rows {report.peak_rows}"
    )
    assert line in str(fast.plan_for("a cat", num_inference_steps=36))


def test_samples_leave_the_batch_when_they_have_converged(sd: Any) -> None:
    """Conditioning, latents and timesteps must follow the samples that are left."""
    call = {"prompt": ["a", "b", "c"], "num_inference_steps": 30, "seed": [1, 2, 3], "guidance_scale": 4.0}
    probe = srds_fast.compile(sd, tolerance=0.0, max_iterations=1, method="srds")
    latents(probe, **call)
    # between two samples, so that rounding does not decide who leaves
    first, second, _ = sorted(probe.report.change[0])
    tolerance = estimated_error([(first + second) / 2])
    fast = srds_fast.compile(sd, tolerance=tolerance, method="srds")
    together = latents(fast, **call)
    report = fast.report
    assert sorted(report.iterations_per_sample)[0] < sorted(report.iterations_per_sample)[-1]
    assert report.evaluations < 3 * report.rows
    for one in range(3):
        alone = latents(fast, **{**call, "prompt": call["prompt"][one], "seed": [one + 1]})
        assert fast.report.iterations_per_sample == [report.iterations_per_sample[one]]
        assert_close(together[one : one + 1], alone, 1e-4)


def test_a_stream_can_be_left_and_hands_on_errors(sd: Any) -> None:
    fast = srds_fast.compile(sd, method="srds")
    threads = threading.active_count()
    for _ in fast.stream("a cat", num_inference_steps=20):
        break
    assert fast.report is not None, "of the call, which has ended"
    assert threading.active_count() == threads
    with pytest.raises(ValueError, match="divisible by 8"):
        list(fast.stream("a cat", height=33, width=33))
    with pytest.raises(InvalidArgument, match="callback"):
        fast.stream("a cat", callback=lambda *args: None)


def test_the_progress_bar_counts_steps(capsys: Any) -> None:
    for pipe, call in ((tiny.stable_diffusion(), {"prompt": "a"}), (tiny.ddim(), {})):
        pipe.set_progress_bar_config(disable=False, mininterval=0)
        srds_fast.compile(pipe, max_iterations=2, method="srds")(**call, num_inference_steps=20)
        shown = capsys.readouterr().err
        assert "20/20" in shown
        assert "21/20" not in shown


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ("scheduler", UnsupportedScheduler, "its step takes"),
        ("scheduler", UnsupportedPipeline, "no diffusers pipeline"),
    ],
)
def test_a_part_set_after_compile_is_refused_at_the_call(part: str, error: type[Exception], words: str) -> None:
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, method="srds")
    setattr(fast, part, RePaintScheduler() if error is UnsupportedScheduler else None)
    with pytest.raises(error, match=words):
        latents(fast)


def test_what_is_no_pipeline_is_refused_and_the_loop_of_a_patched_class_is_rehearsed(
    sd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OwnLoop(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    stock = StableDiffusionPipeline.__call__

    @functools.wraps(stock)  # caching libraries wrap it so, and it looks like diffusers' own
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(self, *args, **kwargs)

    for pipe, words in {
        "runwayml/stable-diffusion-v1-5": "str is no diffusers pipeline",
        StableDiffusionPipeline: "StableDiffusionPipeline is a class",
    }.items():
        with pytest.raises(UnsupportedPipeline, match=words):
            srds_fast.compile(pipe, method="srds")
    expected = latents(sd)
    own = srds_fast.compile(OwnLoop(**sd.components, requires_safety_checker=False), method="srds", exact=True)
    fast = srds_fast.compile(sd, method="srds", exact=True)
    assert_close(latents(own), expected)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", patched)
    assert_close(latents(fast), expected)
    for each in (own, fast):
        assert each.report.path == "takeover"
        assert each.report.rehearsal_calls + each.report.check_calls > 0, "nobody has read this loop"


@pytest.mark.parametrize("strength", [None, 0.5])
def test_the_plan_of_a_scheduler_of_second_order_is_that_of_its_calls(strength: float | None) -> None:
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 8, "output_type": "latent"}
    pipe = tiny.stable_diffusion()
    if strength is not None:
        pipe = StableDiffusionImg2ImgPipeline(**pipe.components)
        call |= {"image": torch.rand(1, 3, 16, 16), "strength": strength}
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    plan = srds_fast.compile(pipe, method="srds").plan_for(**call)
    fast = srds_fast.compile(pipe, plan=plan)
    fast(**call)
    assert fast.report.num_inference_steps == plan.num_inference_steps > (8 if strength is None else 4)
    assert fast.report.fallback_reason is None


def test_a_plan_for_other_steps_is_refused_and_planning_does_no_device_work(sd: Any) -> None:
    rng: Tensor = torch.get_rng_state()
    with watched(sd.unet) as seen:
        compiled = srds_fast.compile(sd, num_blocks=3)
        plan = srds_fast.compile(compiled, num_blocks=5, method="srds").plan_for("a", num_inference_steps=30)
    assert seen == []
    assert torch.equal(torch.get_rng_state(), rng)
    assert plan.num_blocks == 5
    with pytest.raises(PlanMismatch, match="30 steps"):
        srds_fast.compile(sd, plan=plan)("a", num_inference_steps=29)
