"""Exploration: the first calls of a kind time the plans that may be fastest, and the fastest stays.

c(rows) predicts which plans are worth a run, but a prediction can be wrong: the machine was busy when one width was
measured, or runs take more iterations than those of other networks do. So each of the first calls also runs other
plans, the sequential one and the stock loop on its own input. These times alone tell which plans beat the loops; the
predictions help to tell which of those is the fastest. Pure Python: nothing is run here.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace

from ..telemetry.report import SEQUENTIAL_LOOP, STOCK_LOOP
from ..words import counted, duration
from .last_calls import LastCalls
from .plan import Plan
from .predictions import TRUST, correction, predicted_seconds, prediction_of, turns_to_time, usual_seconds, width_of

logger = logging.getLogger("srds_fast")

# key of the loop that calls run on without this package
STOCK = "stock"
MEASURED, EXPLORING, FROZEN, DROPPED = "measured", "exploring", "frozen", "dropped"
# calls that may run other plans beside their own
CALLS = 3
# most plans that are timed beside the sequential one, and by how much they may be predicted to be slower than it
PLANS, NEAR = 3, 1.5
# one sequential call fits into a third of the budget for three
ROUNDING = 1e-6
# a way whose runs took this many times as long as those of the fastest is not run again
LOST = 1.5
# a plan replaces a loop, and our loop the stock loop, if it takes at most this share of its time: few runs tell no less
WORTH = 0.93
CLEARLY = 0.97  # the same for the stock loop in the place of ours, where ours costs calls less beside its turns


class Exploration:
    """The ways to make one kind of call, what they took, and which one calls take. May be used from several threads.

    budget: what timing other ways may cost in all, in sequential calls; 0: predictions decide alone.
    """

    def __init__(self, budget: float) -> None:
        self.state = EXPLORING if budget > 0 else MEASURED
        self.version: int | None = None  # of the experience that the predictions follow from
        self.spent = 0.0  # seconds that timing other ways has cost
        self.calls = 0  # that explored
        self._budget, self._limit = budget, WORTH  # of the sequential loop's time over the stock loop's
        self._ways: dict[Hashable, Plan | None] = {}  # by signature; None: the stock loop
        self._sequential: Hashable = None
        self._choice: Hashable = None
        self._why: str | None = None
        self._seconds: dict[Hashable, list[float]] = {}  # of each run of a way; infinite if it was cut off
        self._work: dict[Hashable, list[float]] = {}  # of the same runs, see `record`
        # seconds of the fastest run of a plan, until it ended or was cut off, over those predicted for its iterations
        self._missed: dict[Hashable, float] = {}
        self._hope: Mapping[Hashable, float] = {}  # see `predict`
        self._rounds: list[dict[Hashable, float]] = []  # seconds over work, call by call: the machine was alike in one
        self._last = LastCalls()  # of the choice
        self._doubted: Hashable = None  # the plan in doubt, while a call times the sequential loop and then the plan
        self._doubt = ""  # its reason
        self._dropped: set[Hashable] = set()
        self._logged: tuple[Hashable, bool, Hashable] | None = None  # what the log was told of the choice
        self._held = False  # the choice stays, also if it turns out slower
        self._corrected = False  # times are no longer as measured: the machine has become slower or faster
        self._last_way: tuple[Hashable, str] | None = None  # that a call of the user took, and its name
        self._lock = threading.RLock()
        self._running, self._crowded = 0, False  # calls under way; nothing is timed if two were at once

    @property
    def settled(self) -> bool:
        """Whether the choice is made for good."""
        return self.state in (FROZEN, DROPPED)

    @property
    def chose_stock(self) -> bool:
        """Whether calls are to run on the stock loop."""
        return self.settled and self._choice == STOCK

    @property
    def plan(self) -> Plan:
        """The plan of the next call, its `prediction` filled."""
        with self._lock:
            plan = self._plan(self._sequential if self._choice == STOCK else self._choice)
            return replace(plan, prediction=replace(prediction_of(plan), why=self.why))

    @property
    def why(self) -> str:
        """Why this plan."""
        if self._why is not None:
            return self._why
        why = prediction_of(self._plan(self._choice)).why
        return why if self.state == MEASURED else f"predicted, and not timed yet: {why}"

    @property
    def held(self) -> bool:
        """Whether the choice stays whatever later calls take, see `hold`."""
        return self._held

    @property
    def baseline(self) -> tuple[str, float] | None:
        """The loop to compare calls with, the stock loop if it was timed, and the seconds that it took."""
        with self._lock:
            loops = (STOCK, STOCK_LOOP), (self._sequential, SEQUENTIAL_LOOP)
            for key, name in loops[1:] if self._corrected else loops:
                if self._seconds.get(key) and self._estimate(key) < math.inf:
                    return name, self._estimate(key)
            return None

    def taken(self, way: Plan | str) -> str | None:
        """A call of the user takes a way. Returns the name of the way that the one before it took, if another."""
        with self._lock:
            before = self._last_way
            self._last_way = (way, way) if isinstance(way, str) else (way.signature, way.short())
            return None if before is None or before[0] == self._last_way[0] else before[1]

    def replace(self, other: Exploration) -> None:
        """Take the place of another exploration of the same kind of call."""
        if other.held:
            self.hold()
        self._last_way = other._last_way

    @property
    def sequential_seconds(self) -> float:
        """Of a sequential call, as timed; as predicted before."""
        return self._estimate(self._sequential)

    def predict(
        self, plans: Iterable[Plan], fastest: Plan, version: int, hope: Mapping[Hashable, float] | None = None
    ) -> None:
        """Take new predictions: plans with their `prediction`, one of them sequential, and the one to take by these.

        hope: by signature of a plan, the share of its prediction that it takes with the fewest iterations that are
        likely. What was timed is kept, also if it is not predicted to be among the fastest any more.
        """
        with self._lock:
            self.version, self._hope = version, hope or {}
            compared = {plan.signature: plan for plan in plans}
            if self._sequential not in compared:
                self._sequential = next(key for key, plan in compared.items() if plan.is_sequential)
            timed = {key: plan for key, plan in self._ways.items() if key in self._seconds or key == STOCK}
            self._ways = {**timed, **compared}
            if self._seconds:
                self._lead()
            else:
                self._choice = fastest.signature
            for plan in compared.values():
                if plan.signature == self._choice and plan.prediction is not None:
                    logger.debug("Predicted for %s:\n%s", counted(plan.num_inference_steps, "step"), plan.prediction)
            self._log_choice()

    def offer_stock(self, *, on_a_tie: bool = True) -> None:
        """The stock loop can be timed, and calls of this kind can run on it; on_a_tie: if both loops are as fast."""
        with self._lock:
            self._limit = WORTH if on_a_tie else 1 / CLEARLY
            if self.state == EXPLORING:
                self._ways.setdefault(STOCK, None)

    def begin(self, *, may_explore: bool = True) -> bool:
        """A call begins; whether it explores. `end` ends it."""
        with self._lock:
            self._running += 1
            self._crowded |= self._running > 1
            if self.state != EXPLORING or self._crowded or not may_explore:
                return False
            self.calls += 1
            self._rounds.append({})
            if self.calls == 1:
                seconds = self._budget * self.sequential_seconds
                logger.info(
                    "The first %d calls of this kind also run other plans, to time them. This takes about %s in all.",
                    CALLS,
                    duration(seconds),
                )
            return True

    def due(self) -> Plan | str | None:
        """What else this call should run: a plan, or STOCK; None: nothing."""
        with self._lock:
            if self._crowded or self.state != EXPLORING or not self._rounds:
                return None
            allowed = self._allowed
            for key in sorted(self._ways, key=self._order):
                fits = self.spent + self._cost(key) <= allowed * (1 + ROUNDING)
                if fits and key not in self._rounds[-1] and not self._is_out(key):
                    return self._ways[key] or STOCK
            return None

    @property
    def seconds_left(self) -> float:
        """What this call may spend on timing other ways, at most."""
        return max(0.0, self._allowed - self.spent)

    @property
    def _allowed(self) -> float:
        """Seconds that the calls so far may spend in all."""
        sequential = self.sequential_seconds
        if self._sequential not in self._seconds:  # what other plans took must not make the budget larger
            sequential = min(sequential, predicted_seconds(self._plan(self._sequential)))
        return self._budget * sequential * min(1.0, self.calls / CALLS)

    def record(self, way: Plan | str, seconds: float, *, ended: bool = True, work: float = 1.0) -> None:
        """A way took so many seconds in this call.

        ended: False if it failed or was cut off after that time. work: what the iterations that it took cost, over what
        those cost that it was predicted to take.
        """
        name, how = way if isinstance(way, str) else way.short(), "took" if ended else "was ended after"
        logger.debug("Timed: %s %s %s.", name, how, duration(seconds))
        with self._lock:
            key = way if isinstance(way, str) else way.signature
            if self.state == EXPLORING and not self._crowded and key in self._ways:
                found = seconds if ended else math.inf
                self._rounds[-1][key] = found / work
                self._seconds.setdefault(key, []).append(found)
                self._work.setdefault(key, []).append(work)
                if key != STOCK:
                    missed = seconds / (work * predicted_seconds(self._plan(key)))
                    self._missed[key] = min(missed, self._missed.get(key, math.inf))

    def spend(self, seconds: float) -> None:
        """Timing another way has cost so much."""
        with self._lock:
            self.spent += seconds

    def end(self, plan: Plan, seconds: float | None, *, explored: bool, work: float = 1.0) -> None:
        """A call has ended. seconds: of its own run of the plan; None where they tell nothing of other calls.

        work: see `record`.
        """
        with self._lock:
            if not self._crowded:
                if self.state == EXPLORING and explored:
                    self._lead()
                    known = (len(self._seconds.get(key, ())) >= CALLS - 1 or self._is_out(key) for key in self._ways)
                    if self.calls >= CALLS or all(known):
                        self.freeze()
                elif self.settled and not self._held and seconds is not None and plan.signature == self._choice:
                    self._watch(plan, seconds, work)
                self._log_choice()
            self._running -= 1
            self._crowded &= self._running > 0

    def freeze(self) -> None:
        """Decide for good: by the times taken, or by the predictions if there are none."""
        with self._lock:
            if self.settled or not self._ways:
                return
            self.state = FROZEN
            if self._sequential in self._seconds:
                self._choice = self._fastest()
                timed = zip(self._seconds[self._choice], self._work[self._choice], strict=True)
                for seconds, work in timed:
                    if seconds < math.inf:
                        self._last.add(seconds, work)
                self._why = self._told()
            elif self._choice is not None:
                self._why = self.why

    def hold(self) -> None:
        """Decide for good, and keep the choice also if it turns out slower: equal calls then give equal bits."""
        with self._lock:
            if self._doubted is not None:
                self._choice, self._doubted = self._doubted, None
            self.freeze()
            self._held, self._last_way = True, None
            self._log_choice()

    def _log_choice(self) -> None:
        """Log the plan that the next call takes, if it is another than before, or now chosen for good."""
        told = self._choice, self.settled, self._doubted
        if told == self._logged or not self._ways:
            return
        before, self._logged = self._logged, told
        steps = counted(self._plan(self._sequential).num_inference_steps, "step")
        what = "chosen" if before is None or before[0] == self._choice else "changed"
        logger.info("Plan %s for calls of %s: %s, %s: %s.", what, steps, self._name(self._choice), self.state, self.why)

    def _watch(self, plan: Plan, seconds: float, work: float) -> None:
        """Doubt the plan if its calls turn out to be slower than the loops were.

        Then the next call is sequential, the one after it runs the plan, and these two decide. What slowed down the
        calls before may have been other work on the machine.
        """
        if plan.is_sequential:
            if self._doubted is not None:
                self._compare_with(seconds)
            return
        if self._sequential not in self._seconds:
            return
        self._last.add(seconds, work)
        if self._doubted is not None:
            self._judge(seconds, work)
            return
        doubt = self._last.slower(self.sequential_seconds, self._estimate(self._base()))
        if doubt is not None:
            self._doubted, self._choice = self._choice, self._sequential
            self._doubt = f"{plan.short()} was in doubt, as {doubt}"
            self._why = f"{self._doubt}. This call times the sequential loop again"

    def _compare_with(self, seconds: float) -> None:
        """The sequential loop takes so long now: the machine may have become slower as a whole."""
        factor = seconds / self.sequential_seconds
        self._seconds = {key: [factor * each for each in taken] for key, taken in self._seconds.items()}
        self._seconds[self._sequential], self._work[self._sequential] = [seconds], [1.0]
        self._rounds, self._corrected, self._choice = [], True, self._doubted
        self._why = f"{self._doubt}. The sequential loop took {duration(seconds)}. This call times the plan again"

    def _judge(self, seconds: float, work: float) -> None:
        """Drop the plan in doubt if it takes longer than the loops, as it ran in this call and they before it."""
        doubted, self._doubted = self._doubted, None
        took, loop = self._last.expected(seconds, work), self._estimate(self._base())
        slower = took > loop
        if slower:
            self._dropped.add(doubted)
            self._choice, self.state = self._fastest(), DROPPED
            self._last.forget()
        else:
            self._last.forget_seconds()
        then = f"{duration(took)} a call now, its baseline {duration(loop)}"
        self._why = f"{self._doubt}. It was {'dropped' if slower else 'kept'}: it takes {then}"

    def _fastest(self) -> Hashable:
        """The fastest of the plans that were timed, or one of the loops if it saves too little."""
        base = self._base()
        out = {STOCK, self._sequential} | self._dropped
        plans = [key for key in self._seconds if key not in out and self._ratio(key, base) <= WORTH]
        return min(plans, key=lambda key: self._likely(key, base), default=base)

    def _likely(self, key: Hashable, base: Hashable) -> float:
        """Time of a plan over that of a loop: geometric mean of its runs and its prediction."""
        predicted = predicted_seconds(self._plan(key)) / predicted_seconds(self._plan(self._sequential))
        runs = len(self._seconds[key])
        return math.exp((runs * math.log(self._ratio(key, base)) + TRUST * math.log(predicted)) / (runs + TRUST))

    def _base(self) -> Hashable:
        """The faster loop; on a tie the one that costs calls less beside its turns."""
        stock = STOCK in self._seconds and self._ratio(self._sequential, STOCK) > self._limit
        return STOCK if stock else self._sequential

    def _lead(self) -> None:
        """Let calls take the fastest plan of those that have run: a call must not end in an error of a new one."""
        plans = [self._sequential, *(key for key in self._seconds if key != STOCK)]
        self._choice = min(plans, key=lambda key: (self._estimate(key), key != self._sequential))

    def _estimate(self, key: Hashable) -> float:
        """Seconds of a way by its runs; before it ran, its prediction, corrected by what others took."""
        if key in self._seconds:
            return usual_seconds(self._seconds[key], self._work[key])
        predicted = self._plan(self._sequential if key == STOCK else key)
        return predicted_seconds(predicted) * self._correction(width_of(predicted))

    def _at_best(self, key: Hashable) -> float:
        """Seconds that a plan may take: as predicted, or less where a loop or runs of others took less than predicted.

        The machine may have been busy in a single run of another plan, or while costs were measured. That must not keep
        a plan from being timed.
        """
        plan, sequential = self._plan(key), predicted_seconds(self._plan(self._sequential))
        loop = min(map(self._estimate, self._loops)) / sequential
        return predicted_seconds(plan) * min(1.0, loop, self._correction(width_of(plan))) * self._hope.get(key, 1.0)

    def _correction(self, width: float) -> float:
        """What plans with waves of so many rows take over their predictions, by what runs of others took."""
        found: dict[float, list[float]] = {} if self._sequential in self._missed else {1.0: [1.0]}
        for key, ratio in self._missed.items():
            found.setdefault(width_of(self._plan(key)), []).append(ratio)
        return correction(width, found)

    def _cost(self, key: Hashable) -> float:
        """Seconds that timing a way will take."""
        if key not in (STOCK, self._sequential):
            return min(self._estimate(key), LOST * self.sequential_seconds)  # it is cut off then
        steps = self._plan(self._sequential).num_inference_steps
        return self._estimate(key) * turns_to_time(steps) / steps

    def _plan(self, key: Hashable) -> Plan:
        plan = self._ways[key]
        assert plan is not None, "the stock loop has no plan"
        return plan

    def _ratio(self, key: Hashable, other: Hashable) -> float:
        """Time of a way over that of another, which has been timed: the median over calls that ran both.

        A single such call may have been interrupted in one of the two: then the usual times of both count, if lower.
        """
        both = [each for each in self._rounds if key in each and each.get(other, math.inf) < math.inf]
        usual = self._estimate(key) / self._estimate(other)
        if not both:
            return usual
        work = statistics.mean(self._work[key]) / statistics.mean(self._work[other])
        paired = work * statistics.median_low([each[key] / each[other] for each in both])
        return paired if len(both) > 1 else min(paired, usual)

    def _is_out(self, key: Hashable) -> bool:
        """Whether a way has lost, or is not worth a first run by what is known so far."""
        if key in self._seconds or key in (STOCK, self._sequential):
            return key in self._seconds and self._estimate(key) > LOST * self._least
        plans = sum(each not in (STOCK, self._sequential) for each in self._seconds)
        return plans >= PLANS or self._at_best(key) > NEAR * min(map(self._estimate, self._loops))

    @property
    def _loops(self) -> list[Hashable]:
        """The sequential loop, and the stock loop if it was timed."""
        return [self._sequential, STOCK] if STOCK in self._seconds else [self._sequential]

    @property
    def _least(self) -> float:
        """Seconds of the fastest way that was timed."""
        return min(map(self._estimate, self._seconds), default=math.inf)

    def _order(self, key: Hashable) -> tuple[int, int, bool, float]:
        """The least timed way first; before the others, the two loops that they are compared with.

        Of plans never timed, those of a method that no run has tried come first, unless they could only lose: the
        iterations of each method are predicted in their own way, so one run of it tells more than runs of a second plan
        of another method. Of the others the one that may be fastest: a run is what shows whether it takes as few
        iterations.
        """
        loops = {self._sequential: 0, STOCK: 1}
        hoped = self._estimate(key) * (1.0 if key in self._seconds else self._hope.get(key, 1.0))
        tried = key not in loops and self._plan(key).method in {self._plan(each).method for each in self._missed}
        lost = key not in loops and key not in self._seconds and self._at_best(key) > LOST * self._least
        return len(self._seconds.get(key, ())), loops.get(key, 2), tried or lost, hoped

    def _told(self) -> str:
        """Why the choice was made, with the times."""
        loops = (self._sequential, "the sequential loop"), (STOCK, "the loop without srds_fast")
        faster = [
            f"{1 / self._ratio(self._choice, key):.2f} times faster than {name}"
            for key, name in loops
            if self._choice not in self._loops and self._seconds.get(key) and self._estimate(key) < math.inf
        ]
        took = {self._name(key): self._estimate(key) for key in self._seconds}
        times = "; ".join(
            f"{name}: {duration(each) if each < math.inf else 'not finished'}" for name, each in took.items()
        )
        why = " and ".join(faster) or f"nothing else took less than {WORTH:.0%} of its time"
        return f"{why}, timed in {counted(self.calls, 'call')} ({times})"

    def _name(self, key: Hashable) -> str:
        plan = self._ways[key]
        return STOCK if plan is None else plan.short()
