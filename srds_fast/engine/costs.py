"""Measures c(rows) on the device, at as few widths as it takes to know it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from ..errors import CaptureFailed
from ..kernels.wave_update import NetworkInput
from ..planner.cost_curve import CostCurve
from ..solvers.contract import Evaluate
from ..solvers.program import Program
from .evaluator import Evaluator
from .graphs.devices import recorder

WIDTHS = (1, 2, 4, 8, 16, 24, 32)
# calls shorter than this are timed in rounds over all widths, so that a busy moment meets them alike; longer ones once
SHORT = 0.05
ROUNDS = 5
ENOUGH_SECONDS = 0.5
# a long call that costs this share of as many calls of one row: wider ones cost in proportion to their rows
SATURATED = 0.75


@torch.no_grad()
def measure(
    evaluator: Callable[[Program], Evaluator],
    program: Program,
    x: Tensor,
    network: NetworkInput,
    *,
    replayed: bool = False,
) -> CostCurve:
    """The curve of a network for batches like x.

    Narrow calls come first. Of long calls no wider ones are made once a row more costs about as much as the first.

    Args:
        evaluator: makes what runs the waves of a program.
        program: a wave for each width, `program.of_widths`.
        x: starting noise, [batch, ...]: every row is one of it.
        network: how the network wants its rows.
        replayed: time recordings of the calls, in a turn of the caller's; where a call cannot be recorded, all are
            timed as Python makes them.
    """
    if replayed:
        with suppress(CaptureFailed):
            return _measured(evaluator(program), program, x, network, replayed=True)
    return _measured(evaluator(program), program, x, network, replayed=False)


def _measured(evaluate: Evaluator, program: Program, x: Tensor, network: NetworkInput, *, replayed: bool) -> CostCurve:
    calls: list[_Call] = []
    most_rows: int | None = None
    for number, positions in enumerate(program.positions):
        given = network.empty(len(positions), x)
        given.unflatten(0, (network.branches, -1)).copy_(x)
        wave = Evaluate(given, positions, tuple(range(len(x))), number)
        try:
            long = bool(calls) and calls[-1].seconds > SHORT
            calls.append(_Call(evaluate, wave, x.device, replayed, warm=long))
        except Exception as why:  # out of memory, or whatever else a network says to a batch that is too wide for it
            if not calls or isinstance(why, CaptureFailed):
                raise
            most_rows = calls[-1].rows
            break
        if _saturated(calls):
            break
    started = time.perf_counter()
    for _ in range(ROUNDS):
        for call in calls:
            if call.seconds < SHORT:
                call.time()
        if time.perf_counter() - started > ENOUGH_SECONDS:
            break
    evaluate.forget()
    memory = tuple(call.nbytes for call in calls if call.nbytes is not None)
    return CostCurve(
        tuple(call.rows for call in calls),
        tuple(call.seconds for call in calls),
        "replayed" if replayed else "eager",
        memory if len(memory) == len(calls) else None,
        most_rows,
    )


class _Call:
    """A network call of one width, timed once; warm: a call like it has been made.

    Attributes:
        rows: its width.
        nbytes: memory that it took at its height; None where that cannot be asked.
    """

    def __init__(
        self, evaluate: Evaluator, wave: Evaluate, device: torch.device, replayed: bool, *, warm: bool
    ) -> None:
        self.rows = len(wave.positions)
        self.nbytes: int | None = None
        self._device = device
        self._times: list[float] = []
        self._make: Callable[[], object] = lambda: evaluate(wave)
        if replayed or not warm:  # what a first call makes is not part of the others, and is in no recording
            self._make()
        if replayed:
            evaluate.prepare()
            graph, _ = recorder(device).record(lambda guard: evaluate(wave))
            self._make = graph.replay
            self._make()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.time()
            self.nbytes = torch.cuda.max_memory_allocated(device) - before
        else:
            self.time()

    @property
    def seconds(self) -> float:
        """The median of its times."""
        return statistics.median(self._times)

    def time(self) -> None:
        """Make it once more."""
        started = time.perf_counter()
        self._make()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._times.append(time.perf_counter() - started)


def _saturated(calls: list[_Call]) -> bool:
    """Whether the last two calls, long ones, cost as much more as they have more rows."""
    if len(calls) < 3 or calls[-1].seconds < SHORT:
        return False
    return all(call.seconds >= SATURATED * call.rows * calls[0].seconds for call in calls[-2:])


@torch.no_grad()
def between_calls(next_wave: Callable[[Tensor | None], Evaluate | None], dtype: torch.dtype) -> float:
    """Seconds that a run takes beside the network: it is run on answers of zeros.

    Args:
        next_wave: of the run, `Run.next`.
        dtype: of the network's output.
    """
    started = time.perf_counter()
    waiting = 0.0
    wave = next_wave(None)
    while wave is not None:
        begun = time.perf_counter()
        answer = torch.zeros_like(wave.x, dtype=dtype)
        waiting += time.perf_counter() - begun
        wave = next_wave(answer)
    if answer.is_cuda:
        torch.cuda.synchronize(answer.device)
    return time.perf_counter() - started - waiting
