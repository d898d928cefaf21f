"""diffusers' `_interrupt`: it ends one call, at its next wave, whatever that call is doing."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import calls
import pytest
import torch
from calls import drive
from cancelling import Flag
from promises import fitted
from test_stock import chosen
from waiting import ended, until

import srds_fast
from srds_fast.pipelines.interrupts import Interrupts
from srds_fast.solvers.registry import BY_NAME

STEPS = 9
latents = partial(calls.latents, prompt="a cat")


@pytest.mark.parametrize("place", range(1, 9))
@pytest.mark.parametrize("path", ["takeover", "drive"])
def test_an_interrupted_first_call_returns_what_it_has(
    sd: Any, path: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the checks before its first wave."""
    if path == "drive":
        drive(monkeypatch)
    fast = srds_fast.compile(sd, method="srds", exact=True)
    expected = latents(srds_fast.compile(sd, method="srds", exact=True))
    flag = Flag(place)

    def interrupt(*_: Any) -> None:
        flag.called()
        if flag.is_set():
            fast._interrupt = True

    hook = sd.unet.register_forward_pre_hook(interrupt)
    found = latents(fast)
    hook.remove()
    assert flag.after <= 1
    assert fast.report.interrupted
    assert fast.report.fallback_reason is None
    assert found.isfinite().all()
    assert torch.equal(latents(fast), expected)
    assert not fast.report.interrupted


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_an_interrupted_trial_changes_nothing_of_the_sample(sd: Any, share: float) -> None:
    """A first call with "auto" measures, runs, and times other plans."""
    whole, flag = Flag(), Flag()

    def interrupt(*_: Any) -> None:
        flag.called()
        if flag.is_set():
            fast._interrupt = True

    def count(*_: Any) -> None:
        whole.called()

    hook = sd.unet.register_forward_pre_hook(count)
    latents(srds_fast.compile(sd))
    hook.remove()
    fast, flag = srds_fast.compile(sd), Flag(int(share * whole.calls))
    hook = sd.unet.register_forward_pre_hook(interrupt)
    found = latents(fast)
    hook.remove()
    assert flag.after <= 1
    if not fast.report.interrupted:
        assert float((found - latents(sd)).abs().mean()) <= 4e-3


@pytest.mark.parametrize("what", ["calibrate", "plan_for", "warmup"])
def test_an_interrupt_ends_what_makes_several_calls(sd: Any, what: str) -> None:
    # how many calls are made after the second depends on what they take
    fast, flag = srds_fast.compile(sd), Flag(2)

    def interrupt(*_: Any) -> None:
        flag.called()
        if flag.calls == 2:
            fast._interrupt = True

    hook = sd.unet.register_forward_pre_hook(interrupt)
    if what == "warmup":
        assert fast.warmup("a cat", num_inference_steps=STEPS).interrupted
    elif what == "plan_for":
        with pytest.raises(srds_fast.Cancelled, match="interrupted"):
            fast.plan_for("a cat", measure=True, num_inference_steps=STEPS)
    else:
        with pytest.raises(srds_fast.Cancelled, match="interrupted"):
            fast.calibrate("a cat", num_samples=1, num_inference_steps=STEPS)
    hook.remove()
    assert flag.after <= 1
    assert float((latents(fast) - latents(sd)).abs().mean()) <= 4e-3


class Turns:
    """Two threads whose network calls take turns: the first `held` waits in its call with a number."""

    def __init__(self, network: Any, at: int) -> None:
        self.at, self.count = at, dict[int, int]()
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.held: int | None = None
        self.act: Callable[[], None] = lambda: None
        self.hook = network.register_forward_pre_hook(self.called)

    def called(self, *_: Any) -> None:
        thread = threading.get_ident()
        number = self.count[thread] = self.count.get(thread, 0) + 1
        if thread == self.held and number == self.at:
            self.act()
            self.reached.set()
            assert until(self.go_on.wait)


@pytest.mark.parametrize("method", [*BY_NAME, "stock"])
def test_an_interrupt_ends_the_call_of_its_thread_and_no_other(sd: Any, method: str) -> None:
    """It is set in a wave of one, while another runs and a third begins."""
    sd = fitted(copy.copy(sd), method)
    fast = srds_fast.compile(sd, **({} if method == "stock" else {"method": method}))
    expected = latents(fast, 1)
    if method == "stock":
        chosen(fast)
        expected = latents(fast, 1)
    turns = Turns(sd.unet, 3)
    reports: dict[str, Any] = {}
    calls_made: dict[str, int] = {}

    def first() -> None:
        turns.held = threading.get_ident()
        turns.act = lambda: setattr(fast, "_interrupt", True)
        latents(fast, 0)
        reports["first"], calls_made["first"] = fast.report, turns.count[threading.get_ident()]

    thread = threading.Thread(target=first)
    thread.start()
    assert until(turns.reached.wait)
    found = latents(fast, 1)
    reports["second"] = fast.report
    turns.go_on.set()
    assert ended(thread)
    turns.hook.remove()
    assert torch.equal(found, expected)
    assert not reports["second"].interrupted
    assert calls_made["first"] == 3
    assert reports["first"].interrupted or method == "stock"
    assert torch.equal(latents(fast, 1), expected)


@pytest.mark.parametrize("where", ["compiled", "original"])
def test_an_interrupt_from_elsewhere_ends_the_call_that_began_first(sd: Any, where: str) -> None:
    fast = srds_fast.compile(sd, method="srds", exact=True)
    expected = latents(fast, 1)
    turns = Turns(sd.unet, 3)
    reports: list[Any] = []

    def first() -> None:
        turns.held = threading.get_ident()
        latents(fast, 0)
        reports.append(fast.report)

    thread = threading.Thread(target=first)
    thread.start()
    assert until(turns.reached.wait)
    setter = threading.Thread(target=setattr, args=({"compiled": fast, "original": sd}[where], "_interrupt", True))
    setter.start()
    setter.join()
    assert torch.equal(latents(fast, 1), expected)
    assert not fast.report.interrupted
    turns.go_on.set()
    assert ended(thread)
    turns.hook.remove()
    assert reports[0].interrupted
    assert turns.count[turns.held or 0] == 3


def test_a_mark_that_no_call_has_taken_is_dropped(sd: Any) -> None:
    fast = srds_fast.compile(sd, method="srds")
    fast._interrupt = True
    assert sd._interrupt is fast._interrupt is True
    latents(fast)
    assert not fast.report.interrupted
    sd._interrupt = True
    latents(fast)
    assert not fast.report.interrupted
    assert fast._interrupt is False


def test_the_reader_of_a_stream_interrupts_its_own_call(sd: Any) -> None:
    """Not the one that began first, in another thread."""
    fast = srds_fast.compile(sd, method="srds", num_blocks=3, exact=True)
    latents(fast)  # checks the network
    turns, reports = Turns(sd.unet, 3), list[Any]()

    def first() -> None:
        turns.held = threading.get_ident()
        latents(fast)
        reports.append(fast.report)

    thread = threading.Thread(target=first)
    thread.start()
    assert until(turns.reached.wait)
    marked, calls_made = threading.Event(), Flag()

    def wait(*_: Any) -> None:
        if threading.get_ident() != turns.held:
            calls_made.called()
            if calls_made.calls == 7:
                assert until(marked.wait)

    hook = sd.unet.register_forward_pre_hook(wait)
    stream = fast.stream("a cat", num_inference_steps=STEPS)
    seen = [next(stream)]
    fast._interrupt = True
    marked.set()
    seen += stream
    hook.remove()
    turns.go_on.set()
    assert ended(thread)
    turns.hook.remove()
    assert calls_made.calls <= 7
    assert (fast.report.interrupted, reports[0].interrupted) == (True, False)
    assert [each.final for each in seen] == [False] * (len(seen) - 1) + [True]


def test_a_fallback_to_the_stock_loop_is_interrupted_by_its_thread(sd: Any) -> None:
    fast = srds_fast.compile(sd)
    flag = Flag(3)

    def interrupt(*_: Any) -> None:
        flag.called()
        if flag.calls == 3:
            fast._interrupt = True

    hook = sd.unet.register_forward_pre_hook(interrupt)
    latents(fast, callback=print, callback_steps=99)
    hook.remove()
    assert flag.calls == 3


class Pipe:
    def __init__(self) -> None:
        self._interrupt = False


def test_the_mark_of_a_call_on_the_pipeline_itself_is_not_for_others() -> None:
    pipe = Pipe()
    interrupts = Interrupts(pipe)
    with interrupts.running() as other, interrupts.running() as stock:
        with interrupts.on_pipeline_itself(stock):
            stock.end_early()
            assert pipe._interrupt
        assert not other.is_asked()
