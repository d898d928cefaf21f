"""Every fault at every network call on every rank, and ranks that are lost."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from calls import by_turns
from cancelling import Network
from forking import forked, shown
from ranked import apart, latents, pipeline, rank, sampled
from torch import Tensor

import srds_fast
from srds_fast.planner.choose import choose
from srds_fast.planner.settings import Settings

STEPS = 8
# seconds: of the group, where ranks are lost; that a rank sleeps; and after which a case counts as a hang
TIMEOUT, ASLEEP, HANG = 5.0, 8.0, 90.0


class Faulty:
    """Acts on the output of a network call with a number, on one rank.

    No variable holds the count: a network that keeps one would be no function of its arguments.
    """

    def __init__(self, act: Callable[[Tensor], Any] | None = None, at: int = 0, on: int = 0) -> None:
        self.act, self.at, self.on, self._numbers = act, at, on, itertools.count(1)

    def __call__(self, output: Tensor) -> Any:
        fails = (next(self._numbers), rank()) == (self.at, self.on)
        return self.act(output) if self.act is not None and fails else output

    @property
    def fired(self) -> bool:
        return rank() == self.on and next(copy.copy(self._numbers)) > self.at > 0


def _raised(error: BaseException) -> Callable[[Tensor], Any]:
    def act(m: Tensor) -> Any:
        raise error

    return act


FAULTS: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...]]] = {
    "exception": (_raised(ValueError("broken")), ("RankFailed",)),
    "Ctrl-C": (_raised(KeyboardInterrupt()), ("RankFailed", "KeyboardInterrupt")),
    "NaN": (lambda m: m * float("nan"), ("RankFailed", "DivergenceError")),
    "wrong shape": (lambda m: m[..., :-1], ("RankFailed",)),
    "out of memory": (_raised(torch.OutOfMemoryError("none")), ("RankFailed", "OutOfMemoryError")),
}


class Through(Network):
    def __init__(self, fault: Faulty) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.fault(super().forward(x, t))


def of_samples(method: str) -> Callable[[], Callable[[Faulty], Tensor]]:
    def make() -> Callable[[Faulty], Tensor]:
        return lambda fault: (
            sampled(Through(fault), method=method, parallel="auto", steps=STEPS, exact=method != "auto").sample
        )

    return make


def replicated() -> Callable[[Faulty], Tensor]:
    plan = dataclasses.replace(choose(STEPS, Settings(method="srds", exact=True)), replicated=True)
    return lambda fault: sampled(Through(fault), plan=plan, parallel="auto", steps=STEPS).sample


def of_pipelines(more: Callable[[Any], dict[str, Any]] = lambda fast: {}) -> Callable[[], Callable[[Faulty], Tensor]]:
    def make() -> Callable[[Faulty], Tensor]:
        pipe, call = pipeline("stable_diffusion")
        call["num_inference_steps"] = 4
        fast = srds_fast.compile(pipe, method="srds", exact=True, parallel="auto")
        call |= more(fast)

        def run(fault: Faulty) -> Tensor:
            def after(module: Any, args: Any, output: Any) -> Any:
                found = fault(output[0])
                return (found,) if isinstance(output, tuple) else type(output)(found)

            handle = pipe.unet.register_forward_hook(after)
            try:
                return latents(fast, call)
            finally:
                handle.remove()

        return run

    return make


OWN_LOOP = "pipeline, its own loop"
WAYS: dict[str, Callable[[], Callable[[Faulty], Tensor]]] = {
    "sample, srds": of_samples("srds"),
    "sample, collocation": of_samples("collocation"),
    "sample, sequential": of_samples("sequential"),
    "sample, auto": of_samples("auto"),
    "sample, replicated": replicated,
    "pipeline, recorded calls": of_pipelines(),
    "pipeline, its own turns": of_pipelines(by_turns),
    OWN_LOOP: of_pipelines(lambda fast: {"callback": lambda *_: None, "callback_steps": 1}),
}


def tried(run: Callable[[], Tensor], right: Callable[[Tensor], bool]) -> str:
    """How a call has ended: the class of its error, or whether its sample is right."""
    try:
        found = run()
    except BaseException as error:
        return type(error).__name__
    if not found.isfinite().all():
        return "not finite"
    return "right" if right(found) else "WRONG"


def faults(way: str) -> dict[str, Any]:
    """By way and fault: of each place the rank, and how the call and the next one have ended."""
    ended: dict[str, list[Any]] = {}
    run = WAYS[way]()
    expected = run(Faulty())
    bound = 4e-3 if "auto" in way else 1e-5

    def right(found: Tensor, expected: Tensor = expected, bound: float = bound) -> bool:
        return bool(found.shape == expected.shape) and apart(found, expected) <= bound

    for name, (act, _) in FAULTS.items():
        for on in range(dist.get_world_size()):
            for at in range(1, 200):
                fault = Faulty(act, at, on)
                how = tried(lambda: run(fault), right)  # noqa: B023
                if not agreed(fault.fired):
                    break
                after = tried(lambda: run(Faulty()), right)
                ended.setdefault(f"{way}|{name}", []).append([on, at, how, after])
    return ended


def agreed(fired: bool) -> bool:
    """Whether it has on any rank."""
    found = torch.tensor([float(fired)])
    dist.all_reduce(found)
    return bool(found)


def differences() -> dict[str, Any]:
    """Calls with something different on one rank, and the next call."""
    ended: dict[str, list[Any]] = {}
    pipe, call = pipeline("stable_diffusion")
    call["num_inference_steps"] = 6
    fast = srds_fast.compile(pipe, method="srds", parallel="auto")
    expected = latents(fast, call)

    def right(found: Tensor) -> bool:
        return apart(found, expected) <= 1e-6

    for on in range(dist.get_world_size()):
        here, weight = rank() == on, next(pipe.unet.parameters())

        def with_weight() -> Tensor:
            kept = weight.detach().clone()  # noqa: B023
            try:
                with torch.no_grad():
                    weight.add_(1e-7 * here)  # noqa: B023
                return latents(fast, call)
            finally:
                with torch.no_grad():
                    weight.copy_(kept)  # noqa: B023

        ways: dict[str, Callable[[], Tensor]] = {
            "prompt": lambda: latents(fast, {**call, "prompt": "a fox" if here else "a dog"}),  # noqa: B023
            "seed": lambda: latents(fast, call, 4 if here else 3),  # noqa: B023
            "steps": lambda: latents(fast, {**call, "num_inference_steps": 7 if here else 6}),  # noqa: B023
            "weights": with_weight,
        }
        for name, way in ways.items():
            how = tried(way, lambda found: False)
            ended.setdefault(f"pipeline|different {name}", []).append(
                [on, 0, how, tried(lambda: latents(fast, call), right)]
            )
    return ended


# ---- lost ranks


def _die(m: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return m


def _sleep(m: Tensor) -> Tensor:
    time.sleep(ASLEEP)
    return m


# what happens, and at which network calls of a rank: each sleep takes as long as it lasts
LOST: dict[str, tuple[Callable[[Tensor], Tensor], Sequence[int]]] = {
    "SIGKILL": (_die, range(1, 100)),
    "sleep beyond the timeout": (_sleep, (1, 3, 9, 27, 81)),
}
LOSING = ("sample, srds", "sample, replicated", "pipeline, recorded calls", "pipeline, its own turns")


def losing(way: str, kind: str, at: int, on: int) -> Callable[[], Any]:
    def run() -> Any:
        call = WAYS[way]()
        fault = Faulty(LOST[kind][0], at, on)
        how = tried(lambda: call(fault), lambda found: False)
        return [fault.fired, how, tried(lambda: call(Faulty()), lambda found: False)]

    return run


COLUMNS = "call", "fault, on one rank", "places", "same end on all", "right on all", "wrong", "next call right"


def show_faults(size: int, only: str | None = None) -> int:
    """Print the table of faults that ranks survive; how many places are not as they should be. only: of this call."""
    bad = 0
    shown(f"{size} ranks: faults at every network call on every rank; none hangs", [], COLUMNS)
    runs = [partial(faults, way) for way in WAYS if only in (None, way)]
    for run in runs if only else (*runs, differences):
        by_rank = forked(size, 3600, run)
        if len(by_rank) < size:
            print(f"{size - len(by_rank)} ranks did not come to their end: {run}")
            return bad + 1
        for key in by_rank[0]:
            row, wrong = counted(key, [by_rank[number][key] for number in range(size)])
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
            bad += wrong
    return bad


def counted(key: str, by_rank: list[list[Any]]) -> tuple[list[Any], int]:
    """A row of the table, and how many places are not as they should be. by_rank: how each place has ended."""
    way, kind = key.split("|")
    allowed = FAULTS[kind][1] if kind in FAULTS else ("RankMismatch",)
    count: Counter[str] = Counter()
    for cases in zip(*by_rank, strict=True):
        ends = [case[2] for case in cases]
        if all(each == "right" for each in ends):
            how = "right"
        elif set(ends) == {"not finite"} and way == OWN_LOOP:  # as without this package
            how = "error"
        else:
            # Ctrl-C stays what it is on its own rank
            alike = all(each in allowed for each in ends) and (kind == "Ctrl-C" or len(set(ends)) == 1)
            how = "error" if alike else "wrong"
        after = all(case[3] == "right" for case in cases)
        count.update([how, "after"] if after else [how])
        if how == "wrong" or not after:
            print("not as it should be:", key, cases)
    places = len(by_rank[0])
    wrong = count["wrong"] + places - count["after"]
    return [way, kind, places, count["error"], count["right"], count["wrong"], count["after"]], wrong


def show_lost(size: int) -> int:
    """The same for ranks that are lost, at network calls of each rank."""
    rows, bad = [], 0
    pipeline("stable_diffusion")  # made once, and not in each process
    for way in LOSING:
        for kind in LOST:
            count: Counter[str] = Counter()
            for on in range(size):
                for at in LOST[kind][1]:
                    by_rank = forked(size, TIMEOUT, losing(way, kind, at, on), HANG)
                    others = [by_rank.get(number, "died") for number in range(size) if number != on]
                    if kind == "SIGKILL" and on in by_rank and by_rank[on] != "hang" and not by_rank[on][0]:
                        break
                    if kind != "SIGKILL" and by_rank.get(on) not in (None, "hang") and not by_rank[on][0]:
                        break
                    count["places"] += 1
                    how = "RankLost" if all(each[1:] == ["RankLost", "RankLost"] for each in others) else "WRONG"
                    how = "hang" if "hang" in by_rank.values() else how
                    count[how] += 1
                    if how != "RankLost":
                        print("not as it should be:", way, kind, on, at, by_rank)
            bad += count["hang"] + count["WRONG"]
            rows.append((way, kind, count["places"], count["RankLost"], count["WRONG"], count["hang"]))
    shown(
        f"{size} ranks: a rank is lost",
        rows,
        ("call", "fault", "places", "RankLost on the others, twice", "wrong", "hangs"),
    )
    return bad
