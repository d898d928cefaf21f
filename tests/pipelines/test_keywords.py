"""Settings of `compile` that are given to a call: an error that says what to write, whatever takes the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modulars
import pytest
import tiny

import srds_fast
from srds_fast import InvalidArgument, UnknownArgument

WORDS = {
    "tolerance": (0.01, r"tolerance is a setting of compile: write srds_fast\.compile\(pipe, tolerance=0\.01\)"),
    "method": ("srds", r"compile\(pipe, method='srds'\)"),
    "plan": (object(), r"compile\(pipe, plan=\.\.\.\)"),
}
PIPES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "with **kwargs": lambda: (tiny.stable_diffusion(), {"prompt": "a cat"}),
    "with named arguments": lambda: (tiny.flux(), tiny.PIPELINES["flux"][1]),
    "modular": lambda: (modulars.PIPELINES["flux"][0](), modulars.PIPELINES["flux"][1]),
}


@pytest.mark.parametrize("make", PIPES.values(), ids=list(PIPES))
def test_a_setting_that_is_given_to_a_call_is_an_error_that_says_what_to_write(
    make: Callable[[], tuple[Any, dict[str, Any]]],
) -> None:
    pipe, call = make()
    fast = srds_fast.compile(pipe, method="srds")
    for name, (value, words) in WORDS.items():
        for act in (fast, fast.warmup, fast.plan_for, fast.stream):
            with pytest.raises(UnknownArgument, match=f"{type(pipe).__name__} takes no argument {name}. .*{words}"):
                act(**call, **{name: value})
    assert issubclass(UnknownArgument, TypeError)
    assert issubclass(UnknownArgument, InvalidArgument)
