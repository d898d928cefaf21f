"""How one call uses graphs: replay a recording, or run eagerly and record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import telemetry
from ...errors import CaptureFailed
from ...solvers.contract import Evaluate
from ...solvers.program import LongProgram
from .. import cancellation
from ..run import EngineUse, Run
from .cache import Graphs, NoLoop
from .capturable import Capturable, NetworkCalls
from .capture_checks import failed
from .device_lock import DeviceBusy
from .loop_graph import LoopGraph, replay
from .network_graphs import CHANGED, NOT_WHILE_SERVING, GraphedCalls, NetworkGraphs
from .recorder import TooLarge
from .utilisation import why_not_worth

FIRST = "this is the first call of its kind, which was recorded for later calls"
NOTHING = "this rank recorded nothing: the others had all rows, or what the network returned was not finite"
MADE_AS_IT_RUNS = "its program is so long that its waves are made while it runs"
Eager = Callable[[Evaluate], Tensor]
Advance = Callable[[Run, Eager], None]
"""(run, evaluator) -> None: takes a run from wave to wave to its end."""


@dataclass(frozen=True)
class GraphRunner:
    """How a call may use graphs."""

    graphs: Graphs
    lazy: bool  # record calls of a kind that is new
    refused: Callable[[str], None]  # notified why a call runs eagerly; may raise
    whole: bool = False  # record all iterations and all widths that a call could take
    weighed: bool = False  # record only where launches take a good part of the time
    kind: str = "graph"  # a loop graph, or network graphs where there can be none; "network-graphs": these at once
    no_loop: str | None = None  # why none of these calls can have a loop graph

    def run(self, call: Capturable, begin: Callable[[], Run], evaluate: Eager, advance: Advance) -> None:
        """Run a call on its recording if there is one, otherwise eagerly, and record it then.

        begin: makes the run; called again where a recording fails on the way and the run starts anew.
        """
        key: Hashable = None
        found: LoopGraph | NetworkGraphs | NoLoop | None
        if (reason := call.calls.why_not()) is not None:
            found = NoLoop("failed", reason)
        elif self.kind == "network-graphs":
            found = NoLoop("network graphs", None)
        elif self.no_loop is not None:
            found = NoLoop("network graphs", self.no_loop)
        else:
            key = call.key()
            found = self.graphs.find(key)
        if isinstance(found, LoopGraph):
            try:
                return self._replay(found, call, begin(), advance)
            except CaptureFailed as why:  # the device is busy, or the run has to go further than can be recorded
                if not isinstance(why, DeviceBusy):
                    self.graphs.remember(key, "failed", str(why))
                found = NoLoop("failed", str(why))
            except BaseException:
                if found.broken:  # by an interrupt: the next call records anew
                    self.graphs.drop(key)
                raise
        run = begin()
        if not isinstance(found, NoLoop):
            advance(run, evaluate)
            run.engine.reason = self._record(key, call, run, evaluate)
            return None
        if found.what == "network graphs":
            graphed = self.network_calls(call.calls, weigh=self.no_loop is not None)
            if isinstance(graphed, GraphedCalls):
                return self._run_on_network_graphs(graphed, call, found.reason, run, advance)
            found = NoLoop("failed", graphed)
        advance(run, evaluate)
        if found.what == "failed" and found.reason is not None:
            self.refused(found.reason)
        run.engine.reason = found.reason
        return None

    def network_calls(self, calls: NetworkCalls, *, weigh: bool = False) -> GraphedCalls | str:
        """Graphs for the network calls of one run, or why there can be none. `finish` ends the run.

        weigh: before the first recording, see whether graphs can save time, unless they were asked for by name.
        """
        if (reason := calls.why_not()) is not None:
            return reason
        found = self.graphs.find(calls.key())
        if isinstance(found, NoLoop):
            assert found.reason is not None
            return found.reason
        graphs = found if isinstance(found, NetworkGraphs) else NetworkGraphs(calls)
        return GraphedCalls(graphs, calls.key, records=self.lazy, weigh=weigh and self.weighed)

    def finish(self, graphed: GraphedCalls, engine: EngineUse) -> None:
        """Keep the graphs that a run has recorded, and complete what is noted of its engine."""
        engine.capture_seconds += graphed.seconds
        if graphed.replays:
            self.graphs.count_replay()
        else:
            engine.name = "eager"
        if graphed.reason is not None or not graphed.replays:
            engine.reason = graphed.reason or (FIRST if graphed.recordings or self.no_loop is None else NOTHING)
        self.graphs.keep_network_graphs(graphed)

    def _replay(self, captured: LoopGraph, call: Capturable, run: Run, advance: Advance) -> None:
        if self.whole:
            captured.extend_to(call.checkpoints)
        run.engine.name, run.engine.reason = captured.name, captured.reason
        run.engine.overlap = captured.overlap
        core = replay(captured, call.inputs, run.engine, run.may_launch_ahead)
        run.follow(core)
        try:
            advance(run, lambda wave: wave.x)  # the graph has run it
        finally:
            core.close()  # it holds the device, also if something raised between waves
        self.graphs.count_replay()

    def _run_on_network_graphs(
        self, graphed: GraphedCalls, call: Capturable, no_loop: str | None, run: Run, advance: Advance
    ) -> None:
        """Run a call eagerly but for its network, whose calls replay graphs; those of new widths are recorded."""
        run.engine.name, run.engine.reason, run.engine.overlap = NetworkGraphs.name, no_loop, "batch"
        through = call.through(graphed.through)
        try:
            advance(run, through)
            if self.whole:
                _run_every_width(call, through)
        finally:
            self.finish(graphed, run.engine)
        if graphed.reason is not None:
            self.refused(graphed.reason)

    def _record(self, key: Hashable, call: Capturable, run: Run, evaluate: Eager) -> str:
        """Record a call that has run eagerly, for later ones. Returns why it has not been a replay itself."""
        reason: str | None
        telemetry.phase("record")
        if not self.lazy:
            reason = NOT_WHILE_SERVING
        elif call.key() != key:
            reason = CHANGED
        else:
            started = time.perf_counter()
            try:
                if self.weighed:
                    width, _ = Counter(call.program.all_widths).most_common(1)[0]
                    wave = call.wave_of_zeros(width)
                    reason = why_not_worth(lambda: evaluate(wave), call.calls.device)
                    if reason is not None:
                        self.graphs.remember(key, "declined", reason)
                        return reason
                why = MADE_AS_IT_RUNS if isinstance(call.program, LongProgram) else call.why_no_loop
                if why is not None:
                    raise TooLarge(why)
                assert run.sample is not None
                reason = self.graphs.capture(key, call, run.sample, run.iterations, whole=self.whole)
            except TooLarge as why:
                self.graphs.remember(key, "network graphs", str(why))
                reason = self._record_network(call)
            except Exception as why:  # the call is done: it must not fail for what would help later ones
                reason = str(failed(why))
                if not isinstance(why, DeviceBusy):
                    self.graphs.remember(key, "failed", reason)
            finally:
                run.engine.capture_seconds = time.perf_counter() - started
        if reason is not None:
            self.refused(reason)
        return reason or FIRST

    def _record_network(self, call: Capturable) -> str | None:
        """Record the network graphs of a call that has no loop graph; returns why that failed, or None."""
        graphed = self.network_calls(call.calls)
        if isinstance(graphed, str):
            return graphed
        with suppress(torch.OutOfMemoryError):  # this call was narrower; a wider one meets that itself
            _run_every_width(call, call.through(graphed.through))
        self.graphs.keep_network_graphs(graphed)
        return graphed.reason


def _run_every_width(call: Capturable, evaluate: Eager) -> None:
    for width in call.widths:
        cancellation.wave(width)
        evaluate(call.wave_of_zeros(width))
