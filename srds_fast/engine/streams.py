"""Coarse rows on a stream of their own, beside the fine rows, instead of in one batch with them.

A wave has one or a few coarse rows. A network call of so few rows leaves part of a device idle, which the fine rows can
use at the same time. Whether two narrow calls side by side are faster than one wide call must be measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .. import telemetry
from ..solvers.contract import Evaluate
from ..solvers.program import Program
from .evaluator import Evaluator

OVERLAPS = ("auto", "batch", "streams")


class TwoLanes:
    """Runs the coarse rows of a wave in one call and its other rows in another.

    Args:
        rows: runs the waves of `program.in_lanes()`.
        program: the waves.
        device: on a CUDA device the two calls run side by side.
    """

    def __init__(self, rows: Evaluator, program: Program, device: torch.device) -> None:
        self._rows = rows
        self._parts = _parts(program)
        self._side_stream = _SideStream(device) if device.type == "cuda" else None

    def __call__(self, wave: Evaluate) -> Tensor:
        """The network's output at a wave, [branches * rows, samples, ...]."""
        x = wave.x.unflatten(0, (-1, len(wave.positions)))
        parts = [
            Evaluate(x[:, start:stop].flatten(0, 1), wave.positions[start:stop], wave.samples, number)
            for number, start, stop in self._parts[wave.number]
        ]
        if len(parts) == 1:
            return self._rows(parts[0])
        for part in parts:  # the conditioning of both is written before their streams part
            self._rows.repeat(part)
        with self._on_side_stream(), telemetry.span("coarse", "coarse", len(parts[0].positions)):
            coarse = self._rows(parts[0])
        with telemetry.span("fine", "fine", len(parts[1].positions)):
            fine = self._rows(parts[1])
        if self._side_stream is not None:
            self._side_stream.join()
        outputs = [m.unflatten(0, (-1, len(part.positions))) for m, part in zip((coarse, fine), parts, strict=True)]
        return torch.cat(outputs, dim=1).flatten(0, 1)

    def prepare(self) -> None:
        """See `engine.evaluator.Evaluator`."""
        self._rows.prepare()

    def constants(self) -> Iterable[Tensor]:
        """See `engine.evaluator.Evaluator`."""
        return self._rows.constants()

    def repeat(self, wave: Evaluate) -> None:
        """See `engine.evaluator.Evaluator`."""
        self._rows.repeat(wave._replace(number=self._parts[wave.number][0][0]))

    def forget(self) -> None:
        """See `engine.evaluator.Evaluator`."""
        self._rows.forget()

    def _on_side_stream(self) -> AbstractContextManager[None]:
        return nullcontext() if self._side_stream is None else self._side_stream.run()


class _SideStream:
    """A stream of high priority. Work on it begins after the current stream's, which waits for its end."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)

    @contextmanager
    def run(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        except BaseException:
            self.join()  # a capture cannot end while another stream has not joined it
            raise

    def join(self) -> None:
        # join before the allocator may reuse memory across streams
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def has_two_lanes(program: Program) -> bool:
    """Whether any wave has coarse rows and others."""
    return len(program.in_lanes()) > len(program)


def _parts(program: Program) -> list[list[tuple[int, int, int]]]:
    """For each wave, its parts: their numbers in `in_lanes`, and their first and last row."""
    parts: list[list[tuple[int, int, int]]] = []
    number = 0
    for wave in program:
        of_wave = []
        start = 0
        for size in wave.lanes():
            of_wave.append((number, start, start + size))
            number, start = number + 1, start + size
        parts.append(of_wave)
    return parts
