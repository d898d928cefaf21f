"""Measures c(rows) on the device, at as few widths as it takes to know it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..cost import CostCurve
from ..errors import CaptureFailed
from ..kernels.wave_update import NetworkInput
from ..program import Program
from ..solvers.core import Evaluate
from .graph import Evaluator
from .recorder import recorder

WIDTHS = (1, 2, 4, 8, 16, 24, 32)
# a call longer than this is timed once, shorter ones until they have taken so long together, or so often
ENOUGH_SECONDS = 0.03
MOST_CALLS = 15
# where one more row costs this share of a call of one row, wider calls cost in proportion to their rows
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

    Narrow calls come first. Once a row more costs about as much as a call of one row, wider calls are not made.

    Args:
        evaluator: makes what runs the waves of a program.
        program: a wave for each width, `program.of_widths`.
        x: starting noise, [batch, ...]: every row is one of it.
        network: how the network wants its rows.
        replayed: time recordings of the calls; where a call cannot be recorded, all are timed as Python makes them.
    """
    evaluate = evaluator(program)
    found: list[tuple[int, float, int | None]] = []
    most_rows: int | None = None
    how = "replayed" if replayed else "eager"
    saturated = 0
    for number, positions in enumerate(program.positions):
        given = network.empty(len(positions), x)
        given.copy_(x.expand_as(given))
        wave = Evaluate(given, positions, tuple(range(len(x))), number)
        try:
            if how == "replayed":
                try:
                    seconds, nbytes = _timed(_recorded(evaluate, wave, x.device), x.device)
                except CaptureFailed:
                    how, found = "eager", []
                    return measure(evaluator, program, x, network)
            else:
                seconds, nbytes = _timed(lambda wave=wave: evaluate(wave), x.device)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            if not found:
                raise
            most_rows = found[-1][0]
            break
        found.append((len(positions), seconds, nbytes))
        if len(found) > 1:
            (rows_before, before, _), (rows, now, _) = found[-2:]
            steep = (now - before) / (rows - rows_before) >= SATURATED * found[0][1]
            saturated = saturated + 1 if steep else 0
            if saturated == 2:
                break
    evaluate.forget()
    memory = [nbytes for _, _, nbytes in found if nbytes is not None]
    return CostCurve(
        tuple(rows for rows, _, _ in found),
        tuple(seconds for _, seconds, _ in found),
        how,
        tuple(memory) if len(memory) == len(found) else None,
        most_rows,
    )


def _recorded(evaluate: Evaluator, wave: Evaluate, device: torch.device) -> Callable[[], object]:
    evaluate.prepare()
    evaluate(wave)  # what a first call makes cannot be made in a recording
    graph, _ = recorder(device).record(lambda guard: evaluate(wave))
    return graph.replay


def _timed(call: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """The median time of a call after a first one, and the memory it took at its height."""
    on_cuda = device.type == "cuda"
    call()
    if on_cuda:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    while not times or (sum(times) < ENOUGH_SECONDS and len(times) < MOST_CALLS):
        started = time.perf_counter()
        call()
        if on_cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    nbytes = torch.cuda.max_memory_allocated(device) - before if on_cuda else None
    return statistics.median(times), nbytes


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
