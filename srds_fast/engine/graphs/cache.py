"""Recordings kept from call to call: found by what they depend on, and bounded."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ...caches import Cache
from ...errors import CaptureFailed
from ...solvers.checks import check_whole
from ...words import counted
from ..run import EngineUse
from .capturable import Capturable
from .device_lock import DeviceBusy, device_lock
from .loop_graph import LoopGraph, compare, replay
from .network_graphs import GraphedCalls, NetworkGraphs
from .recorder import recorder, within_memory

logger = logging.getLogger("srds_fast")

MOST_REASONS = 128
# in one loop graph: at some hundred bytes and nanoseconds each, more takes longer to make than it saves
MOST_OPERATIONS = 50_000


@dataclass
class GraphStats:
    """What a compiled pipeline's graphs have done so far."""

    captured: int = 0  # recordings made: one is the loop graph of a plan at one shape, or all graphs of a network
    replayed: int = 0  # calls that ran on a recording
    evicted: int = 0  # recordings given up for others, the least recently used first
    failed: int = 0  # recordings that could not be made
    seconds: float = 0.0  # spent on recording
    held: int = 0  # recordings there are now
    nbytes: int = 0  # memory that the device had less after recording them, where that can be asked


class NoLoop(NamedTuple):
    """Why calls of a kind have no loop graph."""

    what: str  # "failed": cannot be recorded; "declined": is not worth recording; "network graphs": runs on these
    reason: str | None  # None where nobody asked for one


@dataclass
class Graphs:
    """At most `max_graphs` recordings kept from call to call. May be used from several threads.

    Raises InvalidArgument if `max_graphs` is no whole number, 1 or more.
    """

    max_graphs: int = 8
    stats: GraphStats = field(default_factory=GraphStats)

    def __post_init__(self) -> None:
        check_whole("max_graphs", self.max_graphs, 1)
        self._kept: OrderedDict[Hashable, LoopGraph | NetworkGraphs] = OrderedDict()
        self._reasons: Cache[NoLoop] = Cache("why there are no graphs", MOST_REASONS)
        self._lock = threading.RLock()

    def find(self, key: Hashable) -> LoopGraph | NetworkGraphs | NoLoop | None:
        """The recording of a key, or why there is no loop graph, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            return self._reasons.get(key)

    def count_replay(self) -> None:
        with self._lock:
            self.stats.replayed += 1

    def capture(
        self, key: Hashable, call: Capturable, expected: Tensor, iterations: list[int], *, whole: bool = False
    ) -> str | None:
        """Record the loop graph of a call that has just run eagerly, and keep it if its replay gives the same.

        Returns why it is not kept, though a later call may be recorded, or None. expected, iterations: see `compare`.
        whole: record all iterations that it could take, not just those it took.
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
                "The recording was dropped: the network changed while it was made. It may hold parts of two "
                "networks. The next call of this kind is recorded again."
            )
        self._keep(key, captured)
        return None

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
        with self._lock:
            given_up = self._kept.pop(key, None)
            self._count()
        if given_up is not None:
            logger.info("Dropped a recording (%s): it cannot be used any more.", given_up.name)

    def remember(self, key: Hashable, what: str, reason: str | None) -> None:
        """From now on calls with this key are not recorded, or not as a loop; see `NoLoop`."""
        with self._lock:
            if what == "failed":
                self.stats.failed += 1
                self.drop(key)
            self._reasons[key] = NoLoop(what, reason)

    def clear(self) -> None:
        """Give all recordings up, and forget what could not be recorded."""
        with self._lock:
            if self._kept:
                logger.info("Dropped all %s.", counted(len(self._kept), "recording"))
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
                _, given_up = self._kept.popitem(last=False)
                self.stats.evicted += 1
                logger.info("Dropped a recording (%s): max_graphs=%d are kept.", given_up.name, self.max_graphs)
            self._count()
            logger.info("Made a recording (%s) for later calls; %d kept.", captured.name, self.stats.held)
            logger.debug("Recordings hold %.1f MiB.", self.stats.nbytes / 2**20)

    def _count(self) -> None:
        self.stats.held = len(self._kept)
        self.stats.nbytes = sum(captured.nbytes for captured in self._kept.values())


def _recorded(call: Capturable, checkpoints: int) -> LoopGraph:
    """The loop graph of a call, with coarse rows on a stream of their own where that is wanted and faster."""

    def make(streams: bool) -> LoopGraph:
        captured = LoopGraph(call, recorder(call.calls.device), MOST_OPERATIONS, streams=streams)
        captured.extend_to(checkpoints)
        return captured

    def record(*, streams: bool) -> LoopGraph:
        captured, nbytes = within_memory(call.calls.device, LoopGraph.name, lambda: make(streams))
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

    timer = Timer("list(run())", globals={"run": lambda: replay(captured, call.inputs, EngineUse())})
    return min(timer.timeit(1).mean for _ in range(3))
