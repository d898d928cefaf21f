"""The graph engine: the waves of a plan recorded once, from checkpoint to checkpoint, and replayed by one launch each.

A recording begins with the starting noise in a static tensor and ends with the sample of an iteration. All between is
in it: the core's memory, its updates, the network, its conditioning repeated for the rows. So a replay needs nothing
but new contents of the static tensors, and the host does nothing from one checkpoint to the next. No sample leaves the
batch before the run ends, as a narrower batch would be another recording; each keeps what it had when it was done.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ... import telemetry
from ...errors import CaptureFailed
from ...solvers.contract import Checkpoint, Core, Evaluate
from ..evaluator import Evaluator
from .cache_key import tensors_of
from .capturable import Capturable
from .capture_checks import Guard, not_among, storage_of
from .device_lock import turn
from .recorder import Graph, Recorder

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """What one launch does.

    Attributes:
        waves: positions and number of each.
    """

    graph: Graph
    waves: tuple[tuple[tuple[int, ...], int], ...]


@dataclass(frozen=True)
class Stretch:
    """The waves up to one checkpoint.

    Attributes:
        checkpoint: gives the checkpoint as the replay that was just launched leaves it.
    """

    pieces: tuple[Piece, ...]
    checkpoint: Callable[[], Checkpoint]


class Captured(ABC):
    """The stretches of one plan on static tensors.

    Args:
        call: what is recorded; its inputs are copied.
        recorder: of its device.

    Attributes:
        name: of the engine, for reports.
        nbytes: memory that the device had less after the recording, where that can be asked.
        operations: recorded so far; about as many as kernels.
        reason: why it is not of a faster kind, or None.
        overlap: "streams" where coarse rows run beside the others, "batch" where with them.
        broken: recording it further broke off; it is of no use any more.
        program: the waves.
    """

    name: str
    overlap = "batch"

    def __init__(self, call: Capturable, recorder: Recorder) -> None:
        self.nbytes = self.operations = 0
        self.reason: str | None = None
        self.checkpoints = call.checkpoints
        self.program = call.program
        self._recorder = recorder
        self._networks = call.networks
        self._compiled = call.compiled
        self._inputs = {name: torch.empty_like(each).copy_(each) for name, each in call.inputs.items()}
        self._known: list[Tensor] = [*self._inputs.values()]
        self._stretches: list[Stretch] = []
        self._made: set[int] = set()
        self.broken = False

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._inputs["x"].device

    def extend_to(self, checkpoints: int) -> None:
        """Record what is missing up to so many checkpoints, as far as a run goes.

        Raises:
            CaptureFailed: an operation cannot be recorded. Nothing more can be done with this recording.
        """
        wanted = min(checkpoints, self.checkpoints)
        with turn(self.device):
            if self.broken:
                raise CaptureFailed("The recording broke off. It is made anew.")
            try:
                if len(self._stretches) < wanted:
                    with telemetry.recording():
                        self._record_up_to(wanted)
            except BaseException:  # an interrupt as well: waves may be lost
                self.broken = True
                raise

    def _record_up_to(self, checkpoints: int) -> None:
        while len(self._stretches) < checkpoints:
            self._stretches.append(self._record_stretch(len(self._stretches)))

    def stretch(self, number: int) -> Stretch:
        """A stretch, recorded now if it has not been."""
        self.extend_to(number + 1)
        return self._stretches[number]

    def take(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy the inputs of a run to where graphs read them."""
        if self.device.type == "cuda":
            for tensor in self._static():  # given back, they are not to be taken again before this stream has done
                tensor.record_stream(torch.cuda.current_stream(self.device))
        torch._foreach_copy_(list(self._inputs.values()), [inputs[name] for name in self._inputs])

    def _static(self) -> Iterable[Tensor]:
        """What lies outside the graphs' own memory, and is read or written by them."""
        return self._inputs.values()

    def run_through(self, inputs: Mapping[str, Tensor]) -> None:
        """Replay all there is, to see how long it takes."""
        with turn(self.device):
            self.take(inputs)
            for stretch in self._stretches:
                for piece in stretch.pieces:
                    piece.graph.replay()

    @abstractmethod
    def _record_stretch(self, number: int) -> Stretch:
        """Record the next stretch."""

    def _make_ready(self, call: Capturable, evaluate: Evaluator) -> None:
        evaluate.prepare()
        self._known += evaluate.constants()
        if call.compiled:  # while nothing is recorded: every width is compiled for itself
            x = self._inputs["x"]
            for positions in {len(positions): positions for positions in call.positions}.values():
                rows = call.network.empty(len(positions), x).zero_()
                evaluate(Evaluate(rows, positions, tuple(range(len(x))), call.positions.index(positions)))
            evaluate.forget()

    def _record(self, work: Callable[[Guard], T]) -> tuple[Graph, T]:
        guards: list[Guard] = []

        def watched(guard: Guard) -> T:
            guards.append(guard)
            return work(guard)

        # weights that autocast has cast before would be read, and never be cast again
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        try:
            graph, found = self._recorder.record(watched)
        finally:
            torch.set_autocast_cache_enabled(cached)
        (guard,) = guards
        self._refuse_strangers(guard)
        self._made |= guard.storages
        self.operations += guard.operations
        return graph, found

    def _refuse_strangers(self, guard: Guard) -> None:
        known = self._known.copy()
        for network in self._networks:
            known += tensors_of(network)
        for stranger in not_among(guard.read_by_network, known):
            if storage_of(stranger) not in self._made:
                raise CaptureFailed(
                    f"The loop cannot be captured: the network reads a tensor of shape {tuple(stranger.shape)} that is "
                    "neither an argument nor held by one of its modules. Another one in its place would not be seen. "
                    "Make it a parameter or a buffer; until then it runs eagerly."
                )


class LoopGraph(Captured):
    """One graph from each checkpoint to the next.

    Args:
        call, recorder: as of `Captured`.
        most_operations: that a whole recording may hold, about: more would take long to record, and much memory.
        beside: coarse rows run beside the others.
    """

    name = "loop graph"

    def __init__(
        self, call: Capturable, recorder: Recorder, most_operations: float = math.inf, *, beside: bool = False
    ) -> None:
        super().__init__(call, recorder)
        self.overlap = "streams" if beside else "batch"
        self._core, self._evaluate = call.begin(self._inputs, beside)
        self._make_ready(call, self._evaluate)
        if self.device.type != "cpu":
            _rehearse(call.begin(self._inputs, beside)[0], call.dtype)
        self._most_operations = most_operations
        self._waves_recorded = 0

    def _record_stretch(self, number: int) -> Stretch:
        waves: list[tuple[tuple[int, ...], int]] = []

        def work(guard: Guard) -> Checkpoint:
            event = self._core.send(None)
            while isinstance(event, Evaluate):
                waves.append((event.positions, event.number))
                self._refuse_length(guard, len(waves))
                with telemetry.wave(self.program, event.number):
                    with guard.network(self._compiled):
                        output = self._evaluate(event)
                    with telemetry.span("wave_update", "wave_update"):
                        event = self._core.send(output)
            return event

        with telemetry.iteration(self.program, number):
            graph, checkpoint = self._record(work)
        self._waves_recorded += len(waves)
        return Stretch((Piece(graph, tuple(waves)),), lambda: checkpoint)

    def _refuse_length(self, guard: Guard, waves: int) -> None:
        expected = guard.operations / max(1, waves - 1) * len(self.program)
        if waves > 1 and expected > self._most_operations:
            raise CaptureFailed(
                f"One graph of the loop would hold about {expected:.0f} operations. It would take long to make and "
                "much memory. There is a graph for each width of a wave instead."
            )


def _rehearse(core: Core, dtype: torch.dtype) -> None:
    """Run a core to its end on answers of zeros: a kernel may not be loaded for the first time in a recording.

    The run before it may have ended earlier, and a replay may have to go further.
    """
    answer: Tensor | None = None
    with suppress(StopIteration):
        while True:
            event = core.send(answer)
            answer = torch.zeros_like(event.x, dtype=dtype) if isinstance(event, Evaluate) else None
