"""The loop graph: the waves of a plan recorded once, from checkpoint to checkpoint, each replayed by one launch.

A recording begins with the starting noise in a static tensor and ends with the sample of an iteration. It holds
everything between: the core's memory, its updates, the network, and the conditioning repeated for the rows. A replay
only needs new contents of the static tensors, and the host does nothing between two checkpoints. No sample leaves the
batch before the run ends, since a narrower batch would be another recording; each keeps the value it had when it was
done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import telemetry
from ...errors import CaptureFailed
from ...solvers.contract import Checkpoint, Core, Evaluate
from .capturable import Capturable
from .capture_checks import CaptureCheck, refuse_unknown_reads
from .device_lock import device_lock
from .memory import TooLarge
from .recorder import Graph, Recorder, recorded


@dataclass(frozen=True)
class Stretch:
    """The waves up to one checkpoint: one launch.

    Attributes:
        waves: positions and number of each.
        checkpoint: in memory that the replay of this stretch writes.
    """

    graph: Graph
    waves: tuple[tuple[tuple[int, ...], int], ...]
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
        self.checkpoints = call.checkpoints
        self.program = call.program
        self.broken = False
        self._recorder = recorder
        self._networks = call.networks
        self._compiled = call.compiled
        self._most_operations = most_operations
        self._inputs = {name: torch.empty_like(each).copy_(each) for name, each in call.inputs.items()}
        self._stretches: list[Stretch] = []
        self._made: set[int] = set()
        self._core, self._evaluate = call.begin(self._inputs, streams)
        self._evaluate.prepare()
        self._known = [*self._inputs.values(), *self._evaluate.constants()]
        if call.compiled:  # torch compiles each width for itself, which no recording may hold
            for width in call.widths:
                self._evaluate(call.wave_of_zeros(width))
            self._evaluate.forget()
        if self.device.type != "cpu":
            _rehearse(call.begin(self._inputs, streams)[0], call.dtype)

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
        with device_lock(self.device):
            if self.broken:
                raise CaptureFailed("The recording broke off. It is made anew.")
            try:
                if len(self._stretches) < wanted:
                    with telemetry.recording():
                        while len(self._stretches) < wanted:
                            self._stretches.append(self._record_stretch(len(self._stretches)))
            except BaseException:  # also an interrupt: waves may be lost
                self.broken = True
                raise

    def stretch(self, number: int) -> Stretch:
        """A stretch, recorded now if it has not been."""
        self.extend_to(number + 1)
        return self._stretches[number]

    def take(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy the inputs of a run to where graphs read them."""
        if self.device.type == "cuda":
            for tensor in self._inputs.values():  # the allocator must not reuse them before this stream is done
                tensor.record_stream(torch.cuda.current_stream(self.device))
        torch._foreach_copy_(list(self._inputs.values()), [inputs[name] for name in self._inputs])

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
                with telemetry.wave(self.program, event.number):
                    with check.network(self._compiled):
                        output = self._evaluate(event)
                    with telemetry.span("wave_update", "wave_update"):
                        event = self._core.send(output)
            return event

        with telemetry.iteration(self.program, number):
            graph, check, checkpoint = recorded(self._recorder, work)
        refuse_unknown_reads(check, self._known, self._networks, self._made)
        self._made |= check.storages
        self.operations += check.operations
        return Stretch(graph, tuple(waves), checkpoint)

    def _refuse_length(self, check: CaptureCheck, waves: int) -> None:
        expected = check.operations / max(1, waves - 1) * len(self.program)
        if waves > 1 and expected > self._most_operations:
            raise TooLarge(
                f"One graph of the loop would hold about {expected:.0f} operations. It would take long to make and "
                "much memory. There is a graph of the network for each width of a wave instead."
            )


def _rehearse(core: Core, dtype: torch.dtype) -> None:
    """Run a core to its end on outputs of zeros: no kernel may be loaded for the first time in a recording.

    The eager run before may have ended earlier, and a replay may go further.
    """
    answer: Tensor | None = None
    with suppress(StopIteration):
        while True:
            event = core.send(answer)
            answer = torch.zeros_like(event.x, dtype=dtype) if isinstance(event, Evaluate) else None
