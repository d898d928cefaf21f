"""The script of a call whose loop makes turns for the rows of waves: rehearsal, waves, and what follows a callback."""

from __future__ import annotations

import time
from collections.abc import Generator, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import clock
from ...engine import cancellation
from ...engine.cancellation import Interrupted
from ...engine.costs import price
from ...engine.distributed import call as distributed
from ...engine.merging.calls import MergedCalls
from ...engine.merging.rule import Call
from ...errors import UnsupportedPipeline
from ...planner.search import Pricing
from ...sampling.recorded.network import RecordedNetwork
from ...sampling.recorded.roles import Inferred
from ...sampling.session import Session, no_room
from ...schedulers.private_draws import PrivateDraws
from ...schedulers.reader import state_key
from ...schedulers.table import NoiseTable
from ...solvers.contract import Evaluate, SolverInputs
from ...solvers.registry import SEQUENTIAL
from ..kinds import KindOfLoop
from ..module_state import ModuleState, NetworkChanged, WeightsWritten
from ..network_checks import NO_CHECK
from ..networks import training
from ..takeover.inferred import Inference
from ..takeover.verify import LEAKS, OWN_TURNS, Agreement, verified
from .call_session import CallSession, LeaveWaves, refuse_other_shapes
from .placeholders import Placeholders
from .proxies import SchedulerProxy
from .rehearsal import Facts, Passes, Rehearsal, StateChanged
from .rows import RowTurns
from .taken_over import kind_of_check, recorded, run_waves
from .turn_costs import CallsOfTurns, with_turns
from .turns import LoopTurns, Ran, Script, Turn


class Driver:
    """Writes the script.

    placeholders: the answers in turns of a rehearsal.
    """

    def __init__(
        self,
        samples: CallSession,
        scheduler: SchedulerProxy,
        turns: LoopTurns,
        merged: MergedCalls,
        placeholders: Placeholders,
    ) -> None:
        self._samples, self._scheduler, self._turns, self._merged = samples, scheduler, turns, merged
        self._settings, self._placeholders = samples.settings, placeholders
        self._networks, self._memory = self._settings.networks, self._settings.memory
        self._key: tuple[KindOfLoop, Hashable, int, int] | None = None  # of the call in its memory, see `enter`
        self._known: Facts | str | None = None
        self._before: ModuleState | None = None  # of the networks, before they were first called
        self._hook_changes = self._loop_changes = False  # whether a hook, or the loop itself, changes them
        self.seconds = 0.0  # that it took to find out how the loop works
        self.check = NO_CHECK  # of a takeover, in this call
        self.reason: str | None = None  # why the loop makes its own turns
        self.x0: Tensor  # predicted in the only step
        self._to_begin: tuple[NoiseTable, Any]  # the table of the whole grid, and the generator of the steps
        self._begun: tuple[NoiseTable, SolverInputs] | None = None  # of the loop's steps, once the noise is drawn
        self._first: Ran  # turn
        self._called: ModuleState  # of the networks, as their first calls have left them
        self._passes: Passes
        self._rehearsal: Rehearsal
        self._facts: Facts
        self._rows: RowTurns

    def enter(self) -> None:
        """Before the first turn of a loop over the timesteps, which may only read them; no network has been called."""
        samples, kind = self._samples, self._settings.kind
        self._before, self._turns.watch = None, self._keep_networks
        if kind is not None:
            self._key = kind, state_key(self._scheduler.inner), samples.start, len(samples.timesteps)
            self._known = self._memory.facts.get(self._key)
            self.reason = self._known.why_turns if isinstance(self._known, Facts) else None
        self._turns.begins_live = self._begins_live

    @property
    def _begins_live(self) -> bool:
        """Whether the first turn calls its network. Otherwise it is only to show its network calls."""
        if not self._may_take_over or isinstance(self._known, str):
            return True
        if self._known is not None:
            return self._known.why_turns is not None
        # of a new loop it counts as a row to compare with, and shows what the network returns
        return self._key is not None and self._key[0].loop not in self._memory.rehearsed

    @property
    def refused(self) -> bool:
        """Whether a rehearsal, of this call or an earlier one, has shown that the kind must run on its stock loop."""
        return self._key is not None and isinstance(self._memory.facts.get(self._key), str)

    @property
    def _may_take_over(self) -> bool:
        return len(self._samples.timesteps) > 1

    @property
    def _in_order(self) -> bool:
        """Whether rows are made one by one, as the loop makes its steps."""
        options = self._settings.planner.options
        return options is not None and options.name == SEQUENTIAL

    def _keep_networks(self, _call: Call) -> None:
        """Before the first network call: the loop may have set something up on its networks."""
        self._before, self._turns.watch = self._memory.held_by(self._networks), lambda call: None

    def changed(self) -> str | None:
        """The part of a network that holds something else than before its first call, or None."""
        return None if self._before is None else self._before.changed()

    def put_back(self) -> None:
        """Give the networks back what they held, if the call is left before its first wave."""
        if self._before is not None and self._samples.session is None:
            self._before.restore()

    def restore_networks(self) -> None:
        """Give the networks back what they held before the loop called them: the stock loop follows.

        WeightsWritten: the loop or a hook has written to weights.
        """
        if self._before is None:
            return
        self._before.restore(watching=True)
        if (self._hook_changes or self._loop_changes) and (part := self.changed()) is not None:
            raise WeightsWritten(part)

    def script(self, first: Ran, options: dict[str, Any]) -> Script:
        """The turns of a call after its first one. options: of the scheduler's step."""
        first = replace(first, x=first.x.clone(), m=first.m.clone())
        return self._with_what_there_is(self._script(first, options), first)

    def _with_what_there_is(self, script: Script, first: Ran) -> Script:
        """The script; after an interrupt the loop goes on with the sample that there is."""
        samples, self._first = self._samples, first
        try:
            return (yield from script)
        except StateChanged:
            self._memory.facts.pop(self._key, None)
            raise
        except Interrupted:
            if samples.session is None:  # before the first wave
                self.put_back()
                noise, inputs = self._begun or samples.begin(*self._to_begin, first.m, first.x, len(first.x))
                samples.make(noise, inputs)
                samples.interrupt(samples.state)
                return first.x
            if samples.run.sample is None:  # otherwise the run was complete, and others were timed
                samples.interrupt(samples.newest())
            return (yield from self._last_turn(len(first.x) // len(samples.state)))

    def _script(self, first: Ran, options: dict[str, Any]) -> Script:
        begun, samples, scheduler = time.perf_counter(), self._samples, self._scheduler
        steps = len(samples.timesteps)
        x, m = first.x, first.m
        changed = () if isinstance(self._known, Facts) else self._networks  # what may call networks of an unknown kind
        with self._timed():
            self._called = ModuleState(changed)
            table, generator = self._to_begin = scheduler.table(options), options.get("generator")
            self._begun = None
            refuse_other_shapes(m, x, learned=table.learned is not None)
            scheduler.keep_snapshots(samples.start, steps, table.call, x, m)
        self._passes, self.x0, self._facts = Passes(steps), x, Facts()
        self._rehearsal = Rehearsal(self._turns, self._passes, x, m.shape, self._settings.generators)
        if steps > 1:
            with self._timed():
                yield from self._rehearse(table.part(samples.start, samples.start + steps))
        inferred = self._to_take_over()
        copies = 1 if inferred is None else inferred.copies
        noise, inputs = self._begun = samples.begin(table, generator, m, x, len(x) // copies)
        self._rows = RowTurns(self._turns, self._passes, self._rehearsal, self._facts, self._merged, self._memory)
        if inferred is not None and (network := (yield from self._taken(inferred, first, noise, inputs))) is not None:
            samples.held = self._before or ModuleState(self._networks)
            if not isinstance(self._known, Facts):  # it was found out in this call
                samples.held.restore()
            if first.turn.live:  # its network calls were none of the run
                samples.started = begun
            self._exclude_own_time()
            return (yield from self._repeated(network, copies))
        if not first.turn.live:
            cancellation.look()
            m = (yield from self._passes.turn(Turn(0, x, live=True))).m.clone()
        m = distributed.of_first(m)  # each rank has made it
        if steps == 1:
            self.x0 = samples.x0(m)
        self._rows.remember(x, m)
        planner = self._settings.planner
        plan, _ = planner.choose(steps, noise.spread is not None)
        measured = (planner.measures or self._settings.plan_only) and self._key is not None and steps > 1
        if measured or not plan.is_sequential or distributed.current() is not None:
            with self._timed(), self._draws_of_checks():
                yield from self._look_at_networks(x, measured or plan.program().peak_rows > 1)
        self._called.restore()
        self._exclude_own_time()
        pricing = (yield from self._price(noise, inputs, m)) if measured else None
        session = samples.make(noise, inputs, pricing=pricing)
        if self._settings.plan_only:
            samples.stop(samples.state)
            return x
        if (alone := self._rows.why_alone()) and planner.options is None:
            session.take_steps(f"the network would be called for one row at a time: {alone[0]}", tell=False)
        samples.graph_network_calls(self.reason)
        return (yield from self._waves(session))

    def _repeated(self, network: RecordedNetwork, copies: int) -> Script:
        """Run all waves by repeated network calls; return the samples. copies: of these that the loop keeps."""
        samples = self._samples
        try:
            run_waves(samples, network)
        except LeaveWaves:  # the callback answers in this turn
            step = samples.told - 1
            yield from self._passes.turn(Turn(step, samples.state_after(step).to(self._scheduler.dtype)))
            raise
        except NetworkChanged as why:
            return (yield from self._waves(self._leave_waves(why), samples.wave))
        return (yield from self._last_turn(copies))

    def rest(self) -> Script:
        """The turns after a change by a callback, of a session that goes on from it.

        The state departs as it is: the loop has done all that it does after its step.
        """
        return self._with_what_there_is(self._rest(), self._first)

    def _rest(self) -> Script:
        samples = self._samples
        session = samples.session
        assert session is not None
        samples.wave = session.next(None)
        assert samples.wave is not None
        self._passes.last = samples.offset
        ran = yield Turn(samples.offset, samples.wave.x[0], live=True)
        m = distributed.of_first(ran.m).clone()
        if self._facts.replaces:  # the callback may have changed the mask
            samples.arrivals = self._passes.arrivals = yield from self._rehearsal.arrivals()
        if (wave := session.next(m[None])) is None:
            return (yield from self._last_turn())
        return (yield from self._waves(session, wave))

    def _by_hook(self, why: NetworkChanged) -> UnsupportedPipeline:
        """Why the stock loop makes a call: a hook that changes its network must be called in the loop's own order."""
        self._hook_changes = True
        what = str(why)
        return UnsupportedPipeline(f"{what[:1].upper()}{what[1:]}, perhaps by a hook. Call the pipeline itself.")

    def _exclude_own_time(self) -> None:
        if self._samples.started is not None:
            self._samples.started += self.seconds + self.check.seconds

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def _to_take_over(self) -> Inferred | None:
        """How the loop calls its networks, if it is to be taken over."""
        found = self._facts.takeover
        self.reason = self.reason or (self._facts.why_turns if self._may_take_over else "it has a single step")
        if self._settings.calls_back and isinstance(found, Inferred) and found.copies > 1:
            self.reason = "callback_on_step_end is given several copies of the sample"
        return None if self.reason is not None or isinstance(found, str) else found

    def _taken(
        self, inferred: Inferred, first: Ran, noise: NoiseTable, inputs: SolverInputs
    ) -> Generator[Turn, Ran, RecordedNetwork | None]:
        """The network calls of the loop, to be repeated for rows; None if it makes its own turns."""
        turns = yield from self._shown(inferred, first, noise)
        if (callback := self._samples.callback) is not None:
            # it is told at the end of a turn: after this one, of two steps
            yield from self._passes.turn(Turn(0, self._rehearsal.probe(0)))
            self.reason = callback.why_turns()
            if self.reason is not None:
                return None
        network = recorded(self._samples, inferred, turns, noise, inputs)
        reason = yield from self._compared(network, first)
        if reason is None:
            return network
        if inferred.copies > 1 or not (self._in_order or reason.startswith(OWN_TURNS)):
            raise UnsupportedPipeline(f"{reason[:1].upper()}{reason[1:]}. Run this call on the original pipeline.")
        self.reason = self._facts.takeover = reason
        return None

    def _shown(self, inferred: Inferred, first: Ran, noise: NoiseTable) -> Generator[Turn, Ran, dict[int, Ran]]:
        """Turns that show the network calls of this call, by step.

        Raises StateChanged if they do not do what another call of the kind has shown.
        """
        agreement = Agreement(inferred, self._placeholders, noise.numbers["input_scale"])
        turns, known = {0: first}, isinstance(self._known, Facts)
        if not first.turn.live:
            agreement.look(first)
        # the last step comes last: the loop then goes on from it with the sample
        for step in sorted({*inferred.shown_by, *([noise.num_steps - 1] if known else [])} - {0}):
            turns[step] = yield from self._passes.checked(Turn(step, self._rehearsal.probe(step)))
            agreement.look(turns[step])
        if known and not agreement.holds():
            raise StateChanged("The loop of this call does something else than in an earlier call of its kind.")
        return turns

    def _compared(self, network: RecordedNetwork, first: Ran) -> Generator[Turn, Ran, str | None]:
        """Why rows, made by repeated calls, are not what turns of the loop make; None: they are."""
        planner, compared = self._settings.planner, self._memory.compared
        merged = planner.max_rows != 1 and not self._in_order
        kind = kind_of_check(network), merged, self._in_order
        checked = compared.get(kind)
        if checked is None:
            with self._timed():
                undo = ModuleState(network.modules, self._settings.generators)
            try:
                with self._draws_of_checks():
                    found = yield from verified(network, self._passes, first, merged=merged, in_order=self._in_order)
            finally:
                undo.restore()
            if found is None:
                return None
            checked = self.check = compared[kind] = found
        return checked.reason

    def _price(self, noise: NoiseTable, inputs: SolverInputs, m: Tensor) -> Generator[Turn, Ran, Pricing]:
        """The costs of this call, of which turns make the rows."""
        samples, turns = self._samples, list[Ran]()
        for step in (0, noise.num_steps - 1):
            ran = yield from self._passes.turn(Turn(step, samples.state.to(m.dtype)))
            turns += [ran] if not turns or ran.kinds == turns[0].kinds else []
        calls = CallsOfTurns([each.calls for each in turns], self._merged)
        planner = self._settings.planner
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
        return with_turns(pricing, clock.agreed(self._facts.turn_seconds, "the seconds of a turn"), levels + 1)

    def _rehearse(self, noise: NoiseTable) -> Generator[Turn, Ran, None]:
        """Find out what the turns of the loop depend on, or remember it."""
        known, key = self._known, self._key
        if isinstance(known, str):
            raise UnsupportedPipeline(known)
        try:
            if known is None:
                inference = Inference(noise.numbers["input_scale"], self._placeholders)
                loop = None if key is None else key[0].loop
                again = (loop is not None and loop in self._memory.rehearsed) or self._settings.is_known()
                with self._private_draws() as draws:
                    found = yield from self._rehearsal.run(self._called, inference, draws, again=again)
                known, self._samples.arrivals = found
                if loop is not None:
                    self._memory.rehearsed[loop] = True
                if key is not None:
                    self._memory.facts[key] = known
            else:
                self._turns.copies = known.copies
                if known.replaces:
                    self._samples.arrivals = yield from self._rehearsal.arrivals()
        except UnsupportedPipeline as why:
            self._loop_changes = self._rehearsal.changes_networks
            if key is not None:
                self._memory.facts[key] = str(why)
            raise
        self._facts, self._passes.arrivals = known, self._samples.arrivals

    @contextmanager
    def _private_draws(self) -> Iterator[PrivateDraws]:
        """In the block, what the loop draws without a generator is drawn beside torch's global ones."""
        settings = self._settings
        before = settings.draws
        settings.draws = PrivateDraws() if before is None else before
        try:
            with settings.draws as draws:
                yield draws
        finally:
            settings.draws = before

    def _draws_of_checks(self) -> AbstractContextManager[object]:
        """For network calls that stock does not make: networks that drop out draw in them too."""
        return self._private_draws() if training(self._networks) else nullcontext()

    def _look_at_networks(self, x: Tensor, merge: bool) -> Generator[Turn, Ran, None]:
        try:
            yield from self._rows.look_at_networks(x, merge)
        except torch.OutOfMemoryError:
            raise UnsupportedPipeline(f"{no_room(2)}.") from None
        if self.reason == LEAKS and self._rows.why_alone():
            raise UnsupportedPipeline(f"{LEAKS[:1].upper()}{LEAKS[1:]}. Run this call on the original pipeline.")

    def _waves(self, session: Session, wave: Evaluate | None = None) -> Script:
        """Run all waves, from this one or from the first; return the samples."""
        samples = self._samples
        if wave is None:  # otherwise a callback has changed something, and the rest runs step by step
            held = self._before if isinstance(self._known, Facts) else None
            samples.held = held or ModuleState(self._networks)
        samples.wave = session.next(None) if wave is None else wave
        shared = distributed.current()
        while (wave := samples.wave) is not None:
            exchanges = 0 if shared is None else shared.exchanges
            m = yield from self._rows.evaluate(wave.x, [samples.offset + position for position in wave.positions])
            if shared is not None and shared.exchanges == exchanges:  # the wave has told nothing of the others
                shared.look()
            samples.wave = session.next(m)
            if (why := samples.change()) is not None:
                self._leave_waves(why)
        return (yield from self._last_turn())

    def _leave_waves(self, why: NetworkChanged) -> Session:
        """Go on with the steps, one after another: from the first one, or after those that a callback was told of."""
        samples = self._samples
        assert samples.session is not None
        samples.end_replays()
        if not samples.told:
            if why.by_hook:
                raise self._by_hook(why)
            samples.session.take_steps(str(why))
        else:
            samples.session.fall_back(f"{why}, after step {samples.told - 1}")
            samples.go_on_from(samples.told - 1, samples.state_after(samples.told - 1), str(why))
        samples.wave = samples.session.next(None)
        return samples.session

    def _last_turn(self, copies: int = 1) -> Script:
        """What the loop does after its last step, on the samples. copies: of these that it keeps."""
        run, last = self._samples.run, self._passes.steps - 1
        assert run.sample is not None
        sample = torch.cat([run.sample.to(self._scheduler.dtype)] * copies)
        midway = run.stopped and run.newest is None  # the state of another step
        if self._passes.last != last and not midway:
            yield Turn(last, sample)
        return sample
