"""Calls of compiled pipelines: cancelled at any network call, whatever they do."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import calls
import modern
import modulars
import pytest
import torch
from calls import denoiser, drive, everything, look, watched
from cancelling import Flag, at_most_one_call_follows
from promises import fitted
from test_stock import chosen
from thinned import thinned_product

import srds_fast
from srds_fast.solvers.registry import METHODS

STEPS = 6
latents = partial(calls.latents, prompt="a cat", num_inference_steps=STEPS)


@contextmanager
def under(flag: Flag, *networks: Any) -> Iterator[None]:
    """In the block, calls are cancelled by the flag, which counts the calls of these networks."""

    def seen(*_: Any) -> None:  # as a hook that returns nothing it only watches
        flag.called()

    hooks = [each.register_forward_pre_hook(seen) for each in networks]
    try:
        with srds_fast.using(cancel=flag):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def ways(pipe: Any, networks: list[Any], make: Callable[[Any], Callable[[], Any]], **settings: Any) -> Any:
    """For `at_most_one_call_follows`. make: what to do with a pipeline that was compiled anew."""

    def begin() -> Callable[[Flag], Any]:
        call = make(srds_fast.compile(pipe, **settings))

        def run(flag: Flag) -> Any:
            with under(flag, *networks):
                return call()

        return run

    return begin


@pytest.mark.parametrize(("method", "path"), thinned_product(METHODS, ["takeover", "drive"]))
def test_a_first_call_is_cancelled_at_any_network_call_and_the_next_one_is_right(
    sd: Any, method: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rehearsal, its checks, its measurements, its waves and its trials."""
    if path == "drive":
        drive(monkeypatch)
    sd = fitted(copy.copy(sd), method)
    before = everything(sd)
    made: list[Any] = []

    def make(fast: Any) -> Callable[[], Any]:
        made.append(fast)
        return lambda: latents(fast)

    at_most_one_call_follows(ways(sd, [sd.unet], make, method=method))
    assert {**everything(sd), "keys": None} == {**before, "keys": None}
    if method != "auto":  # which may take another plan
        expected = latents(made[0])
        for fast in made[1:3]:
            assert torch.equal(latents(fast), expected)


def warm(fast: Any) -> Callable[[], Any]:
    latents(fast)
    return lambda: latents(fast)


def on_stock(fast: Any) -> Callable[[], Any]:
    latents(fast)
    chosen(fast)
    return lambda: latents(fast)


def streamed(fast: Any) -> Callable[[], Any]:
    return lambda: list(fast.stream("a cat", num_inference_steps=STEPS))


def streamed_async(fast: Any) -> Callable[[], Any]:
    async def read() -> list[Any]:
        return [each async for each in fast.astream("a cat", num_inference_steps=STEPS)]

    return lambda: asyncio.run(read())


# what is done with a compiled pipeline, and the settings that it was compiled with
WAYS: dict[str, tuple[Callable[[Any], Callable[[], Any]], dict[str, Any]]] = {
    "warm": (warm, {"method": "srds"}),
    "a callback": (lambda fast: lambda: latents(fast, callback_on_step_end=look), {"method": "srds"}),
    "falls back to the stock loop": (lambda fast: lambda: latents(fast, callback=print, callback_steps=99), {}),
    "chose the stock loop": (on_stock, {}),
    "a warm-up": (lambda fast: lambda: fast.warmup("a cat", num_inference_steps=STEPS), {}),
    "a warm-up with an audit": (
        lambda fast: lambda: fast.warmup("a cat", audit=2, num_inference_steps=STEPS),
        {"method": "srds"},
    ),
    "a calibration": (
        lambda fast: lambda: fast.calibrate("a cat", num_samples=1, num_inference_steps=STEPS),
        {"method": "srds"},
    ),
    "a measured plan": (lambda fast: lambda: fast.plan_for("a cat", measure=True, num_inference_steps=STEPS), {}),
    "a stream": (streamed, {"method": "srds"}),
    "a stream of auto": (streamed, {}),
    "an async stream": (streamed_async, {"method": "srds"}),
    "one row at a time": (lambda fast: lambda: latents(fast), {"method": "srds", "max_rows": 1}),
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_pipeline_does_is_cancelled_at_any_network_call(sd: Any, way: str) -> None:
    make, settings = WAYS[way]
    at_most_one_call_follows(ways(sd, [sd.unet], make, **settings), places=2)


@pytest.mark.parametrize("way", ["first", "warm", "a callback", "stock"])
@pytest.mark.parametrize("name", ["wan", "sdxl controlnet"])
def test_no_other_call_of_a_turn_with_several_is_made(name: str, way: str) -> None:
    """Guidance by two calls, and a ControlNet before its UNet."""
    build, call = modern.PIPELINES[name]
    pipe = build()
    networks = [denoiser(pipe), *([pipe.controlnet] if hasattr(pipe, "controlnet") else [])]
    each = partial(calls.latents, **{**call, "num_inference_steps": 4})

    def make(fast: Any) -> Callable[[], Any]:
        if way == "warm":
            each(fast)
        if way == "stock":
            each(fast)
            chosen(fast)
        more = {"callback_on_step_end": look} if way == "a callback" else {}
        return lambda: each(fast, **more)

    settings = {} if way == "stock" else {"method": "srds"}
    at_most_one_call_follows(ways(pipe, networks, make, **settings), places=2)


@pytest.mark.parametrize("way", ["own", "drive", "fallback", "chosen"])
def test_waves_are_told_of_every_path(sd: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "drive":
        drive(monkeypatch)
    fast = srds_fast.compile(sd, **({} if way == "chosen" else {"method": "srds"}))
    latents(fast)
    if way == "chosen":
        chosen(fast)
    told: list[tuple[int, int, int]] = []
    with fast.using(on_wave=lambda *wave: told.append(wave)), watched(sd.unet) as seen:
        latents(fast, **({"callback": print, "callback_steps": 99} if way == "fallback" else {}))
    numbers, rows, settled = zip(*told, strict=True)
    assert numbers == tuple(range(len(told)))
    if way in ("own", "drive"):
        assert (len(told), sum(rows)) == (fast.report.waves, fast.report.rows)
    else:
        assert fast.report.method == "stock"
        assert (len(told), set(rows)) == (len(seen), {1})
    if way == "chosen":
        assert settled == tuple(range(STEPS))
    assert list(settled) == sorted(settled)


@pytest.mark.parametrize("way", WAYS)
def test_what_on_wave_raises_ends_whatever_a_pipeline_does(sd: Any, way: str) -> None:
    """Nothing is made of it: no fallback, no warning, no plan that was given up."""
    make, settings = WAYS[way]
    call = make(srds_fast.compile(sd, **settings))
    why = torch.OutOfMemoryError("of the user's own")

    def stop(wave: int, rows: int, settled: int) -> None:
        if wave == 1:
            raise why

    with srds_fast.using(on_wave=stop), pytest.raises(torch.OutOfMemoryError) as caught:
        call()
    assert caught.value is why


def test_a_cancelled_call_leaves_its_report_and_the_generator_draws_on(sd: Any) -> None:
    fast = srds_fast.compile(sd, method="srds")
    expected = latents(fast)
    flag = Flag(4)
    with under(flag, sd.unet), pytest.raises(srds_fast.Cancelled) as caught:
        latents(fast)
    assert (fast.report.waves, fast.report.stopped_by, fast.report.converged) == (4, [], [])
    assert (caught.value.waves, fast.report.interrupted) == (4, False)
    assert torch.equal(latents(fast), expected)


def test_a_modular_pipeline_is_cancelled() -> None:
    build, call = modulars.PIPELINES["flux"]
    pipe = build()
    make = partial(partial, output="latents", num_inference_steps=5, **call)
    at_most_one_call_follows(ways(pipe, [pipe.transformer], make, method="srds"), places=3)
