"""c(rows), the time of a network call by its number of rows: measured at a few widths, once for each kind of call."""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import clock, progress, telemetry
from ..caches import Cache
from ..errors import CaptureFailed
from ..kernels.wave_update import NetworkInput
from ..planner.context import context_of
from ..planner.cost_curve import CostCurve
from ..planner.curve_cache import CurveCache
from ..planner.plan import Plan
from ..planner.search import Known, Pricing
from ..schedulers.table import NoiseTable
from ..solvers.contract import Evaluate, SolverInputs
from ..solvers.convergence import Diverged
from ..solvers.fixed_point.program import of_widths
from ..solvers.program import Program
from ..words import counted, duration
from . import cancellation
from .distributed import call as distributed
from .distributed.call import SharedCall
from .eager import Evaluator
from .graphs.device_lock import DeviceBusy, device_lock, in_a_replay
from .graphs.recorder import recorder
from .run import Run

logger = logging.getLogger("srds_fast")

MOST_KEPT = 64
# waves of the sequential loop that are run to time what it takes outside the network
MOST_TIMED = 512
WIDTHS = (1, 2, 4, 8, 16, 24, 32)
# what measuring may take, in sequential calls, or in seconds if that is more
BUDGET, BUDGET_SECONDS = 1.0, 0.02
# seconds; shorter calls are timed in rounds over all widths, so that a busy moment affects them alike, longer ones once
SHORT = 0.05
ROUNDS = 5
# a long call at this share of the time of as many single rows: wider ones cost in proportion to their rows
SATURATED = 0.75


class Costs:
    """Costs by kind of call; the least recently used are given up first, but for those of plans that must stay.

    May be used from several threads.
    """

    def __init__(self) -> None:
        self._kept: Cache[Known] = Cache("costs of networks", MOST_KEPT, stays=lambda known: known.held)
        self._lock = threading.RLock()

    def of(self, key: Hashable, make: Callable[[], CostCurve]) -> Known:
        """The costs of a kind of call; its curve is measured now if it has not been."""
        key = key, torch.get_num_threads()
        with self._lock:  # held while it is measured: two measurements at once would disturb each other
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = Known(make())
            return found

    def known(self, key: Hashable) -> bool:
        with self._lock:
            return (key, torch.get_num_threads()) in self._kept

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()


def price(
    costs: Costs,
    key: Hashable,
    evaluator: Callable[[Program], Evaluator],
    state: Tensor,
    noise: NoiseTable,
    inputs: SolverInputs,
    dtype: torch.dtype,
    *,
    networks: Sequence[nn.Module] = (),
    max_rows: int | None = None,
    replayed: bool,
    cache: CurveCache | None = None,
    modules_found: Sequence[nn.Module] = (),
    replicated: bool = False,
) -> Pricing:
    """The costs of calls like one that is about to be made, measured if they are not known.

    key: of the kind of call, but for the state and the format of the network's input. dtype: of the network's output.
    replayed: the call will be replayed from graphs: nothing is then spent between network calls. cache: for other
    processes, which find the costs by the networks of `modules_found`. replicated: ranks that share the call may also
    evaluate all rows themselves.
    """

    def measured() -> CostCurve:
        started, shared = time.perf_counter(), distributed.current()
        if shared is None:
            found = measure_widths(evaluator, noise.num_steps, state, inputs.network, max_rows, replayed=replayed)
        else:
            given = evaluator, noise.num_steps, state, inputs.network
            found = measure_shared(shared, *given, dtype, max_rows)
            if replicated:
                with distributed.replicating(True):
                    found = replace(found, replicated=measure_widths(*given, max_rows, replayed=False))
        logger.debug("Network calls of %s rows take %s seconds.", found.rows, found.seconds)
        logger.info(
            "Measured how long a network call takes with 1 to %s, in %s.",
            counted(found.rows[-1], "row"),
            duration(time.perf_counter() - started),
        )
        return found

    def curve() -> CostCurve:
        if cache is None or distributed.current() is not None:  # other ranks may find other files
            return measured()
        kind, context = (*of_call, replayed), context_of(state.device, noise, modules_found)
        kept = cache.load(kind, context)
        if kept is None:
            kept = measured()
            cache.save(kind, context, kept)
        return kept

    def between(plan: Plan) -> float:
        if known.curve.how == "replayed":
            return 0.0
        try:
            with telemetry.unseen(), distributed.attempt("looking between network calls"):
                run = Run(plan, state, noise, inputs.unseen())
                run.watch = None  # no network is called
                branches = 1 if inputs.guidance is None else len(inputs.guidance)
                # the waves of the sequential loop are alike
                timed = min(MOST_TIMED, len(run.program)) if plan.is_sequential else len(run.program)
                with distributed.replicating(plan.replicated):
                    found = between_calls(run.next, dtype, branches, timed, len(run.program))
                run.close()
                return found
        except (Diverged, torch.OutOfMemoryError):
            return math.inf

    # within a replay, or while another thread holds the device, eager calls are timed, under a key of their own
    replayed = replayed and not in_a_replay(state.device) and distributed.current() is None
    of_call = key, state.shape, state.device, inputs.network, dtype, max_rows, distributed.size()
    if replayed and not costs.known((*of_call, True)):
        try:
            # Recording writes to memory that another call may replay on. The device lock is taken before the lock of
            # the costs: the thread that holds the device may be waiting for these costs.
            with device_lock(state.device):
                costs.of((*of_call, True), curve)
        except DeviceBusy:
            replayed = False
    known = costs.of((*of_call, replayed), curve)
    here, stochastic = context_of(state.device, noise, networks), noise.spread is not None
    return Pricing(known, between, here, (*of_call, replayed), stochastic)


def measure_widths(
    evaluator: Callable[[Program], Evaluator],
    num_steps: int,
    x: Tensor,
    network: NetworkInput,
    max_rows: int | None,
    *,
    replayed: bool,
) -> CostCurve:
    """The curve of calls that this process makes alone, at the usual widths; see `measure`."""
    widths = [width for width in WIDTHS if width <= (max_rows or width)]
    return measure(evaluator, of_widths(num_steps, widths), x, network, replayed=replayed)


@torch.no_grad()
def measure(
    evaluator: Callable[[Program], Evaluator], program: Program, x: Tensor, network: NetworkInput, *, replayed: bool
) -> CostCurve:
    """The curve of a network for batches like x, [batch, ...]: every row is one of it.

    program: a wave for each width, from narrow to wide; see `SATURATED`. replayed: time recordings of the calls, or
    eager calls where one cannot be recorded; the caller holds the device lock.
    """
    with progress.bar("Measuring the network", len(program.positions)) as bar:
        if replayed:
            with suppress(CaptureFailed):
                return _measured(evaluator(program), program, x, network, bar.update, replayed=True)
        bar.reset()
        return _measured(evaluator(program), program, x, network, bar.update, replayed=False)


@torch.no_grad()
def measure_shared(
    shared: SharedCall,
    evaluator: Callable[[Program], Evaluator],
    num_steps: int,
    x: Tensor,
    network: NetworkInput,
    dtype: torch.dtype,
    max_rows: int | None,
) -> CostCurve:
    """The curve of calls that ranks share: what is measured of whole calls, and of the gather alone, at some widths.

    Between these widths a call costs what the units of the busiest rank cost, c(ceil(units / ranks)), and its gather.
    Calls are made from Python. dtype: of the network's output.
    """
    ranks = shared.ranks.size
    widths = [width for width in sorted({1, *(ranks * width for width in WIDTHS)}) if width <= (max_rows or width)]
    program, before = of_widths(num_steps, widths), shared.work
    evaluator(program)(wave_of(program, 0, x, network))
    units = shared.work.since(before).of_all
    whole = measure(evaluator, program, x, network, replayed=False)
    gathers = [gather_seconds(shared, rows * units, x, dtype) for rows in whole.rows]
    gather = CostCurve(tuple(rows * units for rows in whole.rows), tuple(gathers))
    of_rank: dict[int, float] = {}  # by units of the busiest rank
    for rows, seconds in zip(whole.rows, whole.seconds, strict=True):
        busiest = -(-rows * units // ranks)
        of_rank[busiest] = min(of_rank.get(busiest, math.inf), max(0.0, seconds - gather(rows * units)))
    found = CostCurve(tuple(of_rank), tuple(of_rank.values())).shared(ranks, units, gather, whole.rows[-1])
    return replace(found, most_rows=whole.most_rows)


def gather_seconds(shared: SharedCall, units: int, x: Tensor, dtype: torch.dtype) -> float:
    """What ranks take to bring so many outputs together that are there already."""
    shape, times = x.shape[1:], []

    def made(number: int, part: slice) -> Tensor:
        return x.new_zeros(part.stop - part.start, *shape, dtype=dtype)

    for _ in range(ROUNDS):
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        started = clock.now()
        shared.outputs([units], shape, x.device, made)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(clock.since(started, "the seconds of a gather"))
    return statistics.median(times)


def wave_of(program: Program, number: int, x: Tensor, network: NetworkInput) -> Evaluate:
    """A wave of a program, every row at x, [batch, ...]."""
    positions = program.positions[number]
    given = network.empty(len(positions), x)
    given.unflatten(0, (network.branches, -1)).copy_(x)
    return Evaluate(given, positions, tuple(range(len(x))), number)


def _measured(
    evaluate: Evaluator,
    program: Program,
    x: Tensor,
    network: NetworkInput,
    done: Callable[[], object],
    *,
    replayed: bool,
) -> CostCurve:
    """done: told of each width that was measured."""
    calls: list[_Call] = []
    most_rows: int | None = None
    left = math.inf  # seconds
    for number, positions in enumerate(program.positions):
        # a wider call may take longer in proportion to its rows
        if calls and left < 2 * calls[-1].seconds * len(positions) / calls[-1].rows:
            break
        try:
            wave = wave_of(program, number, x, network)
            with distributed.attempt("measuring a width"):
                calls.append(_Call(evaluate, wave, replayed, warm=bool(calls) and calls[-1].seconds > SHORT))
        except Exception as why:  # out of memory, or another error of a network whose batch is too wide
            if not calls or isinstance(why, CaptureFailed):
                raise
            most_rows = calls[-1].rows
            break
        done()
        budget = max(BUDGET_SECONDS, BUDGET * program.num_steps * calls[0].seconds)
        left = budget - 2 * sum(call.seconds for call in calls)
        in_proportion = [call.seconds >= SATURATED * call.rows * calls[0].seconds for call in calls[-2:]]
        if len(calls) >= 3 and calls[-1].seconds >= SHORT and all(in_proportion):
            break
    short = [call for call in calls if call.seconds < SHORT]
    for _ in range(ROUNDS):
        left -= sum(call.seconds for call in short)
        if left < 0:
            break
        for call in short:
            call.time()
    evaluate.forget()
    memory = tuple(call.nbytes for call in calls if call.nbytes is not None)
    return CostCurve(
        tuple(call.rows for call in calls),
        tuple(call.seconds for call in calls),
        "replayed" if replayed else "eager",
        memory if len(memory) == len(calls) else None,
        most_rows,
    )


class _Call:
    """A network call of one width, timed once when it is made. warm: a call like it has been made."""

    def __init__(self, evaluate: Evaluator, wave: Evaluate, replayed: bool, *, warm: bool) -> None:
        self.rows = len(wave.positions)
        self.nbytes: int | None = None  # peak of the memory it took; None where that cannot be asked
        self._device = device = wave.x.device
        self._times: list[float] = []
        self._make: Callable[[], object] = lambda: evaluate(wave)
        if replayed or not warm:  # warm up: lazy initialisation must be neither timed nor captured
            cancellation.wave(self.rows)
            self._make()
        if replayed:
            evaluate.prepare()
            cancellation.look()
            graph, *_ = recorder(device).record(lambda check: evaluate(wave))
            self._make = graph.replay
            self._make()
        if device.type != "cuda":
            self.time()
            return
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.time()
        nbytes = torch.cuda.max_memory_allocated(device) - before
        self.nbytes = int(clock.agreed(nbytes, f"the memory of {counted(self.rows, 'row')}"))

    @property
    def seconds(self) -> float:
        return statistics.median(self._times)

    def time(self) -> None:
        cancellation.wave(self.rows)
        started = clock.now()
        self._make()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._times.append(clock.since(started, f"the seconds of {counted(self.rows, 'row')}"))


@torch.no_grad()
def between_calls(
    next_wave: Callable[[Tensor | None], Evaluate | None], dtype: torch.dtype, branches: int, timed: int, waves: int
) -> float:
    """Seconds that a run takes without its network: `next_wave`, its `Run.next`, is given zeros.

    dtype, branches: of the network's output. timed: of the waves of the program, how many are run; what comes before
    the first one, such as making the updates of all, counts once.
    """
    started = clock.now()
    excluded, done = 0.0, 0
    wave = next_wave(None)
    first = clock.now() - started
    while wave is not None:
        begun = clock.now()
        answer = wave.x.new_zeros(branches * len(wave.positions), *wave.x.shape[1:], dtype=dtype)
        excluded += clock.now() - begun
        done += 1
        wave = next_wave(answer)
        if done == timed:
            break
    if answer.is_cuda:
        torch.cuda.synchronize(answer.device)
    seconds = clock.now() - started - excluded
    of_all = seconds if timed == waves else first + (seconds - first) * waves / timed
    return clock.agreed(of_all, "the seconds between network calls")
