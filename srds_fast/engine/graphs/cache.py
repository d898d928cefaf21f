"""Recordings kept from call to call: found by what they depend on, and bounded."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ...errors import CaptureFailed
from ..run import EngineUse
from .capturable import Capturable, NetworkCalls
from .device_lock import DeviceBusy, device_lock
from .loop_graph import LoopGraph, compare, replay
from .network_graphs import GraphedCalls, NetworkGraphs
from .recorder import recorder, within_memory

MOST_REASONS = 128
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


class NoLoop(NamedTuple):
    """Why calls of a kind have no loop graph.

    Attributes:
        what: "failed": it cannot be recorded; "declined": it is not worth recording; "network graphs": it runs on
            these instead.
        reason: None where nobody asked for a loop graph.
    """

    what: str
    reason: str | None


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
        self._reasons: OrderedDict[Hashable, NoLoop] = OrderedDict()
        self._lock = threading.RLock()

    def find(self, key: Hashable) -> LoopGraph | NetworkGraphs | NoLoop | None:
        """The recording of a key, or why there is no loop graph, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            return self._reasons.get(key)

    def count_replay(self) -> None:
        """A call has run on a recording."""
        with self._lock:
            self.stats.replayed += 1

    def capture(
        self, key: Hashable, call: Capturable, expected: Tensor, iterations: list[int], *, whole: bool = False
    ) -> str | None:
        """Record the loop graph of a call that has just run eagerly, and keep it if its replay gives the same.

        Args:
            expected, iterations: see `compare`.
            whole: record all iterations that it could take, not just those it took.

        Returns:
            why the recording is not kept, though a later call may be recorded; None: it is kept.

        Raises:
            CaptureFailed: it cannot be recorded, or a replay differs; TooLarge: network graphs may do.
        """
        started = time.perf_counter()
        before = call.key()
        try:
            captured = _recorded(call, call.checkpoints if whole else 1 + max(iterations))
            compare(captured, call, expected, iterations)
        finally:
            self.stats.seconds += time.perf_counter() - started
        if call.key() != before:
            return (
                "The recording is not kept: the network changed while it was made. What it holds may be of two "
                "networks. The next call of its kind is recorded anew."
            )
        self._keep(key, captured)
        return None

    def network_graphs(self, key: Hashable, calls: NetworkCalls) -> NetworkGraphs | str:
        """The graphs of network calls with this key, new ones if there are none; or why there can be none."""
        found = self.find(key)
        if isinstance(found, NoLoop):
            assert found.reason is not None
            return found.reason
        return found if isinstance(found, NetworkGraphs) else NetworkGraphs(calls)

    def keep_network_graphs(self, calls: GraphedCalls) -> None:
        """A run has made its calls through these graphs: keep them, or give them up."""
        with self._lock:
            self.stats.seconds += calls.seconds
            self._count()
            is_new = calls.key not in self._kept
        if calls.ended in ("failed", "declined"):
            self.remember(calls.key, calls.ended, calls.reason)
        elif calls.ended == "changed":
            self.drop(calls.key)
        elif calls.recordings and is_new:
            with suppress(DeviceBusy):  # the run is done: another one records these graphs
                self._keep(calls.key, calls.graphs)

    def drop(self, key: Hashable) -> None:
        """Give a recording up."""
        with self._lock:
            self._kept.pop(key, None)
            self._count()

    def remember(self, key: Hashable, what: str, reason: str | None) -> None:
        """From now on calls with this key are not recorded, or not as a loop; see `NoLoop`."""
        with self._lock:
            if what == "failed":
                self.stats.failed += 1
                self.drop(key)
            self._reasons[key] = NoLoop(what, reason)
            if len(self._reasons) > MOST_REASONS:
                self._reasons.popitem(last=False)

    def clear(self) -> None:
        """Give all recordings up, and forget what could not be recorded."""
        with self._lock:
            devices = {captured.device for captured in self._kept.values()}
            self._kept.clear()
            self._reasons.clear()
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

    def _count(self) -> None:
        self.stats.held = len(self._kept)
        self.stats.nbytes = sum(captured.nbytes for captured in self._kept.values())


def _recorded(call: Capturable, checkpoints: int) -> LoopGraph:
    """The loop graph of a call, with coarse rows on a stream of their own where that is wanted and faster."""

    def record(*, streams: bool) -> LoopGraph:
        def make() -> LoopGraph:
            captured = LoopGraph(call, recorder(call.calls.device), MOST_OPERATIONS, streams=streams)
            captured.extend_to(checkpoints)
            return captured

        captured, nbytes = within_memory(call.calls.device, LoopGraph.name, make)
        captured.nbytes = nbytes
        return captured

    if call.overlap == "batch":
        return record(streams=False)
    try:
        separate = record(streams=True)
    except CaptureFailed as why:
        batch = record(streams=False)
        batch.reason = str(why)
        return batch
    if call.overlap == "streams":
        return separate
    try:
        batch = record(streams=False)
    except CaptureFailed:
        return separate
    return min((batch, separate), key=lambda captured: _seconds(captured, call))


def _seconds(captured: LoopGraph, call: Capturable) -> float:
    """The shortest of some replays of everything that was recorded."""
    from torch.utils.benchmark import Timer

    def run() -> None:
        for _ in replay(captured, call.inputs, EngineUse()):
            pass

    timer = Timer("run()", globals={"run": run})
    return min(timer.timeit(1).mean for _ in range(3))
