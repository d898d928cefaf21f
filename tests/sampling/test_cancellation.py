"""`sample`, cancelled at any wave and told of every wave."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cancelling import MIXTURE, STEPS, Flag, Network, at_most_one_call_follows, cancelled, sample
from torch import Tensor, nn

import srds_fast
from srds_fast.engine import cancellation
from srds_fast.solvers.registry import BY_NAME, METHODS


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
