"""How one call uses graphs: replay, or run eagerly and record."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from ... import telemetry
from ...errors import CaptureFailed
from ...solvers.contract import Evaluate
from ..run import Run
from .cache import Graphs, T
from .capturable import Capturable
from .capture_checks import failed
from .device_lock import Busy, replays_here
from .recording import Captured
from .replay import Replay
from .utilisation import busy_share, why_not_worth


@dataclass(frozen=True)
class GraphUse:
    """How a call may use graphs.

    Attributes:
        graphs: recordings there are.
        lazy: record what has not been seen.
        refused: told why a call runs eagerly; may raise.
        whole: record all iterations that a call could take.
        weighed: record only where launches take a good part of the time.
        kind: of graphs, see `Graphs.capture`.
    """

    graphs: Graphs
    lazy: bool
    refused: Callable[[str], None]
    whole: bool = False
    weighed: bool = False
    kind: str = "graph"

    def run(
        self,
        call: Capturable,
        begin: Callable[[], Run],
        evaluate: Callable[[Evaluate], Tensor],
        advance: Callable[[Run, Callable[[Evaluate], Tensor]], T],
    ) -> T:
        """Run a call on its recording if there is one, otherwise eagerly, and record it then.

        Args:
            call: what would be recorded.
            begin: makes the run; made again, from its start, where a recording fails on the way.
            evaluate: runs a wave eagerly.
            advance: takes a run from wave to wave to its end, with what runs the waves.

        Returns:
            what `advance` returned.
        """
        reason = call.why_not()
        if replays_here(call.device):
            reason = "it is made in the middle of another call, whose replay has the device"
        key = None if reason is not None else self._key(call)
        found = reason if key is None else self.graphs.find(key)
        run = begin()
        if isinstance(found, Captured):
            try:
                return self._replay(found, call, run, advance)
            except Busy as why:
                found = str(why)
                run = begin()
            except CaptureFailed as why:  # it has to go further than it was recorded, and cannot
                found = str(why)
                self.graphs.give_up(key, found)
                run = begin()
            except BaseException:
                if isinstance(found, Captured) and found.broken:  # by an interrupt: the next call records anew
                    self.graphs.drop(key)
                raise
        done = advance(run, evaluate)
        if found is not None:
            if key is None or not self.graphs.declined(key):
                self.refused(found)
            run.report.engine_reason = found
        elif not run.report.interrupted:
            run.report.engine_reason = self._record(key, call, run, evaluate)
        return done

    def _key(self, call: Capturable) -> Hashable:
        return self.kind, call.key()

    def _replay(
        self,
        captured: Captured,
        call: Capturable,
        run: Run,
        advance: Callable[[Run, Callable[[Evaluate], Tensor]], T],
    ) -> T:
        if self.whole:
            captured.extend_to(call.checkpoints)
        replay = Replay(captured, call.inputs, run.hardly_stops_at)
        run.follow(replay.core)
        run.report.engine, run.report.engine_reason = captured.name, captured.reason
        run.report.overlap = captured.overlap
        try:
            done = advance(run, lambda wave: wave.x)  # the graph has run it
        finally:
            replay.core.close()  # whatever happened between waves: it holds the device
            run.report.dropped_waves = replay.dropped_waves
        self.graphs.count_replay()
        return done

    def _record(self, key: Hashable, call: Capturable, run: Run, evaluate: Callable[[Evaluate], Tensor]) -> str:
        """Record a call that has run eagerly, for those to come. Returns why it has not been a replay itself."""
        reason = None
        telemetry.phase("record")
        if not self.lazy:
            reason = "nothing is recorded while serving (lazy_capture=False): make a call like it in warmup()"
        elif self._key(call) != key:
            reason = "the network's own attributes have changed while it ran: a replay would not change them"
        if reason is not None:
            self.refused(reason)
            return reason
        assert run.sample is not None
        started = time.perf_counter()
        try:
            if self.weighed and (reason := why_not_worth(busy_share(call, evaluate))) is not None:
                self.graphs.decline(key, reason)
                return reason
            self.graphs.capture(
                key, call, run.sample, run.report.iterations_per_sample, kind=self.kind, whole=self.whole
            )
        except CaptureFailed as why:
            reason = str(why)
        except Exception as why:  # the call itself is done: it does not fail for what would help later ones
            reason = str(failed(why))
            self.graphs.give_up(key, reason)
        finally:
            run.report.capture_seconds = time.perf_counter() - started
        if reason is not None:
            self.refused(reason)
            return reason
        return "it is the first call of its kind: recorded for those to come"
