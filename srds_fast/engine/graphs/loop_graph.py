"""The loop graph: the waves of a plan recorded once, from checkpoint to checkpoint, each replayed by one launch.

A recording holds everything from the starting noise to the sample of an iteration: the core's memory, its updates, the
network, and the conditioning repeated for the rows. A replay only needs new contents of the static tensors, and the
host does nothing between two checkpoints. No sample leaves the batch before the run ends, since a narrower batch would
be another recording; each keeps the value it had when it was done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import telemetry
from ...errors import CaptureFailed
from ...solvers.contract import Answer, Checkpoint, Core, Evaluate, merged, samples_of
from .. import cancellation
from ..run import EngineUse
from .capturable import Capturable
from .capture_checks import CaptureCheck, refuse_unknown_reads
from .device_lock import device_lock, replaying
from .recorder import Graph, Recorder, TooLarge, record

# Largest difference between a replay and the eager run, relative to the largest value. A wrong recording is wrong by
# far more; batches of other widths round differently.
SAME = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class Stretch:
    """The waves up to one checkpoint, by number: one launch, which writes the memory of the checkpoint."""

    graph: Graph
    waves: list[int]
    checkpoint: Checkpoint


class LoopGraph:
    """One graph from each checkpoint of a plan to the next, on static tensors.

    most_operations: the most that it may hold, about. streams: coarse rows run on a stream of their own.
    """

    name = "loop graph"

    def __init__(
        self, call: Capturable, recorder: Recorder, most_operations: float = math.inf, *, streams: bool = False
    ) -> None:
        self.overlap = "streams" if streams else "batch"
        self.nbytes = self.operations = 0
        self.reason: str | None = None  # why coarse rows have no stream of their own though that was asked for
        self.broken = False  # recording it further broke off: it is of no use any more
        self.device, self.checkpoints, self.program = call.calls.device, call.checkpoints, call.program
        self._calls = call.calls
        self._recorder, self._most_operations = recorder, most_operations
        self.inputs = {name: torch.empty_like(each).copy_(each) for name, each in call.inputs.items()}
        self._stretches: list[Stretch] = []
        self._made: set[Hashable] = set()
        self._core, self._evaluate = call.begin(self.inputs, streams)
        self._evaluate.prepare()
        if call.calls.compiled:  # torch compiles each width for itself, which no recording may hold
            for width in call.widths:
                cancellation.wave(width)
                self._evaluate(call.wave_of_zeros(width))
            self._evaluate.forget()
        if self.device.type != "cpu":
            _rehearse(call.begin(self.inputs, streams)[0], call.dtype)

    def extend_to(self, checkpoints: int) -> None:
        """Record what is missing up to so many checkpoints. After a CaptureFailed the recording is of no use."""
        with device_lock(self.device):
            if self.broken:
                raise CaptureFailed("The recording was interrupted. The next call records again.")
            missing = range(len(self._stretches), min(checkpoints, self.checkpoints))
            try:
                with telemetry.recording() if missing else nullcontext():
                    for number in missing:
                        self._stretches.append(self._record_stretch(number))
            except BaseException:  # also an interrupt: waves may be lost
                self.broken = True
                raise

    def launch(self, number: int, *, early: bool = False) -> Stretch:
        """Replay a stretch, recorded now if it has not been. Raises `cancellation.Left`.

        early: no sample has been handed out yet; an interrupt waits for the first one.
        """
        cancellation.look_within() if early else cancellation.look()
        self.extend_to(number + 1)
        stretch = self._stretches[number]
        with telemetry.span(f"replay {self.program.first_iteration + number}", "replay", len(stretch.waves)):
            stretch.graph.replay()
        return stretch

    def _record_stretch(self, number: int) -> Stretch:
        waves: list[int] = []

        def work(check: CaptureCheck) -> Checkpoint:
            event = self._core.send(None)
            while isinstance(event, Evaluate):
                waves.append(event.number)
                expected = check.operations / max(1, len(waves) - 1) * len(self.program)
                if len(waves) > 1 and expected > self._most_operations:
                    raise TooLarge(
                        f"One graph of the loop would hold about {expected:.0f} operations. It would take too much "
                        "time and memory. Each number of rows gets a graph of the network instead."
                    )
                cancellation.look()
                with telemetry.span(*telemetry.of_wave(self.program, event.number)):
                    with check.network(self._calls.compiled):
                        output = self._evaluate(event)
                    with telemetry.span("wave_update", "wave_update"):
                        event = self._core.send(output)
            return event

        iteration = self.program.first_iteration + number
        with telemetry.span(f"iteration {iteration}", "iteration", iteration):
            graph, check, checkpoint = record(self._recorder, work)
        inputs = [*self.inputs.values(), *self._evaluate.constants()]
        refuse_unknown_reads(check, inputs, self._calls.networks, self._made)
        self._made |= check.made
        self.operations += check.operations
        return Stretch(graph, waves, checkpoint)


def copy_to(static: Iterable[Tensor], tensors: list[Tensor]) -> None:
    """Copy the inputs of a replay to the tensors that its graph reads."""
    for each in static:
        if each.is_cuda:  # the allocator must not reuse its memory before this stream is done with it
            each.record_stream(torch.cuda.current_stream(each.device))
    torch._foreach_copy_(list(static), tensors)


def _rehearse(core: Core, dtype: torch.dtype) -> None:
    """Run a core to its end on zeros, unlike the eager run: a recording must not load a kernel for the first time."""
    answer: Tensor | None = None
    with suppress(StopIteration):
        while True:
            event = core.send(answer)
            answer = torch.zeros_like(event.x, dtype=dtype) if isinstance(event, Evaluate) else None


def replay(
    captured: LoopGraph,
    inputs: Mapping[str, Tensor],
    engine: EngineUse,
    ahead: Callable[[int], bool] = lambda iteration: False,
) -> Core:
    """One run of a recording as a core: it hands out each wave when it has been launched, and ignores the answer.

    engine: the waves that were launched ahead of a decision to stop are counted here. ahead: true for an iteration
    after which the next stretch is launched before the change is read. The device then does not pause, and the waves of
    one launch are wasted where the run stops: it pays where a stop is unlikely.
    """
    with replaying(captured.device):
        copy_to(captured.inputs.values(), [inputs[name] for name in captured.inputs])
        running = samples = tuple(range(len(inputs["x"])))
        result: Tensor | None = None
        following: Stretch | None = None
        for number in range(captured.checkpoints):
            stretch = following or captured.launch(number)
            following, engine.dropped_waves = None, 0
            for wave in stretch.waves:
                yield Evaluate(inputs["x"], captured.program.positions[wave], samples, wave)
            arriving = _Arriving(stretch.checkpoint)
            last = number == captured.checkpoints - 1
            if not last and ahead(stretch.checkpoint.iteration):
                following = captured.launch(number + 1, early=number == 0)
                engine.dropped_waves = len(following.waves)  # dropped if the run ends here
            checkpoint = arriving.of(running)
            answer = yield checkpoint
            result = merged(result, checkpoint.sample, running)
            running = tuple(running[position] for position in samples_of(answer, running))
            if last or not running:
                break
        assert result is not None
        return result


class _Arriving:
    """A checkpoint on its way to the host: copies that later stretches do not overwrite."""

    def __init__(self, found: Checkpoint) -> None:
        self._found = replace(found.measured(_to_host), sample=found.sample.clone())
        # the copy to the host follows in the same stream: a stream of its own could not begin earlier
        self._event: Any = None
        if found.sample.is_cuda and found.change is not None:
            self._event = torch.cuda.current_stream(found.sample.device).record_event()

    def of(self, running: tuple[int, ...]) -> Checkpoint:
        """The checkpoint of these samples, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        found = self._found
        if len(running) == len(found.samples):
            return found
        index = torch.tensor(running, device="cpu")
        sample = found.sample[index.to(found.sample.device)]
        return replace(found.measured(lambda each: each[..., index]), sample=sample, samples=running)


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def compare(captured: LoopGraph, call: Capturable, expected: Tensor, iterations: list[int]) -> None:
    """Raise CaptureFailed if a replay on the call's own inputs does not give its result, [batch, ...].

    iterations: after how many each sample was done.
    """
    answer: Answer = None
    with closing(replay(captured, call.inputs, EngineUse())) as core:
        while True:
            try:
                event = core.send(answer)
            except StopIteration as stop:
                found = stop.value
                break
            answer = None
            if isinstance(event, Checkpoint):
                answer = tuple(i for i, sample in enumerate(event.samples) if iterations[sample] > event.iteration)
    refuse_difference(found, expected, call.dtype)


def refuse_difference(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise CaptureFailed if what a replay found is not what an eager run in this dtype gave."""
    if not expected.numel():
        return
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= SAME.get(dtype, 0.0) * largest:
        raise CaptureFailed(
            f"The recorded loop is not used: its replay differs from the eager run by {difference:.2g} where values "
            f"reach {largest:.2g}. A replay leaves out something that the network does. The call runs without graphs."
        )
