"""Coarse rows on a stream of their own, in parallel with the fine rows, instead of in one batch with them.

A wave has one or a few coarse rows. A network call of so few rows leaves part of a device idle, which the fine rows can
use at the same time. Whether two narrow parallel calls are faster than one wide call must be measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate, count, pairwise
from typing import Any

import torch
from torch import Tensor

from .. import telemetry
from ..solvers.contract import Evaluate
from ..solvers.program import Program
from .eager import Evaluator

OVERLAPS = ("auto", "batch", "streams")


class TwoLanes:
    """An `Evaluator` that runs coarse rows in one call and other rows in another, in parallel on a CUDA device.

    rows: runs the waves of `program.in_lanes()`.
    """

    def __init__(self, rows: Evaluator, program: Program, device: torch.device) -> None:
        self._rows = rows
        self.prepare, self.constants, self.forget = rows.prepare, rows.constants, rows.forget
        numbers = count()
        # for each wave, its parts: their numbers in `in_lanes`, and their first and last row
        self._parts = [
            [(next(numbers), *rows) for rows in pairwise(accumulate(wave.lanes(), initial=0))] for wave in program
        ]
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def __call__(self, wave: Evaluate) -> Tensor:
        x = wave.x.unflatten(0, (-1, len(wave.positions)))
        parts = [
            Evaluate(x[:, start:stop].flatten(0, 1), wave.positions[start:stop], wave.samples, number)
            for number, start, stop in self._parts[wave.number]
        ]
        if len(parts) == 1:
            return self._rows(parts[0])
        for part in parts:  # the conditioning of both is written before their streams part
            self._rows.repeat(part)
        with _forked(self._stream) as on_stream:
            with on_stream, telemetry.span("coarse", "coarse", len(parts[0].positions)):
                coarse = self._rows(parts[0])
            with telemetry.span("fine", "fine", len(parts[1].positions)):
                fine = self._rows(parts[1])
        outputs = [m.unflatten(0, (-1, len(part.positions))) for m, part in zip((coarse, fine), parts, strict=True)]
        return torch.cat(outputs, dim=1).flatten(0, 1)

    def repeat(self, wave: Evaluate) -> None:
        self._rows.repeat(wave._replace(number=self._parts[wave.number][0][0]))


@contextmanager
def _forked(stream: torch.cuda.Stream | None) -> Iterator[Any]:
    """Gives a context for work on a stream. It begins after the current stream's, which waits for its end."""
    if stream is None:
        yield nullcontext()
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        yield torch.cuda.stream(stream)
    finally:  # join before the allocator may reuse memory, and also after an error: a capture cannot end before
        current.wait_stream(stream)


def has_two_lanes(program: Program) -> bool:
    """Whether any wave has coarse rows and others."""
    return len(program.in_lanes()) > len(program)
