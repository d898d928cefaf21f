"""The loop graph: the waves of a plan recorded once, from checkpoint to checkpoint, each replayed by one launch.

A recording begins with the starting noise in a static tensor and ends with the sample of an iteration. It holds
everything between: the core's memory, its updates, the network, and the conditioning repeated for the rows. A replay
only needs new contents of the static tensors, and the host does nothing between two checkpoints. No sample leaves the
batch before the run ends, since a narrower batch would be another recording; each keeps the value it had when it was
done.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import telemetry
from ...errors import CaptureFailed
from ...solvers.contract import Checkpoint, Core, Evaluate
from .capturable import Capturable
from .capture_checks import CaptureCheck, refuse_unknown_reads
from .device_lock import device_lock
from .recorder import Graph, Recorder, TooLarge, record


@dataclass(frozen=True)
class Stretch:
    """The waves up to one checkpoint: one launch.

    Attributes:
        waves: positions and number of each.
        checkpoint: in memory that the replay of this stretch writes.
    """

    graph: Graph
    waves: Sequence[tuple[tuple[int, ...], int]]
    checkpoint: Checkpoint


class LoopGraph:
    """One graph from each checkpoint of a plan to the next, on static tensors.

    Args:
        call: what is recorded; its inputs are copied.
        recorder: of its device.
        most_operations: the most that the whole recording may hold, about: more would take long and much memory.
        streams: coarse rows run on a stream of their own.

    Attributes:
        name: of the engine, for reports.
        nbytes: memory that the device had less after the recording, where that can be asked.
        operations: recorded so far; about as many as kernels.
        reason: why coarse rows do not run on a stream of their own though that was asked for, or None.
        overlap: "streams" where they do, "batch" where they run with the others.
        broken: recording it further broke off; it is of no use any more.
        program: the waves.
    """

    name = "loop graph"

    def __init__(
        self, call: Capturable, recorder: Recorder, most_operations: float = math.inf, *, streams: bool = False
    ) -> None:
        self.overlap = "streams" if streams else "batch"
        self.nbytes = self.operations = 0
        self.reason: str | None = None
        self.device = call.device
        self.checkpoints = call.checkpoints
        self.program = call.program
        self.broken = False
        self._recorder = recorder
        self._networks = call.networks
        self._compiled = call.compiled
        self._most_operations = most_operations
        self._inputs = {name: torch.empty_like(each).copy_(each) for name, each in call.inputs.items()}
        self._stretches: list[Stretch] = []
        self._made: set[Hashable] = set()
        self._core, self._evaluate = call.begin(self._inputs, streams)
        self._evaluate.prepare()
        if call.compiled:  # torch compiles each width for itself, which no recording may hold
            for width in call.widths:
                self._evaluate(call.wave_of_zeros(width))
            self._evaluate.forget()
        if self.device.type != "cpu":
            _rehearse(call.begin(self._inputs, streams)[0], call.dtype)

    def extend_to(self, checkpoints: int) -> None:
        """Record what is missing up to so many checkpoints, as far as a run goes.

        Raises:
            CaptureFailed: an operation cannot be recorded. Nothing more can be done with this recording.
        """
        with device_lock(self.device):
            if self.broken:
                raise CaptureFailed("The recording broke off. It is made anew.")
            missing = range(len(self._stretches), min(checkpoints, self.checkpoints))
            try:
                with telemetry.recording() if missing else nullcontext():
                    for number in missing:
                        self._stretches.append(self._record_stretch(number))
            except BaseException:  # also an interrupt: waves may be lost
                self.broken = True
                raise

    def stretch(self, number: int) -> Stretch:
        """A stretch, recorded now if it has not been."""
        self.extend_to(number + 1)
        return self._stretches[number]

    def take(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy the inputs of a run to where graphs read them."""
        copy_to(self._inputs.values(), [inputs[name] for name in self._inputs])

    def run_through(self, inputs: Mapping[str, Tensor]) -> None:
        """Replay all stretches, to measure how long it takes."""
        with device_lock(self.device):
            self.take(inputs)
            for stretch in self._stretches:
                stretch.graph.replay()

    def _record_stretch(self, number: int) -> Stretch:
        waves: list[tuple[tuple[int, ...], int]] = []

        def work(check: CaptureCheck) -> Checkpoint:
            event = self._core.send(None)
            while isinstance(event, Evaluate):
                waves.append((event.positions, event.number))
                self._refuse_length(check, len(waves))
                with telemetry.span(*telemetry.of_wave(self.program, event.number)):
                    with check.network(self._compiled):
                        output = self._evaluate(event)
                    with telemetry.span("wave_update", "wave_update"):
                        event = self._core.send(output)
            return event

        iteration = self.program.first_iteration + number
        with telemetry.span(f"iteration {iteration}", "iteration", iteration):
            graph, check, checkpoint = record(self._recorder, work)
        inputs = [*self._inputs.values(), *self._evaluate.constants()]
        refuse_unknown_reads(check, inputs, self._networks, self._made)
        self._made |= check.made
        self.operations += check.operations
        return Stretch(graph, waves, checkpoint)

    def _refuse_length(self, check: CaptureCheck, waves: int) -> None:
        expected = check.operations / max(1, waves - 1) * len(self.program)
        if waves > 1 and expected > self._most_operations:
            raise TooLarge(
                f"One graph of the loop would hold about {expected:.0f} operations. It would take long to make and "
                "much memory. There is a graph of the network for each width of a wave instead."
            )


def copy_to(static: Iterable[Tensor], tensors: list[Tensor]) -> None:
    """Copy the inputs of a replay to the tensors that its graph reads."""
    for each in static:
        if each.is_cuda:  # the allocator must not reuse its memory before this stream is done with it
            each.record_stream(torch.cuda.current_stream(each.device))
    torch._foreach_copy_(list(static), tensors)


def _rehearse(core: Core, dtype: torch.dtype) -> None:
    """Run a core to its end on outputs of zeros: no kernel may be loaded for the first time in a recording.

    The eager run before may have ended earlier, and a replay may go further.
    """
    answer: Tensor | None = None
    with suppress(StopIteration):
        while True:
            event = core.send(answer)
            answer = torch.zeros_like(event.x, dtype=dtype) if isinstance(event, Evaluate) else None
