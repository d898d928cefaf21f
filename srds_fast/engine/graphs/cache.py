"""Recordings kept from call to call: found by what they depend on, and bounded."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import CaptureFailed
from .capturable import Capturable, NetworkCalls
from .compare import compare
from .device_lock import DeviceBusy, device_lock
from .devices import recorder
from .memory import TooLarge, recorded_within_memory
from .network_graphs import GraphedCalls, NetworkGraphs
from .recording import LoopGraph

T = TypeVar("T")

MOST_FAILURES = 64
# in one loop graph: at some hundred bytes and nanoseconds each, more takes longer to make than it saves
MOST_OPERATIONS = 50_000


@dataclass
class GraphStats:
    """What a compiled pipeline's graphs have done so far.

    Attributes:
        captured: recordings made. One is the loop graph of a plan at one shape, or all graphs of a network.
        replayed: calls that ran on a recording.
        evicted: recordings given up for others, the least recently used first.
        failed: recordings that could not be made.
        seconds: spent on recording.
        held: recordings there are now.
        nbytes: memory that the device had less after recording them, where that can be asked.
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
        max_graphs: recordings kept, the least recently used is given up first.
        stats: what was done.
    """

    max_graphs: int = 8
    stats: GraphStats = field(default_factory=GraphStats)

    def __post_init__(self) -> None:
        self._kept: OrderedDict[Hashable, LoopGraph | NetworkGraphs] = OrderedDict()
        self._failures: OrderedDict[Hashable, str] = OrderedDict()
        self._without_loop: OrderedDict[Hashable, str] = OrderedDict()
        self._declined: set[Hashable] = set()
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> LoopGraph | str | None:
        """The loop graph of a key, or why there can be no recording, or None."""
        with self._lock:
            if key in self._failures:
                return self._failures[key]
            captured = self._kept.get(key)
            if captured is not None:
                self._kept.move_to_end(key)
            assert not isinstance(captured, NetworkGraphs)
            return captured

    def count_replay(self) -> None:
        """A call has run on a recording."""
        with self._lock:
            self.stats.replayed += 1

    def capture(
        self, key: Hashable, call: Capturable, expected: Tensor, iterations: list[int], *, whole: bool = False
    ) -> None:
        """Record the loop graph of a call that has just run eagerly, and keep it if its replay gives the same.

        Args:
            key: of the call.
            call: what to record.
            expected: result of the eager run, [batch, ...].
            iterations: after how many each sample was done.
            whole: record all iterations that it could take, not just those it took.

        Raises:
            TooLarge: it would take too much memory or too long to make.
            CaptureFailed: it cannot be recorded, or a replay differs. It is not tried again.
        """
        started = time.perf_counter()
        before = call.key()
        try:
            captured = self._recorded(call, call.checkpoints if whole else 1 + max(iterations))
            compare(captured, call, expected, iterations)
        except (DeviceBusy, TooLarge):
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
        if call.key() != before:  # another call of this kind may do better
            raise CaptureFailed(
                "The recording is not kept: the network changed while it was made. What it holds may be of two "
                "networks. The next call of its kind is recorded anew."
            )
        self._keep(key, captured)

    def network_graphs(self, key: Hashable, calls: NetworkCalls) -> NetworkGraphs | str:
        """The graphs of some network calls, new ones if there are none; or why there can be none.

        Args:
            key: of the calls, `calls.key()`.
        """
        with self._lock:
            if key in self._failures:
                return self._failures[key]
            found = self._kept.get(key)
            if found is not None:
                assert isinstance(found, NetworkGraphs)
                self._kept.move_to_end(key)
                return found
        return NetworkGraphs(calls.networks, recorder(calls.device), calls.device, compiled=calls.compiled)

    def count_network_graphs(self, calls: GraphedCalls) -> None:
        """Calls were made through their graphs: keep these, or give them up."""
        with self._lock:
            self.stats.seconds += calls.seconds
            is_new = calls.key not in self._kept
        if calls.broken:
            assert calls.reason is not None
            self.give_up(calls.key, calls.reason)
        elif calls.declined:
            assert calls.reason is not None
            self.decline(calls.key, calls.reason)
        elif calls.changed:
            self.drop(calls.key)
        elif calls.recordings and is_new:
            self._keep(calls.key, calls.graphs)
        elif calls.recordings:
            with self._lock:
                self._count()

    def give_up(self, key: Hashable, reason: str) -> None:
        """Do not try again to record or replay what cannot be."""
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
        with self._lock:
            return key in self._declined

    def without_loop(self, key: Hashable, reason: str) -> None:
        """Calls like this one run on network graphs, for this reason."""
        with self._lock:
            _remember(self._without_loop, key, reason)

    def why_no_loop(self, key: Hashable) -> str | None:
        """Why calls like this one run on network graphs, or None."""
        with self._lock:
            return self._without_loop.get(key)

    def clear(self) -> None:
        """Give all recordings up, and forget what could not be recorded."""
        with self._lock:
            devices = {captured.device for captured in self._kept.values()}
            self._kept.clear()
            self._failures.clear()
            self._without_loop.clear()
            self._declined.clear()
            self._count()
        for device in devices:
            recorder(device).release()

    def _keep(self, key: Hashable, captured: LoopGraph | NetworkGraphs) -> None:
        # evict under the device lock: another call may still be replaying what is given up
        with device_lock(captured.device), self._lock:
            self._kept[key] = captured
            self.stats.captured += 1
            while len(self._kept) > self.max_graphs:
                self._kept.popitem(last=False)
                self.stats.evicted += 1
            self._count()

    def _not_again(self, key: Hashable, reason: str) -> None:
        if (oldest := _remember(self._failures, key, reason)) is not None:
            self._declined.discard(oldest)

    def _count(self) -> None:
        self.stats.held = len(self._kept)
        self.stats.nbytes = sum(captured.nbytes for captured in self._kept.values())

    def _recorded(self, call: Capturable, checkpoints: int) -> LoopGraph:
        """The loop graph of a call, with coarse rows on a stream of their own where that is wanted and faster."""
        if call.overlap == "batch":
            return _loop_graph(call, checkpoints)
        try:
            streams = _loop_graph(call, checkpoints, streams=True)
        except CaptureFailed as why:
            batch = _loop_graph(call, checkpoints)
            batch.reason = str(why)
            return batch
        if call.overlap == "streams":
            return streams
        try:
            batch = _loop_graph(call, checkpoints)
        except CaptureFailed:
            return streams
        return min((batch, streams), key=lambda captured: _seconds(captured, call))


def _loop_graph(call: Capturable, checkpoints: int, *, streams: bool = False) -> LoopGraph:
    def record() -> LoopGraph:
        captured = LoopGraph(call, recorder(call.device), MOST_OPERATIONS, streams=streams)
        captured.extend_to(checkpoints)
        return captured

    made, nbytes = recorded_within_memory(call.device, record, LoopGraph.name)
    made.nbytes = nbytes
    return made


def _remember(reasons: OrderedDict[Hashable, str], key: Hashable, reason: str) -> Hashable | None:
    """Note a reason; returns the key of the oldest one, if it was dropped for it."""
    reasons[key] = reason
    return reasons.popitem(last=False)[0] if len(reasons) > MOST_FAILURES else None


def _seconds(captured: LoopGraph, call: Capturable) -> float:
    """The shortest of some replays of everything that was recorded."""
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
