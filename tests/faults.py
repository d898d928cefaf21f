"""What can go wrong in a network call, and what the call that makes it may then do.

A new fault is one entry of `FAULTS`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from srds_fast import DivergenceError, InvalidArgument


class Broken(RuntimeError):
    """An error of the network's own."""


@dataclass(frozen=True)
class Fault:
    """act: what happens to the output of a network call. ends_in: errors that the call may end in, if it does.

    must_end: no sample may come of it.
    """

    act: Callable[[Tensor], Tensor]
    ends_in: tuple[type[BaseException], ...]
    must_end: bool = False


def _raising(make: Callable[[], BaseException]) -> Callable[[Tensor], Tensor]:
    def act(output: Tensor) -> Tensor:
        raise make()

    return act


def _out_of_memory(output: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("out of memory")


FAULTS = {
    "exception": Fault(_raising(lambda: Broken("broken")), (Broken,), must_end=True),
    "interrupt": Fault(_raising(KeyboardInterrupt), (KeyboardInterrupt,), must_end=True),
    "nan": Fault(lambda output: output * math.nan, (DivergenceError,)),
    "infinity": Fault(lambda output: output.index_fill(0, torch.tensor([0]), math.inf), (DivergenceError,)),
    "memory": Fault(_out_of_memory, (torch.OutOfMemoryError,)),
    "shape": Fault(lambda output: output[..., :-1], (InvalidArgument,), must_end=True),
    "rows": Fault(lambda output: torch.cat([output, output[:1]]), (InvalidArgument,), must_end=True),
    "integers": Fault(lambda output: output.long(), (InvalidArgument,), must_end=True),
    "double": Fault(lambda output: output.double(), (InvalidArgument,)),
    "none": Fault(lambda output: None, (InvalidArgument,), must_end=True),  # type: ignore[arg-type, return-value]
}


class Calls:
    """Counts the calls of a network, and lets one of them fail. at: its number, from 1 on; 0: none does.

    No variable holds the count: a network that keeps one would be no function of its arguments.
    """

    def __init__(self, fault: Fault | None = None, at: int = 0) -> None:
        self._fault, self._at, self._numbers = fault, at, itertools.count(1)

    def __call__(self, output: Tensor) -> Tensor:
        fails = next(self._numbers) == self._at
        return self._fault.act(output) if self._fault is not None and fails else output

    @property
    def made(self) -> int:
        return next(copy.copy(self._numbers)) - 1


def every_wave(fault: Fault, run: Callable[[Calls], Tensor], is_right: Callable[[Tensor], bool]) -> int:
    """Let each network call of `run` fail in turn, and see that nothing wrong comes of it; returns how many there were.

    run: makes one call, whose network's outputs go through the `Calls`. is_right: of a sample. After each failure the
    next call must give the same bits as before.
    """
    clean = run(Calls())
    assert is_right(clean)
    for at in itertools.count(1):
        calls = Calls(fault, at)
        try:
            found = run(calls)
        except fault.ends_in:
            pass
        else:
            if calls.made < at:  # no such call: all have failed once
                return at - 1
            assert not fault.must_end, f"call {at} failed, and a sample came"
            assert is_right(found), f"call {at} failed, and a wrong sample came"
        assert torch.equal(run(Calls()), clean), f"after call {at} had failed the next one gave other bits"
    raise AssertionError
