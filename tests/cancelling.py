"""Cancelling a call at its network calls: what tests of `sample` and of pipelines have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from problems import GaussianMixture, noise
from promises import call_of, stock_of
from torch import Tensor, nn

import srds_fast
from srds_fast.solvers.registry import DEFAULT

STEPS, SHAPE = 16, (2, 8)
MIXTURE = GaussianMixture.random(8)


class Flag:
    """What is passed as `cancel`: set at a network call with a number, from 1; None: never.

    calls: network calls so far. after: those after it was set.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at, self.calls, self.after = at, 0, 0
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def called(self, *_: Any) -> None:
        """Call it in every network call; as a hook, it only watches."""
        self.calls += 1
        self.after += self._set
        self._set = self._set or self.calls == self.at


def at_most_one_call_follows(make: Callable[[], Callable[[Flag], Any]], places: int = 3) -> int:
    """Cancel a way to call at some of its network calls. Returns how often that was.

    make: makes anew what calls; the function that it returns makes one call under a flag, with the flag's `called` in
    the network.
    """
    whole = Flag()
    make()(whole)
    assert whole.calls > 0
    ended = 0
    for place in sorted({whole.calls, *(1 + number * whole.calls // places for number in range(places))}):
        flag = Flag(place)
        try:
            make()(flag)
        except srds_fast.Cancelled:
            ended += 1
        else:
            assert flag.after == 0, "only the last network call may be followed by a result"
            assert flag.calls <= place or not flag.is_set()
        assert flag.after <= 1
    assert ended
    return ended


def cancelled(call: Callable[[Flag], Any], at: int) -> srds_fast.Cancelled:
    """The error of a call that is cancelled at a network call, after which no other is made."""
    flag = Flag(at)
    with pytest.raises(srds_fast.Cancelled) as caught:
        call(flag)
    assert (flag.calls, flag.after) == (at, 0)
    return caught.value


class Network(nn.Module):
    """Predicts eps; `seen` is called in every call."""

    def __init__(self, seen: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen()
        return MIXTURE(x, t.long())


def sample(network: Any, each: Any = srds_fast.sample, steps: int = STEPS, **settings: Any) -> Any:
    method = settings.pop("method", DEFAULT)
    return each(network, noise(*SHAPE), stock_of(method), steps, **call_of(method, **settings))
