"""Checks: what fails on one rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from calls import by_turns
from cancelling import Network
from ranked import apart, check, ended, latents, named, pipeline, rank, sampled
from torch import Tensor

import srds_fast
from srds_fast.engine import costs


class Failing(Network):
    """Does something to the output of a network call with a number, on one rank."""

    def __init__(self, act: Callable[[Tensor], Any], at: int, on: int) -> None:
        super().__init__()
        self.act, self.at, self.on, self.calls = act, at, on, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        m = super().forward(x, t)
        return self.act(m) if (self.calls, rank()) == (self.at, self.on) else m


def _raised(error: BaseException) -> Callable[[Tensor], Any]:
    def act(m: Tensor) -> Any:
        raise error

    return act


FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "exception": _raised(ValueError("broken")),
    "interrupt": _raised(KeyboardInterrupt()),
    "nan": lambda m: m * float("nan"),
    "shape": lambda m: m[:, :-1],
    "none": lambda m: None,
    "dtype": lambda m: m.float(),
    "memory": _raised(torch.OutOfMemoryError("out of memory")),
}


@check
def faults() -> Any:
    """Of each fault, at some waves and on each rank: how the call ended, if the sample was right, the next call."""
    found: dict[str, list[Any]] = {}
    expected = {method: sampled(method=method).sample for method in ("srds", "sequential")}
    for name, act in FAULTS.items():
        for method in METHODS:
            for at in PLACES:
                for on in range(dist.get_world_size()):
                    network = Failing(act, at, on)
                    results: list[Any] = []
                    ends = ended(lambda: results.append(sampled(network, method=method, parallel="auto")))  # noqa: B023
                    # one that fell back is the sequential sample
                    right = [min(apart(each.sample, one) for one in expected.values()) for each in results]
                    after = apart(sampled(network, method=method, parallel="auto").sample, expected[method])
                    found.setdefault(name, []).append([ends, right, after])
    return found


METHODS = ("srds",)
PLACES = (1, 4)


class Stumbles(Network):
    """Fails on rank 1 where a batch is wider than some rows, or where the plain loop calls it."""

    def __init__(self, rows: int | None = None, error: Exception | None = None) -> None:
        super().__init__()
        self.rows, self.error = rows, error or ValueError("broken")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        # the plain loop expands the time of a step
        fails = t.stride() == (0,) if self.rows is None else len(x) > self.rows
        if fails and rank() == 1:
            raise self.error
        return super().forward(x, t)


@check
def stumbles() -> Any:
    """What fails on one rank alone beside the waves of a call, or can be done with less memory, fails no call."""
    found: dict[str, Any] = {}
    expected = sampled(method="sequential").sample

    def made(name: str, network: Network, **settings: Any) -> None:
        reports = []
        for _ in range(3):
            result = sampled(network, parallel="auto", **settings)
            report = result.report
            plan = [report.plan, report.plan_state, report.waves, report.rows, report.fallback_reason]
            reports.append([*plan, apart(result.sample, expected)])
        found[name] = reports

    made("the plain loop is timed", Stumbles(), method="auto")
    made("a width is measured", Stumbles(4), method="auto")
    made("a width is measured, memory", Stumbles(4, torch.OutOfMemoryError("none")), method="auto")
    made("a wave, memory", Stumbles(2, torch.OutOfMemoryError("none")), method="srds", exact=True)
    between = costs.between_calls

    def none(*_: Any) -> float:
        raise torch.OutOfMemoryError("none")

    if rank() == 1:
        costs.between_calls = none
    made("a plan is priced, memory", Network(seen=lambda: None), method="auto")
    costs.between_calls = between
    return found


@check
def narrow_turns() -> Any:
    """A driven loop on a rank 1 whose memory holds fewer entries than a wave has there, or than two rows have."""
    pipe, call = pipeline("stable_diffusion")
    call["num_inference_steps"] = 6
    stock = latents(pipe, call)
    most, found = 4, {}

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        if rank() == 1 and len(args[0]) > most:
            raise torch.OutOfMemoryError("none")

    handle = pipe.unet.register_forward_pre_hook(hook, with_kwargs=True)
    for most in (4, 3):
        fast = srds_fast.compile(pipe, method="collocation", exact=True, parallel="auto")
        sample, report = latents(fast, {**call, **by_turns(fast)}), fast.report
        found[most] = [apart(sample, stock), report.path, report.left_out, report.fallback_reason, report.waves]
    handle.remove()
    return found


class FailsOnce:
    def __init__(self, error: Exception, on: int = 1) -> None:
        self.error, self.on = error, on

    def __call__(self, *_: Any) -> Any:
        if rank() == self.on:
            raise self.error
        return {}


@check
def callbacks() -> Any:
    """An error in an observer, in `on_wave` and in a callback of one rank alone; a stream that one rank leaves."""
    pipe, call = pipeline("stable_diffusion")
    fast = srds_fast.compile(pipe, method="srds", parallel="auto")
    broken = FailsOnce(ValueError("broken"))

    def left() -> None:
        for _ in fast.stream(**{**call, "generator": torch.Generator().manual_seed(3)}):
            if rank() == 1:
                break

    def watched() -> None:
        with srds_fast.using(on_wave=broken):
            latents(fast, call)

    return {
        "observer": ended(lambda: sampled(observer=broken, parallel="auto")),
        "on_wave": ended(watched),
        "callback": ended(lambda: latents(fast, {**call, "callback_on_step_end": broken})),
        "stream": ended(left),
        "after them": ended(lambda: latents(fast, call)),
    }


TIMEOUT = 10.0  # seconds, of the group of a rank that is lost: also to make the group, on a busy machine


def lost(act: Callable[[Tensor], Tensor]) -> Any:
    """How the call and the next one end where rank 1 does something at its fourth network call."""
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    found = ended(lambda: sampled(Failing(act, 4, 1), parallel=group))
    return [found, ended(lambda: sampled(parallel=group))]


@named
def killed() -> Any:
    """The other ranks; the one that is killed writes nothing."""

    def die(m: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return m

    return lost(die)


@named
def asleep() -> Any:
    """One rank takes longer than the group's timeout."""
    return lost(lambda m: (time.sleep(2 * TIMEOUT), m)[1])
