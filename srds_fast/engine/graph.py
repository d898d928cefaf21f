"""The graph engine: the waves of a plan recorded once, from checkpoint to checkpoint, and replayed by one launch each.

A recording begins with the starting noise in a static tensor and ends with the sample of an iteration. All between is
in it: the core's memory, its updates, the network, its conditioning repeated for the rows. So a replay needs nothing
but new contents of the static tensors, and the host does nothing from one checkpoint to the next. No sample leaves the
batch before the run ends, as a narrower batch would be another recording; each keeps what it had when it was done.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .. import telemetry
from ..errors import CaptureFailed
from ..kernels.wave_update import NetworkInput
from ..program import Program
from ..solvers.core import Checkpoint, Core, Evaluate
from ..solvers.waves import CountedWaves
from .fingerprint import fingerprint, hooked, tensors_of
from .guard import Guard, not_among, storage_of
from .recorder import Graph, Recorder
from .turn import replaying, turn

T = TypeVar("T")


class Evaluator(Protocol):
    """Runs the waves of a recording."""

    def __call__(self, wave: Evaluate) -> Tensor:
        """The network's output at a wave, [branches * rows, samples, ...]."""

    def prepare(self) -> None:
        """Copy to the device what the waves of a whole batch would copy when they need it."""

    def constants(self) -> Iterable[Tensor]:
        """What was copied."""

    def repeat(self, wave: Evaluate) -> None:
        """Repeat the conditioning for the rows of a wave, and those of narrower ones."""

    def forget(self) -> None:
        """Give the repeated conditioning back."""


@dataclass(frozen=True)
class Capturable:
    """What a call would have recorded.

    Attributes:
        signature: by value, all that changes the recording beside `inputs` and `networks`.
        inputs: the tensors that are others in every call, by name; "x" is the starting noise, [batch, ...].
        networks: the networks that are called.
        live: dictionaries of theirs, by identity, whose values are among the inputs.
        compiled: some network is run through torch.compile.
        overlap: "batch"; "streams": coarse rows beside the others; "auto": which of the two is faster, measured.
        begin: given static tensors in the place of inputs, makes a core that has not begun, and what runs its waves: in
            one batch each, or (True) coarse rows beside the others.
        begin_counted: the same with waves that count themselves.
        checkpoints: how many a run has at most.
        program: the waves.
        network: how the network wants its rows.
        dtype: of the network.
    """

    signature: Hashable
    inputs: Mapping[str, Tensor]
    networks: tuple[nn.Module, ...]
    begin: Callable[[Mapping[str, Tensor], bool], tuple[Core, Evaluator]]
    begin_counted: Callable[[Mapping[str, Tensor]], tuple[CountedWaves, Evaluator]]
    checkpoints: int
    program: Program
    network: NetworkInput
    dtype: torch.dtype
    live: frozenset[int] = frozenset()
    compiled: bool = False
    overlap: str = "batch"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.inputs["x"].device

    @property
    def positions(self) -> Sequence[tuple[int, ...]]:
        """Of the rows of every wave."""
        return self.program.positions

    def why_not(self) -> str | None:
        """Why it cannot be recorded, or None."""
        for network in self.networks:
            if (part := hooked(network)) is not None:
                return f"a hook hangs on {part}: a replay would not call it"
        return None

    def key(self) -> Hashable:
        """All that a recording depends on."""
        layout = tuple((name, each.shape, each.stride(), each.dtype, each.device) for name, each in self.inputs.items())
        return self.signature, layout, _process_state(), tuple(fingerprint(each, self.live) for each in self.networks)


def _process_state() -> Hashable:
    """What of torch's own state operations look at."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")),
        *_precisions(),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


def _precisions() -> Iterator[Hashable]:
    """Of float32 products. torch has an old interface and a new one, and refuses the old once the new was used."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    for read in (torch.get_float32_matmul_precision, lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32):
        try:
            yield read()
        except RuntimeError:
            yield None
    for owner in (torch.backends, matmul, cudnn, getattr(cudnn, "conv", None)):
        yield getattr(owner, "fp32_precision", None)


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

    def replay(self, inputs: Mapping[str, Tensor], *, ahead: Callable[[int], bool] = lambda iteration: False) -> Replay:
        """A run on other inputs of the same layout.

        Args:
            inputs: as those it was recorded with.
            ahead: tells of an iteration whether what comes next is launched before its change is looked at. That spares
                the device a pause, and costs the waves of one launch where the run then stops: it pays where a stop is
                unlikely.
        """
        return Replay(self, inputs, ahead)

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


class Replay:
    """One run of a recording.

    Attributes:
        core: the run as a core: of each wave it tells that it has been launched, and does not look at the answer.
        dropped_waves: launched ahead of a decision to stop.
    """

    def __init__(self, captured: Captured, inputs: Mapping[str, Tensor], ahead: Callable[[int], bool]) -> None:
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
