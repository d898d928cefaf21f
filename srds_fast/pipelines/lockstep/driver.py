"""The script of a call whose loop makes turns for the rows of waves: rehearsal, waves, and what follows a callback."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.costs import price
from ...errors import UnsupportedPipeline
from ...planner.search import Pricing
from ...sampling.session import Session, no_room
from ...schedulers.reader import state_key
from ...schedulers.table import NoiseTable
from ...solvers.contract import Evaluate, SolverInputs
from ..merging.calls import MergedCalls
from ..network_checks import Undo
from ..takeover.inferred import Inference, Inferred
from ..takeover.network import RecordedNetwork
from ..takeover.verify import differs
from .call_session import CallSession, refuse_other_shapes
from .digests import hooks_of
from .memory import LoopMemory
from .placeholders import Placeholders
from .proxies import SchedulerProxy
from .rehearsal import Facts, Passes, Rehearsal, StateChanged, kinds_of
from .rows import RowTurns
from .taken_over import TakenOver
from .turn_costs import CallsOfTurns, with_turns
from .turns import LoopTurns, Ran, Script, Turn


class Driver:
    """Writes the script. It is made before the loop's first turn, when no network has been called.

    networks: those that the loop calls. generators: all that it may draw from. kind: everything it depends on beyond
    its scheduler; None: remember nothing. ready: called when the first wave comes. waves: runs those of a call that is
    taken over; None: the loop must make its own turns. placeholders: the answers in turns of a rehearsal.
    """

    def __init__(
        self,
        samples: CallSession,
        scheduler: SchedulerProxy,
        turns: LoopTurns,
        merged: MergedCalls,
        memory: LoopMemory,
        networks: Sequence[nn.Module],
        generators: list[torch.Generator],
        kind: Hashable | None,
        ready: Callable[[Session], None],
        waves: TakenOver | None,
        placeholders: Placeholders,
    ) -> None:
        self._samples, self._scheduler, self._turns, self._merged = samples, scheduler, turns, merged
        self._memory, self._networks, self._generators = memory, networks, generators
        self._ready, self._taken_over, self._placeholders = ready, waves, placeholders
        steps = len(samples.timesteps)
        self._key = None if kind is None else (kind, state_key(scheduler.inner), samples.start, steps)
        self._known = None if self._key is None else memory.facts.get(self._key)
        changed = () if isinstance(self._known, Facts) else networks  # what may call networks of an unknown kind
        self._before = Undo(changed)
        self._hooks: dict[Any, Hashable] = {network: hooks_of(network) for network in changed}
        self.seconds = 0.0  # that it took to find out how the loop works
        self.verifying_calls = 0  # that compared a takeover with turns of the loop
        self.reason: str | None = None  # why the loop makes its own turns, where its turns showed it
        self.x0: Tensor  # predicted in the only step
        self._passes: Passes
        self._rehearsal: Rehearsal
        self._facts: Facts
        self._rows: RowTurns

    @property
    def will_take_over(self) -> bool:
        """Whether the first turn is only to show its network calls."""
        return self._may_take_over and isinstance(self._known, Facts) and not isinstance(self._known.takeover, str)

    @property
    def _may_take_over(self) -> bool:
        return self._taken_over is not None and self._key is not None and len(self._samples.timesteps) > 1

    def restore_networks(self) -> None:
        """Give the networks back what they held before the loop: the stock loop follows."""
        self._before.restore()

    def script(self, first: Ran, options: dict[str, Any], dtype: torch.dtype | None) -> Script:
        """The turns of a call after its first one.

        options: of the scheduler's step. dtype: of the network's output, where the first turn was answered with probes;
        None: its output is real.
        """
        samples, scheduler, steps = self._samples, self._scheduler, len(self._samples.timesteps)
        x, m = first.x.clone(), first.m.to(dtype or first.m.dtype, copy=True)
        refuse_other_shapes(m, x)
        undo = Undo(() if isinstance(self._known, Facts) else self._networks)
        table, generator = scheduler.table(options), options.get("generator")
        scheduler.keep_snapshots(samples.timesteps, options, x, m)
        self._passes, self.x0 = Passes(steps), x
        if samples.settings.plan_only:
            samples.make(*samples.begin(table, generator, m, x, len(x)))
            samples.stop(samples.state)
            return x
        self._rehearsal = Rehearsal(self._turns, self._passes, x, self._generators)
        with self._timed():
            yield from self._rehearse(table.part(samples.start, samples.start + steps))
        noise, inputs = samples.begin(table, generator, m, x, len(x))
        if (network := (yield from self._inferred(first, m, noise, inputs))) is not None:
            undo.restore()
            self._exclude_own_time()
            assert self._taken_over is not None
            self._taken_over.run(network, x.dtype)
            return (yield from self._last_turn())
        if dtype is not None or not first.turn.live:
            m = (yield from self._passes.turn(Turn(0, x, live=True))).m.clone()
        if steps == 1:
            self.x0 = samples.x0(m)
        self._rows = RowTurns(self._turns, self._passes, self._rehearsal, self._facts, self._merged, self._memory)
        self._rows.remember(x, m)
        planner = samples.settings.planner
        plan, _ = planner.choose(steps, noise.spread is not None)
        measured = planner.measures and self._key is not None and steps > 1
        if measured or not plan.is_sequential:
            with self._timed():
                yield from self._look_at_networks(x, measured or plan.program().peak_rows > 1)
        undo.restore()
        self._exclude_own_time()
        pricing = (yield from self._price(noise, inputs, m)) if measured else None
        session = samples.make(noise, inputs, pricing=pricing)
        if (alone := self._rows.why_alone()) and planner.options is None:
            session.take_steps(f"rows of the network would be called one by one: {alone[0]}", tell=False)
        self._ready(session)
        return (yield from self._waves(session))

    def rest(self) -> Script:
        """The turns after a change by a callback, of a session that goes on from it.

        The state departs as it is: the loop has done all that it does after its step.
        """
        samples = self._samples
        session = samples.session
        assert session is not None
        samples.wave = session.next(None)
        assert samples.wave is not None
        self._passes.last = samples.offset
        m = (yield Turn(samples.offset, samples.wave.x[0], live=True)).m.clone()
        if self._facts.replaces:  # the callback may have changed the mask
            samples.arrivals = self._passes.arrivals = yield from self._rehearsal.arrivals()
        session.run.received()
        if samples.was_interrupted() or (wave := session.next(m[None])) is None:
            return (yield from self._last_turn())
        return (yield from self._waves(session, wave))

    def _exclude_own_time(self) -> None:
        if self._samples.started is not None:
            self._samples.started += self.seconds

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def _inferred(
        self, first: Ran, m: Tensor, noise: NoiseTable, inputs: SolverInputs
    ) -> Generator[Turn, Ran, RecordedNetwork | None]:
        """The network calls of the first turn, to be repeated for rows; None if the loop makes its own turns."""
        facts = self._facts
        if not self._may_take_over:
            return None
        if isinstance(facts.takeover, str) or facts.copies:
            self.reason = facts.takeover if isinstance(facts.takeover, str) else "it writes into its own tensors"
            return None
        assert self._taken_over is not None
        network = self._taken_over.network(facts.takeover.turn(first), noise, inputs, len(first.x))
        if not first.turn.live:
            with self._timed():
                yield from self._compare(facts.takeover, first, noise)
        if not facts.verified:
            with self._timed():
                differ = yield from differs(network, self._passes, first, m)
            self.verifying_calls = 2 * len(first.calls)
            if differ:
                self.reason = facts.takeover = "its network calls, repeated for rows, give something else"
                return None
            facts.verified = True
        return network

    def _compare(self, known: Inferred, first: Ran, noise: NoiseTable) -> Generator[Turn, Ran, None]:
        """Compare three turns of this call with what another call of its kind has shown.

        The kind does not tell what tensors hold: a mask may be empty in one call only.
        """
        inference = Inference(noise.numbers["input_scale"], self._placeholders)
        inference.look(first)
        try:
            for step in {1, noise.num_steps - 1}:
                inference.look((yield from self._passes.checked(Turn(step, self._rehearsal.probe(step)))))
            if not inference.agrees_with(known):
                raise StateChanged("The loop of this call does something else than in an earlier call of its kind.")
        except StateChanged:
            self._memory.facts.pop(self._key, None)
            raise

    def _price(self, noise: NoiseTable, inputs: SolverInputs, m: Tensor) -> Generator[Turn, Ran, Pricing]:
        """The costs of this call, of which turns make the rows."""
        samples, turns = self._samples, list[Ran]()
        for step in (0, noise.num_steps - 1):
            ran = yield from self._passes.turn(Turn(step, samples.state.to(m.dtype)))
            turns += [ran] if not turns or kinds_of(ran) == kinds_of(turns[0]) else []
        calls = CallsOfTurns([each.calls for each in turns], self._merged)
        planner = samples.settings.planner
        pricing = price(
            planner.costs,
            ("turns", self._key),
            lambda program: calls,
            samples.state,
            noise,
            inputs,
            m.dtype,
            networks=self._networks,
            max_rows=planner.max_rows,
            replayed=False,
        )
        levels = max((1 + max(map(len, needs), default=0) for needs in self._facts.needs.values()), default=1)
        return with_turns(pricing, self._rehearsal.seconds / max(self._rehearsal.made, 1), levels + 1)

    def _rehearse(self, noise: NoiseTable) -> Generator[Turn, Ran, None]:
        """Find out what the turns of the loop depend on, or remember it."""
        known, key = self._known, self._key
        if isinstance(known, str):
            raise UnsupportedPipeline(known)
        try:
            if known is None:
                inference = Inference(noise.numbers["input_scale"], self._placeholders)
                known, self._samples.arrivals = yield from self._rehearsal.run(self._hooks, inference)
                if key is not None:
                    self._memory.facts[key] = known
            else:
                self._turns.copies = known.copies
                if known.replaces:
                    self._samples.arrivals = yield from self._rehearsal.arrivals()
        except UnsupportedPipeline as why:
            if key is not None:
                self._memory.facts[key] = str(why)
            raise
        self._facts, self._passes.arrivals = known, self._samples.arrivals

    def _look_at_networks(self, x: Tensor, merge: bool) -> Generator[Turn, Ran, None]:
        try:
            yield from self._rows.look_at_networks(x, merge)
        except torch.OutOfMemoryError:
            raise UnsupportedPipeline(f"{no_room(2)}.") from None

    def _waves(self, session: Session, wave: Evaluate | None = None) -> Script:
        """Run all waves, from this one or from the first; return the samples."""
        samples = self._samples
        samples.wave = session.next(None) if wave is None else wave
        while (wave := samples.wave) is not None:
            try:
                m = yield from self._rows.evaluate(wave.x, [samples.offset + position for position in wave.positions])
            except StateChanged:
                self._memory.facts.pop(self._key, None)
                raise
            session.run.received()
            if samples.was_interrupted():
                break
            samples.wave = session.next(m)
        return (yield from self._last_turn())

    def _last_turn(self) -> Script:
        """What the loop does after its last step, on the samples."""
        run, last = self._samples.run, self._passes.steps - 1
        assert run.sample is not None
        sample = run.sample.to(self._scheduler.dtype)
        midway = run.plan.is_sequential and run.stopped  # the state of another step
        if self._passes.last != last and not midway:
            yield Turn(last, sample)
        return sample
