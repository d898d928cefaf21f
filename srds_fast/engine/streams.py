"""Coarse rows beside the fine ones, on a stream of their own, instead of in one batch with them.

The next wave waits for the coarse rows first: they are one or a few, and a network call of few rows leaves a device
idle that the fine rows fill. Whether two narrow calls side by side are faster than a wide one, only the device can say.
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
        device: on a CUDA device the two run side by side.
    """

    def __init__(self, rows: Evaluator, program: Program, device: torch.device) -> None:
        self._rows = rows
        self._parts = _parts(program)
        self._beside = _Beside(device) if device.type == "cuda" else None

    def __call__(self, wave: Evaluate) -> Tensor:
        """The network's output at a wave, [branches * rows, samples, ...]."""
        x = wave.x.unflatten(0, (-1, len(wave.positions)))
        parts = [
            Evaluate(x[:, start:stop].flatten(0, 1), wave.positions[start:stop], wave.samples, number)
            for number, start, stop in self._parts[wave.number]
        ]
        if len(parts) == 1:
            return self._rows(parts[0])
        for part in parts:  # what both read is there before they part
            self._rows.repeat(part)
        with self._aside(), telemetry.span("coarse", "coarse", len(parts[0].positions)):
            coarse = self._rows(parts[0])
        with telemetry.span("fine", "fine", len(parts[1].positions)):
            fine = self._rows(parts[1])
        if self._beside is not None:
            self._beside.join()
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

    def _aside(self) -> AbstractContextManager[None]:
        return nullcontext() if self._beside is None else self._beside.run()


class _Beside:
    """A stream of high priority that begins where the current one is, and is waited for by it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)

    @contextmanager
    def run(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        except BaseException:
            self.join()  # a capture that is left with a stream outside cannot be ended
            raise

    def join(self) -> None:
        # memory of the one stream that the other reads is given back after this wait, and taken again after the next
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def has_two_lanes(program: Program) -> bool:
    """Whether any wave has coarse rows and others."""
    return len(program.in_lanes()) > len(program)


def _parts(program: Program) -> list[list[tuple[int, int, int]]]:
    """Of each wave: the numbers of its parts in `in_lanes`, and which rows they are."""
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
