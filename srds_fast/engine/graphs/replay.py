"""A run that replays a recording, as a solver core."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ... import telemetry
from ...solvers.contract import Checkpoint, Core, Evaluate
from .device_lock import replaying
from .recording import Captured, Piece


def never(iteration: int) -> bool:
    """Nothing is launched ahead of a decision to stop."""
    return False


class Replay:
    """One run of a recording, on other inputs of the same layout.

    Args:
        captured: the recording.
        inputs: the tensors of this call, as those it was recorded with.
        ahead: true for an iteration after which the next launch is made before the change is read. That spares the
            device a pause, and costs the waves of one launch where the run then stops: it pays where a stop is
            unlikely.

    Attributes:
        core: the run as a core: of each wave it tells that it has been launched, and does not look at the answer.
        dropped_waves: launched ahead of a decision to stop.
    """

    def __init__(self, captured: Captured, inputs: Mapping[str, Tensor], ahead: Callable[[int], bool] = never) -> None:
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
            ahead: Piece | None = None
            for number in range(captured.checkpoints):
                stretch = captured.stretch(number)
                for piece in stretch.pieces:
                    if piece is not ahead:
                        self._launch(piece, number)
                    ahead, self.dropped_waves = None, 0
                    for positions, wave in piece.waves:
                        yield Evaluate(inputs["x"], positions, samples, wave)
                found = stretch.checkpoint()
                arriving = _Arriving(found)
                last = number == captured.checkpoints - 1
                if not last and self._ahead(found.iteration) and (following := captured.stretch(number + 1).pieces):
                    ahead = following[0]
                    self._launch(ahead, number + 1)
                    self.dropped_waves = len(ahead.waves)  # if it ends here
                checkpoint = arriving.of(running)
                answer = yield checkpoint
                assert not isinstance(answer, Tensor)
                result = _with(result, checkpoint)
                running = running if answer is None else tuple(running[position] for position in answer)
                if last or not running:
                    break
            assert result is not None
            return result

    def _launch(self, piece: Piece, stretch: int) -> None:
        with telemetry.replay(self._captured.program, stretch, len(piece.waves)):
            piece.graph.replay()


class _Arriving:
    """A checkpoint on its way to the host: copies that later stretches do not overwrite."""

    def __init__(self, found: Checkpoint) -> None:
        self._found = Checkpoint(
            found.iteration,
            found.sample.clone(),
            found.samples,
            _to_host(found.change),
            found.exact,
            _to_host(found.still),
        )
        # what the host looks at is copied in the order of the stream: no stream of its own could be earlier
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
        return Checkpoint(found.iteration, sample, running, change, found.exact, still)


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
