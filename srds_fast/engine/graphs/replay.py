"""A run that replays a recording, as a solver core; and the comparison of a replay with the eager run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import telemetry
from ...errors import CaptureFailed
from ...solvers.contract import Checkpoint, Core, Evaluate
from .capturable import Capturable
from .device_lock import replaying
from .recording import LoopGraph, Stretch

# Largest difference between a replay and the eager run, relative to the largest value. A wrong recording is wrong by
# far more; batches of other widths round differently.
SAME = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class Replay:
    """One run of a recording, on other inputs of the same layout.

    Args:
        captured: the recording.
        inputs: the tensors of this call, laid out as those it was recorded with.
        ahead: true for an iteration after which the next stretch is launched before the change is read. The device
            then does not pause, and the waves of one launch are wasted where the run stops: it pays where a stop is
            unlikely.

    Attributes:
        core: the run as a core: it hands out each wave when it has been launched, and ignores the answer.
        dropped_waves: launched ahead of a decision to stop.
    """

    def __init__(
        self, captured: LoopGraph, inputs: Mapping[str, Tensor], ahead: Callable[[int], bool] = lambda iteration: False
    ) -> None:
        self.dropped_waves = 0
        self._captured = captured
        self._ahead = ahead
        self.core = self._run(inputs)

    def _run(self, inputs: Mapping[str, Tensor]) -> Core:
        captured = self._captured
        with replaying(captured.device):
            captured.take(inputs)
            running = samples = tuple(range(len(inputs["x"])))
            result: Tensor | None = None
            launched = False
            for number in range(captured.checkpoints):
                stretch = captured.stretch(number)
                if not launched:
                    self._launch(stretch, number)
                launched, self.dropped_waves = False, 0
                for positions, wave in stretch.waves:
                    yield Evaluate(inputs["x"], positions, samples, wave)
                arriving = _Arriving(stretch.checkpoint)
                last = number == captured.checkpoints - 1
                if not last and self._ahead(stretch.checkpoint.iteration):
                    following = captured.stretch(number + 1)
                    self._launch(following, number + 1)
                    launched, self.dropped_waves = True, len(following.waves)  # dropped if the run ends here
                checkpoint = arriving.of(running)
                answer = yield checkpoint
                assert not isinstance(answer, Tensor)
                if result is None or len(result) == len(running):
                    result = checkpoint.sample
                else:  # samples that are done keep what they had
                    result = result.index_copy(0, torch.tensor(running, device=result.device), checkpoint.sample)
                running = running if answer is None else tuple(running[position] for position in answer)
                if last or not running:
                    break
            assert result is not None
            return result

    def _launch(self, stretch: Stretch, number: int) -> None:
        iteration = self._captured.program.first_iteration + number
        with telemetry.span(f"replay {iteration}", "replay", len(stretch.waves)):
            stretch.graph.replay()


class _Arriving:
    """A checkpoint on its way to the host: copies that later stretches do not overwrite."""

    def __init__(self, found: Checkpoint) -> None:
        self._found = replace(
            found, sample=found.sample.clone(), change=_to_host(found.change), still=_to_host(found.still)
        )
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
        index = torch.tensor(running)
        change, still = (None if each is None else each[index] for each in (found.change, found.still))
        sample = found.sample[index.to(found.sample.device)]
        return replace(found, sample=sample, samples=running, change=change, still=still)


def _to_host(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not tensor.is_cuda:
        return None if tensor is None else tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def compare(captured: LoopGraph, call: Capturable, expected: Tensor, iterations: list[int]) -> None:
    """Raise CaptureFailed if a replay on the call's own inputs does not give its result.

    Args:
        expected: result of the eager run, [batch, ...].
        iterations: after how many each sample was done.
    """
    core = Replay(captured, call.inputs).core
    found = torch.empty_like(expected)
    try:
        event: Any = next(core)
        with suppress(StopIteration):
            while True:
                if isinstance(event, Evaluate):
                    event = core.send(event.x)
                    continue
                running = range(len(event.samples))
                done = [position for position in running if iterations[event.samples[position]] <= event.iteration]
                found[[event.samples[position] for position in done]] = event.sample[done]
                event = core.send(tuple(position for position in running if position not in done))
    finally:
        core.close()
    refuse_difference(found, expected, call.dtype)


def refuse_difference(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise CaptureFailed if what a replay found is not what an eager run in this dtype gave."""
    if not expected.numel():
        return
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= SAME.get(dtype, 0.0) * largest:
        raise CaptureFailed(
            f"The loop is not captured: its replay differs from the eager run by {difference:.2g} where values reach "
            f"{largest:.2g}. Something in the network is not repeated by a replay. It runs eagerly."
        )
