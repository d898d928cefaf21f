"""`sample` and its streams: cancelled at any wave, told of every wave, left by any thread."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cancelling import Flag, at_most_one_call_follows, cancelled
from problems import GaussianMixture, noise, scheduler
from torch import Tensor, nn

import srds_fast
from srds_fast.engine import cancellation
from srds_fast.sampling.stream import AsyncStream, Stream
from srds_fast.solvers.registry import BY_NAME, METHODS

STEPS, SECONDS = 16, 60.0
MIXTURE = GaussianMixture.random(8)
SHAPE = 2, 8


class Network(nn.Module):
    """Predicts eps; `seen` is called in every call."""

    def __init__(self, seen: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen()
        return MIXTURE(x, t.long())


def sample(network: Any, each: Any = srds_fast.sample, steps: int = STEPS, **settings: Any) -> Any:
    return each(network, noise(*SHAPE), scheduler(), steps, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_call_of_every_method_is_cancelled_at_any_network_call_and_the_next_one_is_right(method: str) -> None:
    network, after = Network(), Network()
    srds_fast.sampling.sample.costs_of_denoisers.clear()

    def make() -> Callable[[Flag], Any]:
        def call(flag: Flag) -> Any:
            network.seen = flag.called
            return sample(network, method=method, cancel=flag)

        if method == "auto":  # it measures again, and times other plans
            srds_fast.sampling.sample.costs_of_denoisers.clear()
        return call

    at_most_one_call_follows(make, places=STEPS)
    if method != "auto":  # which may take another plan
        network.seen = lambda: None
        assert torch.equal(sample(network, method=method).sample, sample(after, method=method).sample)


@pytest.mark.parametrize("method", BY_NAME)
def test_waves_are_told_in_order_with_their_rows_and_the_settled_steps(method: str) -> None:
    told: list[tuple[int, int, int]] = []
    report = sample(Network(), method=method, on_wave=lambda *wave: told.append(wave)).report
    numbers, rows, settled = zip(*told, strict=True)
    assert numbers == tuple(range(report.waves))
    assert (sum(rows), max(rows)) == (report.rows, report.peak_rows)
    assert list(settled) == sorted(settled)
    assert 0 == settled[0] < settled[-1] < STEPS or settled[-1] == 0
    if method == "sequential":
        assert told == [(step, 1, step) for step in range(STEPS)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [ValueError, StopIteration, torch.OutOfMemoryError, srds_fast.DivergenceError])
def test_what_on_wave_raises_ends_the_call_with_it(method: str, error: Any) -> None:
    """Also errors that a call handles itself where they come from the network."""
    why = error("no more time")
    flag = Flag()

    def stop(wave: int, rows: int, settled: int) -> None:
        if wave == 3:
            flag.called()
            raise why

    with pytest.raises(error) as caught:
        sample(Network(flag.called), method=method, on_wave=stop)
    assert caught.value is why
    assert flag.calls == 1 + 3


def test_a_cancelled_call_tells_what_it_has_done() -> None:
    network = Network()

    def call(flag: Flag) -> Any:
        network.seen = flag.called
        return sample(network, method="sequential", cancel=flag)

    error = cancelled(call, 5)
    assert (error.waves, error.settled_steps) == (5, 5)
    assert (error.report.waves, error.report.rows, error.report.method) == (5, 5, "sequential")
    assert "5 waves" in str(error)
    event = threading.Event()
    event.set()
    with pytest.raises(srds_fast.Cancelled) as caught:
        sample(network, cancel=event)
    assert (caught.value.waves, caught.value.report) == (0, None)


class Layer(nn.Module):
    """What graphs can hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * (t[:, None] / 1000)


@pytest.mark.parametrize("engine", ["graph", "network-graphs"])
@pytest.mark.parametrize("method", ["srds", "collocation", "paradigms"])
def test_what_is_recorded_by_a_cancelled_call_is_made_anew_or_right(engine: str, method: str) -> None:
    layer, steps = Layer(), 6
    expected = sample(layer, method=method, steps=steps).sample
    seen: list[Callable[[], Any]] = [lambda: None]

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen[0]()
        return layer(x, t)

    def make() -> Callable[[Flag], Any]:
        graphs = srds_fast.Graphs()
        each = partial(sample, network, steps=steps, method=method, engine=engine, graphs=graphs)

        def call(flag: Flag) -> Any:
            seen[0] = flag.called
            with contextlib.suppress(srds_fast.Cancelled):
                each(cancel=flag)
            seen[0] = lambda: None
            for _ in range(3):  # recorded, replayed
                found = each()
                torch.testing.assert_close(found.sample, expected, rtol=1e-9, atol=1e-9)
            assert graphs.stats.replayed
            assert found.report.engine != "eager"
            if flag.is_set():
                each(cancel=flag)

        return call

    at_most_one_call_follows(make, places=3)


def test_a_replay_is_left_before_its_next_launch() -> None:
    layer, graphs, event, iterations = Layer(), srds_fast.Graphs(), threading.Event(), list[int]()
    each = partial(sample, layer, method="srds", engine="graph", graphs=graphs, exact=True)
    expected = each()

    def see(checkpoint: Any) -> None:
        iterations.append(checkpoint.iteration)
        event.set()

    with pytest.raises(srds_fast.Cancelled):
        each(observer=see, cancel=event)
    assert iterations == [0]
    again = each()
    assert again.report.engine == "loop graph"
    torch.testing.assert_close(again.sample, expected.sample, rtol=1e-9, atol=1e-9)


# around calls


def test_using_reaches_all_calls_of_the_block_and_no_other_thread() -> None:
    event = threading.Event()
    event.set()
    network = Network()

    def other_peoples_code() -> Any:
        return sample(network)

    expected = other_peoples_code().sample
    found: list[Any] = []
    with srds_fast.using(cancel=event):
        thread = threading.Thread(target=lambda: found.append(other_peoples_code().sample))
        thread.start()
        thread.join()
        with pytest.raises(srds_fast.Cancelled):
            other_peoples_code()
        with srds_fast.using(cancel=threading.Event()), pytest.raises(srds_fast.Cancelled):
            other_peoples_code()
    assert torch.equal(found[0], expected)
    with pytest.raises(srds_fast.Cancelled):
        srds_fast.using(cancel=event)(other_peoples_code)()
    assert torch.equal(other_peoples_code().sample, expected)


def test_blocks_add_up_and_calls_within_calls_are_told_once() -> None:
    outer: list[int] = []
    inner: list[int] = []
    own: list[int] = []
    waves = sample(Network(), method="sequential").report.waves

    def network(x: Tensor, t: Tensor) -> Tensor:
        if not inner_calls:
            inner_calls.append(sample(Network(), method="sequential"))
        return MIXTURE(x, t.long())

    inner_calls: list[Any] = []
    with (
        srds_fast.using(on_wave=lambda wave, *_: outer.append(wave)),
        srds_fast.using(on_wave=lambda wave, *_: inner.append(wave)),
    ):
        sample(network, method="sequential", on_wave=lambda wave, *_: own.append(wave))
    assert outer == inner == own == list(range(waves))
    flag = Flag(3)
    del inner_calls[:]
    with srds_fast.using(cancel=flag), pytest.raises(srds_fast.Cancelled):
        sample(lambda x, t: sample(Network(flag.called), method="sequential").sample[:1].expand_as(x), strict=True)
    assert flag.after == 0


@pytest.mark.parametrize("wrong", [{"cancel": True}, {"cancel": lambda: True}, {"on_wave": 3}])
def test_what_cannot_be_asked_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(srds_fast.InvalidArgument, match=f"{next(iter(wrong))} is"):
        sample(Network(), **wrong)
    with pytest.raises(srds_fast.InvalidArgument, match=f"{next(iter(wrong))} is"), srds_fast.using(**wrong):
        pass


def test_an_error_of_is_set_ends_the_call_and_nothing_is_looked_at_without_a_question() -> None:
    class Broken:
        def is_set(self) -> bool:
            raise torch.OutOfMemoryError("the flag is gone")

    with pytest.raises(torch.OutOfMemoryError, match="gone"):
        sample(Network(), cancel=Broken())
    watches: list[Any] = []
    sample(Network(lambda: watches.append(cancellation.current())))
    assert set(watches) == {None}


# streams


@pytest.mark.parametrize("method", BY_NAME)
def test_a_stream_ends_with_the_final_refinement_which_is_the_sample(method: str) -> None:
    expected = sample(Network(), method=method)
    with sample(Network(), srds_fast.stream, method=method) as stream:
        found = list(stream)
    assert [each.final for each in found] == [False] * (len(found) - 1) + [True]
    assert torch.equal(found[-1].latents, expected.sample)
    assert found[-1].latents.dtype == expected.sample.dtype
    assert stream.report.waves == expected.report.waves
    with pytest.raises(srds_fast.InvalidArgument, match="decoder"):
        _ = found[-1].images


def test_a_stream_of_auto_shows_iterations() -> None:
    assert len(list(sample(Network(), srds_fast.stream, method="auto", explore=0))) > 1


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
            assert self.open.wait(SECONDS)
        return MIXTURE(x, t.long())


def test_a_stream_is_closed_by_another_thread_while_its_reader_waits() -> None:
    gate, read = Gate(3), list[Any]()
    stream: Stream = sample(gate, srds_fast.stream, method="srds")
    reader = threading.Thread(target=lambda: read.extend(stream))
    reader.start()
    assert gate.reached.wait(SECONDS)
    closer = threading.Thread(target=stream.close)
    closer.start()
    while not stream._worker.left.is_set():
        pass
    gate.open.set()
    closer.join(SECONDS)
    reader.join(SECONDS)
    assert (reader.is_alive(), closer.is_alive(), read) == (False, False, [])
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
    worker._thread.join(SECONDS)
    assert not worker._thread.is_alive()
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
    done = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout.split() == ["sequential", "3", "srds", "3"], done.stderr


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
    gate = Gate(3)

    async def main() -> None:
        stream: AsyncStream = sample(gate, srds_fast.astream, method="srds", exact=True)
        if how == "left":
            gate.open.set()
            async with stream:
                async for each in stream:
                    assert not each.final
                    break
            assert await read(stream) == []
            return
        reader = asyncio.create_task(read(stream))
        await asyncio.to_thread(gate.reached.wait, SECONDS)
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
    before = gate.calls
    assert before < sample(Gate(-1), method="srds", exact=True).report.waves


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
