"""Latency of a server against its load, by what happens to requests that wait: the crossover as a curve.

    python -m bench.speed.serving_load --json load.json --picture load.png
    python -m bench.speed.serving_load --predicted --picture load.png

Requests for one image each come at random times (a Poisson process), the same for every policy: `parallel only`, each
has a call by the plan of one image; `batched sequential`, those that wait share calls that take one step after another;
`adaptive`, what the server does by default. Load 1 is as many requests as a device makes one after another, without
batches, by the sequential sampler; latencies are in times of such a call.

Measured: the digits pipeline at 50 steps on this machine, by the server's own queue and worker, without HTTP. A request
that is not answered when the time of a load is over counts as answered then. Of those that find a full queue there is
no latency; their number is `refused`. Predicted: the same queue on a clock that
is not real, where calls take what follows from c(rows): of this machine, and of two devices that do not exist.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import quantiles
from typing import Any

from bench.command import parser, writable, write
from bench.pictures import load_picture
from srds_fast.cli.output import show_table
from srds_fast.planner.context import Context
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.planner.search import Known, Pricing, compare
from srds_fast.planner.settings import Settings
from srds_fast.serving.admission import Queue
from srds_fast.serving.batching import SEQUENTIAL, CallCosts, Policy, Warmed, costs_of
from srds_fast.serving.contract import ImageRequest, Refused
from srds_fast.serving.kinds import kinds_of
from srds_fast.serving.settings import ServerSettings

# by what the settings of a server call it
POLICIES = {"parallel only": "never", "batched sequential": "sequential", "adaptive": "adaptive"}
STEPS, SIZES = 50, (1, 2, 4, 8)
# loads, of the largest that calls of these sizes can bear
SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)
MEASURED_SHARES = (0.15, 0.4, 0.65, 0.9)
# requests of a prediction, and how often it is repeated with other times
REQUESTS, REPEATS = 200, 3
# of a measured load
FEWEST = 5
HERE = "measured on this machine"
Row = dict[str, Any]


def nearly_free(knee: int) -> CostCurve:
    """A device on which rows cost next to nothing up to a knee, and in full beyond it. One row takes 10 ms."""
    return CostCurve((1, knee, 8 * knee), (0.01, 0.012, 8 * 0.012))


def planned(curve: CostCurve) -> CallCosts:
    """What calls cost on a device, by the plan that `"auto"` chooses there for one image."""
    pricing = Pricing(Known(curve), lambda plan: 0.0, Context("none", "none", "none", None, "none"))
    plan, _ = compare(STEPS, Settings(), False, pricing)
    assert plan.prediction is not None
    return costs_of(plan, STEPS, plan.prediction.chosen.seconds)


def capacity(costs: CallCosts, sizes: Sequence[int]) -> float:
    """The largest load that calls of these sizes can bear."""
    ways = Policy(sizes=tuple(sizes)).ways
    return max(costs.seconds(SEQUENTIAL, 1) * size / costs.seconds(way, size) for way in ways for size in sizes)


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Times of requests, so many a second on average."""
    source, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += source.expovariate(rate)
        found.append(now)
    return found


def simulated(costs: CallCosts, policy: Policy, times: Sequence[float]) -> tuple[list[float], list[int], int]:
    """What requests that come at these times to one device get.

    Returns:
        latencies of those that are answered, images of the calls that were made, and how many were refused.
    """

    def seconds(_: object, way: str, images: int) -> float:
        return costs.seconds(way, images)

    queue, refused = Queue(policy, seconds, ServerSettings().max_queue), 0
    came: dict[int, float] = {}
    ended: list[float] = []
    calls: list[int] = []
    free, coming = 0.0, list(reversed(times))
    while coming or len(queue):
        now = coming[-1] if coming and (not len(queue) or coming[-1] <= free) else free
        if coming and coming[-1] <= now:
            came_at = coming.pop()
            try:
                came[queue.admit("one", "one", 1, None, [max(free, now)], now).number] = came_at
            except Refused:
                refused += 1
        if free <= now and (call := queue.next()) is not None:
            free = now + call.seconds(seconds)
            calls.append(call.images)
            ended += [free - came[each.number] for each in call.members]
    return ended, calls, refused


def predicted(where: str, costs: CallCosts) -> Iterator[Row]:
    """Rows of all policies and loads."""
    alone = costs.seconds(SEQUENTIAL, 1)
    for share in SHARES:
        load = share * capacity(costs, SIZES)
        for name, batching in POLICIES.items():
            latencies, calls, refused = [], [], 0
            for seed in range(REPEATS):
                found = simulated(costs, Policy.of(batching, SIZES), arrivals(load / alone, REQUESTS, seed))
                latencies += [each / alone for each in found[0]]
                calls += found[1]
                refused += found[2]
            yield row(where, name, load, latencies, sum(calls) / len(calls), refused)


def row(where: str, policy: str, load: float, latencies: Sequence[float], images: float, refused: int) -> Row:
    """latencies: in times of a sequential call for one image. images: of a call, the mean."""
    cuts = quantiles(latencies, n=20, method="inclusive")
    return {
        "where": where,
        "policy": policy,
        "load": load,
        "p50": cuts[9],
        "p95": cuts[18],
        "requests": len(latencies),
        "refused": refused,
        "images_a_call": images,
    }


async def measured(seconds: float) -> tuple[CallCosts, list[Row]]:
    """Rows of all policies and some loads on this machine. seconds: of each, and longer where few requests come."""
    from srds_fast.serving.worker import Worker
    from srds_fast.serving.worker_thread import WorkerThread

    settings = ServerSettings(steps=(STEPS,), batch_sizes=SIZES, replicas=0)
    thread = WorkerThread()
    worker = await thread.run(Worker.load, settings)
    warmed: Warmed = await thread.run(worker.warm)
    thread.worker, ((_, costs),) = worker, warmed.costs
    alone, found = costs.seconds(SEQUENTIAL, 1), []
    for share in MEASURED_SHARES:
        load = share * capacity(costs, SIZES)
        all_times = arrivals(load / alone, 10_000, seed=1)
        times = [time for time in all_times if time < max(seconds, all_times[FEWEST])]
        for name, batching in POLICIES.items():
            latencies, images, refused = await served(thread, warmed, batching, times, max(seconds, 2 * times[-1]))
            found.append(row(HERE, name, load, [each / alone for each in latencies], images, refused))
            print(found[-1], flush=True)
    await thread.end()
    return costs, found


async def served(
    thread: Any, warmed: Warmed, batching: str, times: Sequence[float], seconds: float
) -> tuple[list[float], float, int]:
    """Latencies of requests that come at these times, images of a call, and how many were refused."""
    from srds_fast.serving.dispatcher import Dispatcher
    from srds_fast.serving.metrics import Metrics

    settings = ServerSettings(steps=(STEPS,), batch_sizes=SIZES, batching=batching, replicas=0)
    dispatcher = Dispatcher(thread, settings, Metrics())
    dispatcher.prepare(warmed)
    (kind,) = kinds_of(settings)
    begun = time.perf_counter()
    latencies, shares, refused = [], [], 0

    async def ask(number: int, at: float) -> None:
        nonlocal refused
        await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
        try:
            asked = ImageRequest("the digit seven", STEPS, seed=number, guidance_scale=kind.guidance_scale)
            result = await dispatcher.generate(asked)
        except Refused:
            refused += 1
        except asyncio.CancelledError:
            latencies.append(seconds - at)
            raise
        else:
            latencies.append(result.usage.seconds)
            shares.append(1 / result.usage.batch)

    tasks = [asyncio.create_task(ask(number, at)) for number, at in enumerate(times)]
    _, waiting = await asyncio.wait(tasks, timeout=seconds)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await dispatcher.drain(seconds)
    return latencies, len(shares) / sum(shares) if shares else 0.0, refused


def main(arguments: Sequence[str] | None = None) -> None:
    found = parser("bench.speed.serving_load", __doc__)
    found.add_argument("--picture", type=writable, metavar="FILE.png")
    found.add_argument("--predicted", action="store_true", help="measure nothing")
    found.add_argument("--seconds", type=float, default=20.0, help="of each measured load and policy")
    options = found.parse_args(arguments)
    rows: list[Row] = []
    devices: dict[str, Callable[[], CallCosts]] = {
        "predicted: rows nearly free up to 8": partial(planned, nearly_free(8)),
        "predicted: rows nearly free up to 64": partial(planned, nearly_free(64)),
    }
    if not options.predicted:
        costs, rows = asyncio.run(measured(options.seconds))
        devices = {"predicted, by the c(rows) of this machine": lambda: costs, **devices}
    for where, made in devices.items():
        rows += predicted(where, made())
        write(options.json, steps=STEPS, sizes=SIZES, results=rows)
    show_table(rows, {"where", "policy"})
    if options.picture is not None:
        load_picture(f"The digits pipeline, {STEPS} steps, one device", rows, options.picture)


if __name__ == "__main__":
    main()
