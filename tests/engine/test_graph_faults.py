"""Faults where a call is recorded and where it is replayed: no wrong sample comes of it, and the next call is right.

What the network's Python does is met while it is recorded. A replay runs none of it: there a launch fails, or weights
have become NaN, which it reads where they are. On the CPU a tape stands for the graph; on a CUDA device graphs fail in
the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import pytest
import torch
from faults import FAULTS, Calls, every_wave
from promises import call_of, same_law, stock_of
from tape import Tape
from thinned import thinned_product
from torch import Tensor, nn

import srds_fast
from srds_fast.solvers.registry import BY_NAME

STEPS = 4
ENGINES = ("graph", "network-graphs")
# what may happen to a launch
OF_LAUNCHES = ("exception", "interrupt", "memory", "nan")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def nothing(output: Tensor) -> Tensor:
    return output


# sees each output of the network when its Python runs; where no recording looks, or calls would be of other kinds
seen: ContextVar[Callable[[Tensor], Tensor]] = ContextVar("seen", default=nothing)


class Policy(nn.Module):
    """What graphs can hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return seen.get()(torch.tanh(self.layer(x)) * (t[:, None] / 1000))


class Session:
    """Calls of one method on graphs of their own."""

    def __init__(self, device: str, method: str, engine: str) -> None:
        self.policy = Policy().to(device)
        self._x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).double().to(device)
        self._method = method
        self._settings: dict[str, Any] = {"engine": engine, "graphs": srds_fast.Graphs()}
        # a method that gives another sample gives the sequential one where it falls back
        self.expected = [self._sample(method="sequential"), *([self._sample()] if same_law(method) else [])]

    def _sample(self, **settings: Any) -> Tensor:
        how = call_of(self._method, exact=True) | settings
        return srds_fast.sample(self.policy, self._x, stock_of(self._method), STEPS, **how).sample

    def call(self) -> Tensor:
        return self._sample(**self._settings)

    def is_right(self, found: Tensor) -> bool:
        return any(torch.allclose(found, expected, rtol=1e-9, atol=1e-9) for expected in self.expected)

    def again(self) -> int:
        """Calls that are right, until there is a recording of all waves; returns how many calls were replayed."""
        for _ in range(3):
            assert self.is_right(self.call())
        return int(self._settings["graphs"].stats.replayed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("method", "engine", "fault"), thinned_product(BY_NAME, ENGINES, FAULTS))
def test_while_a_call_is_recorded(method: str, engine: str, fault: str, device: str) -> None:
    """Its first call runs eagerly, and is recorded. Where that fails, calls of its kind stay eager."""
    right = Session(device, method, engine).is_right

    def run(calls: Calls) -> Tensor:
        session, token = Session(device, method, engine), seen.set(calls)
        try:
            return session.call()
        finally:
            seen.reset(token)
            session.again()

    assert every_wave(replace(FAULTS[fault], must_end=False), run, right) > 0


@contextmanager
def launched(device: str, before: Callable[[], None]) -> Iterator[None]:
    """`before` is called before each launch."""
    graph = Tape if device == "cpu" else torch.cuda.CUDAGraph
    replay = graph.replay

    def called(self: Any) -> None:
        before()
        replay(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "replay", called)
        yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("method", "engine", "fault"), thinned_product(BY_NAME, ENGINES, OF_LAUNCHES))
def test_while_a_call_is_replayed(method: str, engine: str, fault: str, device: str) -> None:
    session = Session(device, method, engine)
    assert session.again()
    weight = session.policy.layer.weight.data
    kept = weight.clone()

    def run(calls: Calls) -> Tensor:
        def before() -> None:
            weight.add_(calls(torch.zeros(1)).to(weight))  # zero, or NaN

        try:
            with launched(device, before):
                return session.call()
        finally:
            weight.copy_(kept)

    assert every_wave(replace(FAULTS[fault], must_end=False), run, session.is_right) > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", BY_NAME)
def test_weights_that_are_no_numbers(method: str, engine: str, device: str) -> None:
    """A replay reads them where they are: no sample comes of it. Once they are put back the next call is right."""
    session = Session(device, method, engine)
    assert session.again()
    weight = session.policy.layer.weight.data
    before = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(srds_fast.DivergenceError):
        session.call()
    weight.copy_(before)
    assert session.is_right(session.call())
