"""The worker makes the images that the pipeline makes when it is called alone, by whatever calls."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import srds_fast
from srds_fast.errors import Cancelled, PlanMismatch
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.serving.batching import PARALLEL, SEQUENTIAL, CallCosts
from srds_fast.serving.contract import ImageRequest, ImageResult, PartialImage, Refused
from srds_fast.serving.kinds import kinds_of
from srds_fast.serving.settings import ServerSettings
from srds_fast.serving.worker import Worker

STEPS = 12
SETTINGS = ServerSettings(steps=(STEPS,), guidance=(3.0,), batch_sizes=(1, 2))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.stable_diffusion()


@pytest.fixture(scope="module")
def plan(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a plan that runs parallel in time."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    srds_fast.compile(pipe, method="srds").plan_for(num_inference_steps=STEPS).save(file)
    return str(file)


@pytest.fixture(scope="module")
def worker(pipe: Any, plan: str) -> Worker:
    made = Worker(pipe, dataclasses.replace(SETTINGS, plan=plan))
    made.warm()
    return made


def asked(prompt: str = "a", **more: Any) -> ImageRequest:
    return ImageRequest(prompt, STEPS, **{"guidance_scale": 3.0, **more})


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image, dtype=int)


def alone(fast: Any, prompt: str = "a", seed: int = 0, **more: Any) -> np.ndarray:
    generator = [torch.Generator().manual_seed(seed)]
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "generator": generator, **more}
    return np.asarray(fast([prompt], **call).images[0], dtype=int)


def test_images_are_those_of_the_pipeline_called_alone(worker: Worker, pipe: Any, plan: str) -> None:
    fast = srds_fast.compile(pipe, plan=srds_fast.Plan.load(plan))
    (result,) = worker.generate([asked(n=3, seed=7)])
    for number, png in enumerate(result.images):
        assert np.abs(pixels(png) - alone(fast, seed=7 + number)).max() <= 1, "up to the rounding of a batch"
    (single,) = worker.generate([asked(seed=9)])
    assert np.array_equal(pixels(single.images[0]), alone(fast, seed=9))
    assert single.images[0] == result.images[2], "three images are two and one, and one is a call of its own"
    assert (single.usage.waves, single.usage.rows) == (fast.report.waves, fast.report.rows)
    assert result.usage.waves > single.usage.waves
    assert result.usage.fallback is None
    assert result.usage.plan.startswith("srds")


def test_requests_that_share_a_call_get_their_own_images(worker: Worker) -> None:
    requests = [asked("a", seed=1), asked("b", seed=2)]
    together = worker.generate(requests)
    for request, result in zip(requests, together, strict=True):
        (single,) = worker.generate([request])
        assert np.abs(pixels(single.images[0]) - pixels(result.images[0])).max() <= 1
        assert result.usage.batch == 2
    assert together[0].usage.waves == together[1].usage.waves


def test_one_step_after_another_is_the_stock_image(worker: Worker, pipe: Any) -> None:
    results = worker.generate([asked(seed=1), asked(seed=2)], way=SEQUENTIAL)
    for seed, result in enumerate(results, start=1):
        assert np.abs(pixels(result.images[0]) - alone(pipe, seed=seed)).max() <= 1
        assert (result.usage.waves, result.usage.plan) == (STEPS, "sequential")


@pytest.mark.parametrize("wanted", [0, 1, 3])
def test_a_stream_shows_previews_and_ends_in_the_same_file(worker: Worker, wanted: int) -> None:
    *previews, last = worker.stream(asked(seed=3, partial_images=wanted))
    assert all(isinstance(each, PartialImage) for each in previews)
    assert [each.index for each in previews] == list(range(len(previews)))
    assert len(previews) <= wanted
    assert bool(previews) == bool(wanted)
    assert isinstance(last, ImageResult)
    (result,) = worker.generate([asked(seed=3)])
    assert last.images == result.images
    assert dataclasses.replace(last.usage, seconds=0) == dataclasses.replace(result.usage, seconds=0)


def test_a_call_can_be_cancelled_and_a_stream_left(worker: Worker, pipe: Any) -> None:
    event, calls = threading.Event(), []

    def look(*_: Any) -> None:
        calls.append(event.is_set())
        if len(calls) == 3:
            event.set()

    handle = pipe.unet.register_forward_pre_hook(look)
    try:
        for call in (lambda: worker.generate([asked()], event), lambda: list(worker.stream(asked(), event))):
            event.clear()
            calls.clear()
            with pytest.raises(Cancelled):
                call()
            assert calls == [False] * 3, "no network call follows"
    finally:
        handle.remove()
    assert worker.generate([asked()])


def test_no_kind_of_request_that_is_served_is_rehearsed_again(pipe: Any, plan: str) -> None:
    served = dataclasses.replace(SETTINGS, guidance=(3.0, 1.0), negative_prompts=True, batch_sizes=(1,), plan=plan)
    worker, fast, calls = Worker(pipe, served), srds_fast.compile(pipe, plan=srds_fast.Plan.load(plan)), list[int]()
    worker.warm()
    for scale, negative in itertools.product((1.0, 3.0), (None, "b")):
        handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            (result,) = worker.generate([asked(seed=4, guidance_scale=scale, negative_prompt=negative)])
        finally:
            handle.remove()
        assert len(calls) == result.usage.waves
        calls.clear()
        more = {} if negative is None else {"negative_prompt": [negative]}
        assert np.array_equal(pixels(result.images[0]), alone(fast, seed=4, guidance_scale=scale, **more))


def test_costs_are_told_of_every_kind(worker: Worker) -> None:
    sizes, told, _ = worker.warmed()
    assert sizes == (1, 2)
    assert [kind for kind, _ in told] == kinds_of(worker.settings)
    for _, costs in told:
        assert costs.seconds(PARALLEL, 1) > 0
        assert costs.seconds(PARALLEL, 1) <= costs.seconds(PARALLEL, 3)
        assert costs.seconds(SEQUENTIAL, 2) > 0


@pytest.mark.parametrize(("of_a_row", "sizes"), [(0.0, (1, 2, 4, 8)), (1.0, (1,))], ids=["free", "in full"])
def test_calls_for_several_images_are_prepared_where_rows_are_cheap(
    pipe: Any, plan: str, monkeypatch: pytest.MonkeyPatch, of_a_row: float, sizes: tuple[int, ...]
) -> None:
    curve = CostCurve((1, 1000), (1.0, 1.0 + 999 * of_a_row))
    worker = Worker(pipe, dataclasses.replace(SETTINGS, batch_sizes="auto", plan=plan))
    monkeypatch.setattr(worker, "_costs", lambda kind: CallCosts(curve, (1,) * STEPS, STEPS))
    assert worker.warm().sizes == sizes
    calls = list[int]()
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        (result,) = worker.generate([asked(n=8)])
    finally:
        handle.remove()
    assert result.usage.waves == len(calls), "nothing was rehearsed"


def test_what_was_recorded_for_every_kind_is_kept(pipe: Any) -> None:
    many = dataclasses.replace(SETTINGS, steps=(12, 9, 6), guidance=(3.0, 1.0), batch_sizes=(1, 2, 4))
    worker = Worker(pipe, many)
    for fast in (worker._fast, worker._step_by_step):
        assert fast._srds.graphs.max_graphs >= 3 * 2 * 3


def test_latency_and_tolerance_of_the_settings_are_those_of_the_calls(pipe: Any) -> None:
    worker = Worker(pipe, dataclasses.replace(SETTINGS, latency="constant", tolerance=0.02))
    plan = worker._fast.plan_for(num_inference_steps=STEPS)
    assert (plan.fixed_by, plan.tolerance) == ("as latency='constant' asks", 0.02)


def test_with_batching_never_each_image_has_a_call_that_was_prepared(pipe: Any, plan: str) -> None:
    worker = Worker(pipe, dataclasses.replace(SETTINGS, batching="never", batch_sizes=(1, 4), plan=plan))
    assert worker.warm().sizes == (1,)


def test_what_a_pipeline_refuses_is_a_refusal(worker: Worker, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused) as caught:
        worker.generate([asked(width=30, height=32)])
    assert caught.value.status in (400, 500)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(pipe.unet, "forward", fail)
    for call in (lambda: worker.generate([asked()]), lambda: list(worker.stream(asked()))):
        with pytest.raises(Refused) as caught:
            call()
        assert (caught.value.status, caught.value.code) == (500, "sampling_failed")
        assert "secret" not in caught.value.message


def test_the_fastest_plan_is_kept_for_batches_too(pipe: Any) -> None:
    worker = Worker(pipe, SETTINGS)
    worker.warm()
    first, again = worker.generate([asked(seed=1)]), worker.generate([asked(seed=1)])
    assert first[0].images == again[0].images
    together = worker.generate([asked(seed=1), asked(seed=2)])
    assert np.abs(pixels(first[0].images[0]) - pixels(together[0].images[0])).max() <= 1


def test_a_pipeline_with_a_loop_of_its_own_has_no_previews() -> None:
    """Such calls run on the stock loop, and say why."""
    pipe = tiny.stable_diffusion()
    pipe.scheduler.step = functools.partial(pipe.scheduler.step)
    worker = Worker(pipe, SETTINGS)
    *previews, last = worker.stream(asked(seed=1, partial_images=3))
    assert previews == []
    assert last.usage.fallback
    assert last.images == worker.generate([asked(seed=1)])[0].images


def test_a_plan_for_other_steps_is_refused(pipe: Any, plan: str, tmp_path: Path) -> None:
    with pytest.raises(PlanMismatch, match=f"is for {STEPS} steps, and the server was set to 50"):
        Worker(pipe, ServerSettings(plan=plan))
    with pytest.raises(OSError, match="nothing"):
        Worker(pipe, ServerSettings(plan=str(tmp_path / "nothing")))


def test_the_model_of_the_settings_is_loaded() -> None:
    worker = Worker.load(ServerSettings(model="digits", steps=(6,)))
    (result,) = worker.generate([ImageRequest("the digit seven", 6, seed=0)])
    assert pixels(result.images[0]).shape == (32, 32, 3)
