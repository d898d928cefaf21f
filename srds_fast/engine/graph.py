"""The graph engine: the waves of a plan recorded once, from checkpoint to checkpoint, and replayed by one launch each.

A recording begins with the starting noise in a static tensor and ends with the sample of an iteration. All between is
in it: the core's memory, its updates, the network, its conditioning repeated for the rows. So a replay needs nothing
but new contents of the static tensors, and the host does nothing from one checkpoint to the next. No sample leaves the
batch before the run ends, as a narrower batch would be another recording; each keeps what it had when it was done.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureFailed
from ..solvers.core import Checkpoint, Core, Evaluate
from .fingerprint import fingerprint, hooked, tensors_of
from .guard import Guard, not_among, storage_of
from .recorder import Graph, Recorder, turn


@dataclass(frozen=True)
class Capturable:
    """What a call would have recorded.

    Attributes:
        signature: by value, all that changes the recording beside `inputs` and `networks`.
        inputs: the tensors that are others in every call, by name; "x" is the starting noise, [batch, ...].
        networks: the networks that are called.
        begin: given static tensors in the place of inputs, makes a core that has not begun, and what runs its waves.
        constants: tensors that never change, which the waves are run with.
        checkpoints: how many a run has at most.
        dtype: of the network.
    """

    signature: Hashable
    inputs: Mapping[str, Tensor]
    networks: tuple[nn.Module, ...]
    begin: Callable[[Mapping[str, Tensor]], tuple[Core, Callable[[Evaluate], Tensor]]]
    constants: Callable[[], Iterable[Tensor]]
    checkpoints: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.inputs["x"].device

    def why_not(self) -> str | None:
        """Why it cannot be recorded, or None."""
        for network in self.networks:
            if (part := hooked(network)) is not None:
                return f"a hook hangs on {part}: a replay would not call it"
        return None

    def key(self) -> Hashable:
        """All that a recording depends on."""
        layout = tuple((name, each.shape, each.stride(), each.dtype, each.device) for name, each in self.inputs.items())
        return self.signature, layout, _process_state(), tuple(map(fingerprint, self.networks))


def _process_state() -> Hashable:
    """What of torch's own state operations look at."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")),
        torch.get_float32_matmul_precision(),
        matmul.allow_tf32,
        matmul.allow_fp16_reduced_precision_reduction,
        cudnn.enabled,
        cudnn.allow_tf32,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


@dataclass(frozen=True)
class _Stretch:
    """The waves up to one checkpoint.

    Attributes:
        waves: positions and number of each.
        checkpoint: its tensors are written by every replay.
    """

    graph: Graph
    waves: tuple[tuple[tuple[int, ...], int], ...]
    checkpoint: Checkpoint


class Captured:
    """The stretches of one plan on static tensors.

    Args:
        call: what is recorded; its inputs are copied.
        recorder: of its device.

    Attributes:
        nbytes: memory that the device had less after the recording, where that can be asked.
    """

    def __init__(self, call: Capturable, recorder: Recorder) -> None:
        self.nbytes = 0
        self._recorder = recorder
        self._checkpoints = call.checkpoints
        self._networks = call.networks
        self._constants = call.constants
        self._inputs = {name: torch.empty_like(each).copy_(each) for name, each in call.inputs.items()}
        self._core, self._evaluate = call.begin(self._inputs)
        self._stretches: list[_Stretch] = []
        self._made: set[int] = set()

    @property
    def num_stretches(self) -> int:
        """Stretches recorded so far."""
        return len(self._stretches)

    def extend_to(self, checkpoints: int) -> None:
        """Record what is missing up to so many checkpoints, as far as a run goes.

        Raises:
            CaptureFailed: an operation cannot be recorded. Nothing more can be done with this recording.
        """
        with turn(self._device):
            while len(self._stretches) < min(checkpoints, self._checkpoints):
                self._stretches.append(self._record())

    def _record(self) -> _Stretch:
        waves: list[tuple[tuple[int, ...], int]] = []
        guards: list[Guard] = []

        def work(guard: Guard) -> Checkpoint:
            guards.append(guard)
            event = self._core.send(None)
            while isinstance(event, Evaluate):
                waves.append((event.positions, event.number))
                guard.in_network = True
                output = self._evaluate(event)
                guard.in_network = False
                event = self._core.send(output)
            return event

        graph, checkpoint = self._recorder.record(work)
        (guard,) = guards
        self._refuse_strangers(guard)
        self._made |= guard.storages
        return _Stretch(graph, tuple(waves), checkpoint)

    def _refuse_strangers(self, guard: Guard) -> None:
        known = [*self._inputs.values(), *self._constants()]
        for network in self._networks:
            known += tensors_of(network)
        for stranger in not_among(guard.read_by_network, known):
            if storage_of(stranger) not in self._made:
                raise CaptureFailed(
                    f"The loop cannot be captured: the network reads a tensor of shape {tuple(stranger.shape)} that is "
                    "neither an argument nor held by one of its modules. Another one in its place would not be seen. "
                    "Make it a parameter or a buffer; until then it runs eagerly."
                )

    @property
    def _device(self) -> torch.device:
        return self._inputs["x"].device

    def replay(self, inputs: Mapping[str, Tensor], *, late: bool = False) -> Replay:
        """A run on other inputs of the same layout.

        Args:
            inputs: as those it was recorded with.
            late: launch the next stretch before the change of the last one is looked at. That spares the device a pause
                of some ten microseconds at every checkpoint, and costs a stretch where the run then stops.
        """
        return Replay(self, inputs, late)


class Replay:
    """One run of a recording.

    Attributes:
        core: the run as a core: of each wave it tells that it has been launched, and does not look at the answer.
        dropped_waves: launched ahead of a decision to stop.
    """

    def __init__(self, captured: Captured, inputs: Mapping[str, Tensor], late: bool) -> None:
        self.dropped_waves = 0
        self._captured = captured
        self._launched: list[_Arriving] = []
        self._late = late
        self.core = self._run(inputs)

    def _run(self, inputs: Mapping[str, Tensor]) -> Core:
        captured = self._captured
        static = captured._inputs
        with turn(captured._device), torch.no_grad():
            torch._foreach_copy_(list(static.values()), [inputs[name] for name in static])
            samples = tuple(range(len(static["x"])))
            running = samples
            result: Tensor | None = None
            for number in range(captured._checkpoints):
                arriving = self._launch(number)
                stretch, found = captured._stretches[number], arriving.checkpoint
                for positions, wave in stretch.waves:
                    yield Evaluate(found.sample, positions, samples, wave)
                last = number == captured._checkpoints - 1
                if self._late and not last:
                    self._launch(number + 1)
                checkpoint = arriving.of(running)
                answer = yield checkpoint
                assert not isinstance(answer, Tensor)
                result = _with(result, checkpoint)
                running = running if answer is None else tuple(running[position] for position in answer)
                if last or not running:
                    break
            ahead = self._launched[number + 1 :]
            self.dropped_waves = sum(len(each.stretch.waves) for each in ahead)
            assert result is not None
            return result

    def _launch(self, number: int) -> _Arriving:
        if number == len(self._launched):
            self._captured.extend_to(number + 1)
            stretch = self._captured._stretches[number]
            stretch.graph.replay()
            self._launched.append(_Arriving(stretch))
        return self._launched[number]


class _Arriving:
    """A checkpoint on its way to the host: copies that later stretches do not overwrite."""

    def __init__(self, stretch: _Stretch) -> None:
        self.stretch = stretch
        found = stretch.checkpoint
        self.checkpoint = Checkpoint(
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
        found = self.checkpoint
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
