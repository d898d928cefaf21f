"""Streams of `sample`: what they give, and how they are left, by any thread or task."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cancelling import MIXTURE, SHAPE, STEPS, Flag, Network, sample
from diffusers import EulerDiscreteScheduler
from problems import alphas_cumprod, noise, scheduler
from torch import Tensor
from waiting import ended, output_of, until

import srds_fast
from srds_fast.planner.exploration import STOCK
from srds_fast.sampling.sample import costs_of_denoisers
from srds_fast.sampling.stream import AsyncStream, Stream
from srds_fast.solvers.registry import BY_NAME


@pytest.mark.parametrize("method", BY_NAME)
def test_a_stream_ends_with_the_final_refinement_which_is_the_sample(method: str) -> None:
    expected = sample(Network(), method=method)
    with sample(Network(), srds_fast.stream, method=method) as stream:
        found = list(stream)
    assert len(found) > 1
    assert [each.final for each in found] == [False] * (len(found) - 1) + [True]
    *before, last = (each.kind for each in found)
    assert set(before) == {"iteration" if BY_NAME[method]().shows_iterations else "x0 preview"}
    assert last == "iteration"
    assert torch.equal(found[-1].latents, expected.sample)
    assert found[-1].latents.dtype == expected.sample.dtype
    assert stream.report.waves == expected.report.waves
    with pytest.raises(srds_fast.InvalidArgument, match="decoder"):
        _ = found[-1].images


class Point:
    """A network that knows a single clean sample predicts it at every step.

    It is given x of unit variance: DDIM's own, and that of Euler after its scaling.
    """

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha = alphas_cumprod()[t.long()].sqrt()[:, None]
        return (x - alpha * 0.5) / (1 - alpha**2).sqrt()


EULER = EulerDiscreteScheduler(timestep_spacing="leading")


@pytest.mark.parametrize("grid", [scheduler(), EULER], ids=["ddim", "euler"])
@pytest.mark.parametrize("loop", ["sequential", STOCK])
def test_a_stream_runs_the_fastest_plan_and_shows_what_the_network_predicts(grid: Any, loop: str) -> None:
    network = Point()
    call = partial(srds_fast.sample, network, grid.init_noise_sigma * noise(*SHAPE), grid, STEPS, method="auto")
    call()
    known = list(costs_of_denoisers._kept.values())[-1]
    for each in known.explorations.values():
        each.state, each._choice, each._why = "frozen", STOCK if loop == STOCK else each._sequential, "of a test"
    expected = call()
    with srds_fast.stream(*call.args, method="auto") as stream:
        *previews, last = stream
    assert expected.report.method == stream.report.method == loop
    assert torch.equal(last.latents, expected.sample)
    assert (last.final, last.kind) == (True, "iteration")
    assert [each.iteration for each in previews] == list(range(2, STEPS, 2)), "up to seven"
    for each in previews:
        assert (each.kind, each.final, each.change) == ("x0 preview", False, None)
        torch.testing.assert_close(each.latents, torch.full(SHAPE, 0.5), atol=2e-4, rtol=0, check_dtype=False)


def test_arguments_of_streams_are_checked() -> None:
    with pytest.raises(TypeError, match="tolerence"):
        sample(Network(), srds_fast.stream, tolerence=1.0)
    for each in (srds_fast.stream, srds_fast.astream):
        with pytest.raises(srds_fast.InvalidArgument, match="observer"):
            sample(Network(), each, observer=print)
        with pytest.raises(srds_fast.InvalidArgument, match="x is"):
            each(Network(), None, scheduler(), STEPS)
    with pytest.raises(srds_fast.InvalidArgument, match="tolerance"):
        next(sample(Network(), srds_fast.stream, tolerance=-1.0))


class Gate:
    """A network that waits in its call with a number until it is let go."""

    def __init__(self, at: int) -> None:
        self.calls, self._at = 0, at
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self._at:
            self.reached.set()
            assert until(self.open.wait)
        return MIXTURE(x, t.long())


def test_a_stream_is_closed_by_another_thread_while_its_reader_waits() -> None:
    gate, read = Gate(3), list[Any]()
    stream: Stream = sample(gate, srds_fast.stream, method="srds")
    reader = threading.Thread(target=lambda: read.extend(stream))
    reader.start()
    assert until(gate.reached.wait)
    closer = threading.Thread(target=stream.close)
    closer.start()
    while not stream._worker.left.is_set():
        pass
    gate.open.set()
    assert ended(closer, reader)
    assert read == []
    assert gate.calls == 3
    assert list(stream) == []
    stream.close()


@pytest.mark.parametrize("how", ["break", "forgotten", "error", "from its own call"])
def test_a_stream_that_is_left_ends_within_a_wave(how: str) -> None:
    gate, closes = Gate(12), list[Callable[[], None]]()

    def close(wave: int, rows: int, settled: int) -> None:
        if closes and wave == 11:
            closes[0]()

    stream: Stream = sample(gate, srds_fast.stream, exact=True, on_wave=close)
    worker = stream._worker
    gate.open = worker.left  # the call goes on as soon as it is to end
    if how == "from its own call":
        closes.append(stream.close)
        list(stream)
    elif how == "error":
        with contextlib.suppress(KeyError), stream:
            for _ in stream:
                raise KeyError
    elif how == "forgotten":
        next(stream)
    else:
        for _ in stream:
            break
    del stream, closes[:]
    gc.collect()
    assert worker._thread is not None
    assert ended(worker._thread)
    assert gate.calls <= 12 < sample(Gate(-1), exact=True).report.waves


def test_a_stream_that_was_closed_before_it_began_makes_no_call() -> None:
    gate = Gate(1)
    stream: Stream = sample(gate, srds_fast.stream)
    stream.close()
    assert (list(stream), gate.calls) == ([], 0)


def test_errors_and_cancelled_calls_reach_the_reader() -> None:
    flag = Flag(4)
    with pytest.raises(srds_fast.Cancelled):
        list(sample(Network(flag.called), srds_fast.stream, cancel=flag))
    assert flag.after == 0
    flag = Flag(4)
    with srds_fast.using(cancel=flag):
        stream = sample(Network(flag.called), srds_fast.stream)
    with pytest.raises(srds_fast.Cancelled):  # the call was made in the block
        list(stream)

    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(sample(Network(broken), srds_fast.stream))


CTRL_C = """
import os, signal, torch, srds_fast
from diffusers import DDIMScheduler

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
calls = 0

def network(x, t):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGINT)
        while not stream._worker.left.is_set():  # until the waiting thread has seen it
            pass
    return 0.1 * x

x, scheduler = torch.randn(1, 4), DDIMScheduler()
for method in ("sequential", "srds"):
    calls = 0
    stream = srds_fast.stream(network, x, scheduler, 40, method=method)
    try:
        list(stream)
    except KeyboardInterrupt:
        print(method, calls)
    calls = 10
    (*_, last) = srds_fast.stream(network, x, scheduler, 40, method=method)
    assert torch.equal(last.latents, srds_fast.sample(network, x, scheduler, 40, method=method).sample)
"""


def test_ctrl_c_ends_a_stream_within_a_wave_and_the_next_one_is_right() -> None:
    said, failed = output_of([sys.executable, "-c", CTRL_C])
    assert said.split() == ["sequential", "3", "srds", "3"], failed


# asyncio


async def read(stream: AsyncStream) -> list[Any]:
    return [each async for each in stream]


def test_an_async_stream_gives_what_a_stream_gives_while_other_tasks_run() -> None:
    beats: list[int] = []

    async def both() -> list[list[Any]]:
        async def beat() -> None:
            while True:
                beats.append(1)
                await asyncio.sleep(0)

        other = asyncio.create_task(beat())
        found = await asyncio.gather(*(read(sample(Network(), srds_fast.astream)) for _ in range(3)))
        other.cancel()
        return found

    expected = list(sample(Network(), srds_fast.stream))
    for found in asyncio.run(both()):
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.iteration, ours.change, ours.final) == (theirs.iteration, theirs.change, theirs.final)
            assert torch.equal(ours.latents, theirs.latents)
    assert beats


@pytest.mark.parametrize("how", ["the task is cancelled", "closed by another task", "left", "timeout"])
def test_an_async_stream_ends_within_a_wave(how: str) -> None:
    gate = Gate(12 if how == "left" else 3)

    async def main() -> None:
        stream: AsyncStream = sample(gate, srds_fast.astream, method="srds", exact=True)
        if how == "left":
            gate.open = stream._worker.left  # the call goes on as soon as it is to end
            async with stream:
                async for each in stream:
                    assert not each.final
                    break
            assert await read(stream) == []
            return
        reader = asyncio.create_task(read(stream))
        assert await asyncio.to_thread(until, gate.reached.wait)
        if how == "closed by another task":
            closer = asyncio.create_task(stream.aclose())
        elif how == "timeout":
            closer = asyncio.create_task(asyncio.wait_for(reader, 0.0))
        else:
            reader.cancel()
            closer = reader
        while not stream._worker.left.is_set():
            await asyncio.sleep(0)
        gate.open.set()
        done = await asyncio.gather(closer, reader, return_exceptions=True)
        if how == "closed by another task":
            assert done == [None, []]
        else:
            assert isinstance(done[1], asyncio.CancelledError)
        assert stream._worker._thread is not None
        assert gate.calls == 3
        assert await read(stream) == []

    asyncio.run(main())
    assert gate.calls <= 12 < sample(Gate(-1), method="srds", exact=True).report.waves


def test_errors_reach_the_task_and_each_task_has_its_own_flag() -> None:
    flags = [Flag(5), Flag(), Flag(2)]

    async def one(flag: Flag) -> Any:
        with srds_fast.using(cancel=flag):
            await asyncio.sleep(0)
            return await asyncio.to_thread(partial(sample, Network(flag.called)))

    async def streamed(flag: Flag) -> Any:
        with srds_fast.using(cancel=flag):
            return (await read(sample(Network(flag.called), srds_fast.astream)))[-1]

    async def main(each: Callable[[Flag], Any]) -> list[Any]:
        return await asyncio.gather(*(each(flag) for flag in flags), return_exceptions=True)

    for each in (one, streamed):
        flags[:] = [Flag(5), Flag(), Flag(2)]
        first, second, third = asyncio.run(main(each))
        assert isinstance(first, srds_fast.Cancelled)
        assert isinstance(third, srds_fast.Cancelled)
        assert torch.equal(getattr(second, "latents", getattr(second, "sample", None)), sample(Network()).sample)
        assert [flag.after for flag in flags] == [0, 0, 0]


def test_a_stream_that_is_collected_waits_for_nothing() -> None:
    """The collector may come in a thread that holds a lock which the call needs in order to end."""
    lock, entered, gone = threading.Lock(), threading.Event(), threading.Event()

    def called() -> None:
        entered.set()
        with lock:
            pass

    def leave() -> None:
        with lock:
            stream: Stream = sample(Network(called), srds_fast.stream)
            workers.append(stream._worker)
            stream._worker.begin(stream._arrived.put)
            until(entered.wait)
            del stream
            gone.set()

    workers: list[Any] = []
    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    assert until(gone.wait)
    (worker,) = workers
    assert ended(leaving, worker._thread)
    assert worker.left.is_set()
