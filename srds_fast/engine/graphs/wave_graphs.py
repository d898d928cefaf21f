"""A graph for every width of a wave: one launch a wave, few graphs however many waves there are.

The waves of a width are the same operations: which of them it is, a counter on the device tells. The memory of the core
lies beside the graphs, not in them; the first graph, without a wave, begins a run on it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import Tensor

from ... import telemetry
from ...solvers.dataflow import Birth
from .capturable import Capturable
from .capture_checks import Guard
from .recorder import Recorder
from .recording import Captured, Graph, Piece, Stretch


class WaveGraphs(Captured):
    """See `Captured`."""

    name = "wave graphs"

    def __init__(self, call: Capturable, recorder: Recorder) -> None:
        super().__init__(call, recorder)
        self._waves, self._evaluate = call.begin_counted(self._inputs)
        self._known += self._waves.read_by_network()
        self._make_ready(call, self._evaluate)
        self._waves.warm_up(call.dtype)
        self._of_width: dict[int, Graph] = {}
        self._next = 0
        self._waiting: list[Birth] = []

    def _static(self) -> Iterable[Tensor]:
        return [*super()._static(), *self._waves.memory()]

    def _record_stretch(self, number: int) -> Stretch:
        pieces = []
        if number == 0:
            start, _ = self._record(lambda guard: self._start())
            pieces.append(Piece(start, ()))
        while not self._waiting:
            positions = self._waves.program.positions[self._next]
            pieces.append(Piece(self._graph_of(len(positions)), ((positions, self._next),)))
            self._waiting += self._waves.born(self._next)
            self._next += 1
        return Stretch(tuple(pieces), functools.partial(self._waves.checkpoint, self._waiting.pop(0)))

    def _graph_of(self, width: int) -> Graph:
        if width not in self._of_width:
            with telemetry.wave(self._waves.program, self._next):
                self._of_width[width], _ = self._record(self._run_wave)
        return self._of_width[width]

    def _start(self) -> None:
        self._waves.start()
        self._evaluate.repeat(self._waves.widest())

    def _run_wave(self, guard: Guard) -> None:
        with guard.network(self._compiled):
            output = self._evaluate(self._waves.evaluate(self._next))
        with telemetry.span("wave_update", "wave_update"):
            self._waves.update(output)
