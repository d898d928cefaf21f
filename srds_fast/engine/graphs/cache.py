"""Recordings kept from call to call: found by what they depend on, made after a call that ran eagerly, bounded."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import CaptureFailed
from .capturable import Capturable
from .check import _compare
from .device_lock import Busy, turn
from .devices import recorder
from .recording import Captured, LoopGraph
from .wave_graphs import WaveGraphs

T = TypeVar("T")

# of the device's free memory: what is left is for the decoder, and for calls of other shapes
LARGEST_SHARE = 0.5
MOST_FAILURES = 64
# in one loop graph: at some hundred bytes and nanoseconds each, more takes longer to make than it saves
MOST_OPERATIONS = 50_000


@dataclass
class GraphStats:
    """What a compiled pipeline's graphs have done so far.

    Attributes:
        captured: recordings made; one is of a plan, at one shape.
        replayed: calls that ran on one.
        evicted: recordings given up for others, least recently used first.
        failed: recordings that could not be made.
        seconds: spent on recording.
        held: recordings there are now.
        nbytes: memory the device had less after recording them, where that can be asked.
    """

    captured: int = 0
    replayed: int = 0
    evicted: int = 0
    failed: int = 0
    seconds: float = 0.0
    held: int = 0
    nbytes: int = 0


@dataclass
class Graphs:
    """Recordings kept from call to call. May be used from several threads.

    Attributes:
        max_graphs: recordings kept, the least recently used goes first.
        stats: what was done.
    """

    max_graphs: int = 8
    stats: GraphStats = field(default_factory=GraphStats)

    def __post_init__(self) -> None:
        self._kept: OrderedDict[Hashable, Captured] = OrderedDict()
        self._failures: OrderedDict[Hashable, str] = OrderedDict()
        self._declined: set[Hashable] = set()
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Captured | str | None:
        """The recording for a key, or why there can be none, or None."""
        with self._lock:
            if key in self._failures:
                return self._failures[key]
            captured = self._kept.get(key)
            if captured is not None:
                self._kept.move_to_end(key)
            return captured

    def count_replay(self) -> None:
        """A call has run on a recording."""
        with self._lock:
            self.stats.replayed += 1

    def capture(
        self,
        key: Hashable,
        call: Capturable,
        expected: Tensor,
        iterations: list[int],
        *,
        kind: str = "graph",
        whole: bool = False,
    ) -> None:
        """Record a call that has just run eagerly, and keep the recording if its replay gives the same.

        Args:
            key: of the call.
            call: what to record.
            expected: result of the eager run, [batch, ...].
            iterations: after how many each sample was done.
            kind: "graph": a graph from each checkpoint to the next, where that can be had, otherwise one for each
                width of a wave; "wave-graphs": the second at once.
            whole: record all iterations that it could take, not just those it took.

        Raises:
            CaptureFailed: it cannot be recorded, takes too much memory, or a replay differs. It is not tried again.
        """
        started = time.perf_counter()
        before = call.key()
        try:
            captured = self._recorded(call, call.checkpoints if whole else 1 + max(iterations), kind)
            _compare(captured, call, expected, iterations)
        except Busy:
            raise
        except CaptureFailed as why:
            self.give_up(key, str(why))
            raise
        except torch.OutOfMemoryError as why:
            reason = (
                "The loop cannot be captured: the device has no memory left for it. It runs eagerly. "
                "Lower max_graphs or max_rows."
            )
            self.give_up(key, reason)
            raise CaptureFailed(reason) from why
        finally:
            self.stats.seconds += time.perf_counter() - started
        if call.key() != before:  # not the fault of this kind of call
            raise CaptureFailed(
                "The recording is not kept: the network changed while it was made. What it holds may be of two "
                "networks. The next call of its kind is recorded anew."
            )
        # what is given up may have been launched by another call, ahead of its end
        with turn(call.device), self._lock:
            self._kept[key] = captured
            self.stats.captured += 1
            while len(self._kept) > self.max_graphs:
                self._kept.popitem(last=False)
                self.stats.evicted += 1
            self._count()

    def give_up(self, key: Hashable, reason: str) -> None:
        """Do not try again to record, or to replay, what cannot be."""
        with self._lock:
            self.stats.failed += 1
            self._kept.pop(key, None)
            self._count()
            self._not_again(key, reason)

    def drop(self, key: Hashable) -> None:
        """Give a recording up."""
        with self._lock:
            self._kept.pop(key, None)
            self._count()

    def decline(self, key: Hashable, reason: str) -> None:
        """Do not record what is not worth it."""
        with self._lock:
            self._declined.add(key)
            self._not_again(key, reason)

    def declined(self, key: Hashable) -> bool:
        """Whether it was not worth recording."""
        return key in self._declined

    def _not_again(self, key: Hashable, reason: str) -> None:
        self._failures[key] = reason
        while len(self._failures) > MOST_FAILURES:
            oldest, _ = self._failures.popitem(last=False)
            self._declined.discard(oldest)

    def clear(self) -> None:
        """Give all recordings up, and forget what could not be recorded."""
        devices = {captured.device for captured in self._kept.values()}
        with self._lock:
            self._kept.clear()
            self._failures.clear()
            self._declined.clear()
            self._count()
        for device in devices:
            recorder(device).release()

    def _count(self) -> None:
        self.stats.held = len(self._kept)
        self.stats.nbytes = sum(captured.nbytes for captured in self._kept.values())

    def _recorded(self, call: Capturable, checkpoints: int, kind: str) -> Captured:
        """A recording, of the fastest kind that can be had."""
        where = recorder(call.device)
        kinds: dict[str, Callable[[], Captured]] = {
            "beside": lambda: LoopGraph(call, where, MOST_OPERATIONS, beside=True),
            "loop graph": lambda: LoopGraph(call, where, MOST_OPERATIONS),
            "wave graphs": lambda: WaveGraphs(call, where),
        }
        if kind == "wave-graphs":
            del kinds["loop graph"]
        if kind == "wave-graphs" or call.overlap == "batch":
            del kinds["beside"]
        reasons: list[str] = []
        for make in kinds.values():
            try:
                captured = self._within_memory(call, checkpoints, make)
            except CaptureFailed as why:
                reasons.append(str(why))
            else:
                captured.reason = reasons[0] if reasons else None
                if captured.overlap == "streams" and call.overlap == "auto":
                    return self._faster_of(captured, call, checkpoints, kinds["loop graph"])
                return captured
        raise CaptureFailed(reasons[-1])

    def _faster_of(
        self, beside: Captured, call: Capturable, checkpoints: int, make: Callable[[], Captured]
    ) -> Captured:
        try:
            batch = self._within_memory(call, checkpoints, make)
        except CaptureFailed:
            return beside
        return min((batch, beside), key=lambda captured: _seconds(captured, call))

    def _within_memory(self, call: Capturable, checkpoints: int, make: Callable[[], Captured]) -> Captured:
        free = _free_memory(call.device)
        captured = make()
        captured.extend_to(checkpoints)
        if free is None:
            return captured
        taken = max(0, free - (_free_memory(call.device) or 0))
        if taken > LARGEST_SHARE * free:
            raise CaptureFailed(
                f"The {captured.name} would take {taken / 2**30:.1f} of {free / 2**30:.1f} GiB that are free. Room "
                "must be left to decode. Lower max_rows or max_graphs."
            )
        captured.nbytes = taken
        return captured


def _seconds(captured: Captured, call: Capturable) -> float:
    """The shortest of some replays of all that was recorded."""
    seconds = []
    for _ in range(3):
        _wait(call.device)
        started = time.perf_counter()
        captured.run_through(call.inputs)
        _wait(call.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    # what the allocator has kept from the eager run, a capture gives back as well
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free
