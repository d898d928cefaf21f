"""A run that replays a recording, as a solver core."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ... import telemetry
from ...solvers.contract import Checkpoint, Core, Evaluate
from .device_lock import replaying
from .recording import LoopGraph, Stretch


def never(iteration: int) -> bool:
    """Launch nothing ahead of a decision to stop."""
    return False


class Replay:
    """One run of a recording, on other inputs of the same layout.

    Args:
        captured: the recording.
        inputs: the tensors of this call, laid out as those it was recorded with.
        ahead: true for an iteration after which the next stretch is launched before the change is read. The device
            then does not pause, and the waves of one launch are wasted where the run stops: it pays where a stop is
            unlikely.

    Attributes:
        core: the run as a core: it tells of each wave that it has been launched, and ignores the answer.
        dropped_waves: launched ahead of a decision to stop.
    """

    def __init__(self, captured: LoopGraph, inputs: Mapping[str, Tensor], ahead: Callable[[int], bool] = never) -> None:
        self.dropped_waves = 0
        self._captured = captured
        self._ahead = ahead
        self.core = self._run(inputs)

    def _run(self, inputs: Mapping[str, Tensor]) -> Core:
        captured = self._captured
        with replaying(captured.device):
            captured.take(inputs)
            samples = tuple(range(len(inputs["x"])))
            running = samples
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
                result = _with(result, checkpoint)
                running = running if answer is None else tuple(running[position] for position in answer)
                if last or not running:
                    break
            assert result is not None
            return result

    def _launch(self, stretch: Stretch, number: int) -> None:
        with telemetry.replay(self._captured.program, number, len(stretch.waves)):
            stretch.graph.replay()


class _Arriving:
    """A checkpoint on its way to the host: copies that later stretches do not overwrite."""

    def __init__(self, found: Checkpoint) -> None:
        self._found = Checkpoint(
            found.iteration,
            found.sample.clone(),
            found.samples,
            _to_host(found.change),
            found.exact,
            _to_host(found.stationary),
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
        change, stationary = (None if each is None else each[index] for each in (found.change, found.stationary))
        sample = found.sample[index.to(found.sample.device)]
        return Checkpoint(found.iteration, sample, running, change, found.exact, stationary)


def _to_host(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not tensor.is_cuda:
        return None if tensor is None else tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _with(result: Tensor | None, checkpoint: Checkpoint) -> Tensor:
    if result is None or len(result) == len(checkpoint.samples):
        return checkpoint.sample
    result = result.clone()
    result[list(checkpoint.samples)] = checkpoint.sample
    return result
