"""Requests in, images out: each waits in the queue until a device is free, and shares a call where that pays."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

from .admission import Queue
from .batching import Call, Policy, Waiting, Warmed
from .contract import ImageRequest, ImageResult, PartialImage, Refused
from .kinds import Kind
from .metrics import CLIENT_LEFT, Metrics
from .predictions import Predictions
from .settings import ServerSettings

logger = logging.getLogger("srds_fast")

# seconds after which a client that found no device is to try again
AGAIN = 5.0
Item = PartialImage | ImageResult


class Runner(Protocol):
    """Where calls run: a thread of this process, or replicas of Ray."""

    def slots(self) -> int:
        """How many calls may run at once now. 0: nothing is ready."""

    async def generate(self, requests: Sequence[ImageRequest], way: str) -> list[ImageResult]:
        """Images of requests of one kind, see `batching.WAYS`. Cancelling it ends the sampling at its next wave.

        Raises:
            Refused: the sampling failed.
        """

    def stream(self, request: ImageRequest) -> AsyncGenerator[Item, None]:
        """Previews of a request, then its result. Cancelling or closing it ends the sampling at its next wave.

        Raises:
            Refused: as `generate`.
        """


@dataclass(eq=False)
class _Job:
    """A request from its arrival to its answer.

    items: previews and the result, or why there is none. waiting: its place in the queue. call: the one that answers
    it, once that runs. left: nobody wants the answer any more.
    """

    request: ImageRequest
    arrived: float
    streamed: bool
    items: asyncio.Queue[Item | Exception] = field(default_factory=asyncio.Queue)
    waiting: Waiting | None = None
    call: _Running | None = None
    left: bool = False


@dataclass(eq=False)
class _Running:
    """A call that runs. ends: when it is predicted to end."""

    call: Call
    begun: float
    ends: float
    task: asyncio.Task[None] = field(init=False)

    @property
    def jobs(self) -> list[_Job]:
        return [cast(_Job, each.job) for each in self.call.members]


class Dispatcher:
    """Answers the requests of a server. All its methods are called in one event loop.

    Args:
        runner: where calls run.
        settings: of the server.
        metrics: told of what happens.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        runner: Runner,
        settings: ServerSettings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner, self._settings, self._metrics, self._clock = runner, settings, metrics, clock
        self._set_calls(Warmed())
        self._running: set[_Running] = set()
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    def prepare(self, warmed: Warmed) -> None:
        """Which calls may be made, and what they cost. Called before the first request is let in."""
        self._set_calls(warmed)
        self._metrics.warmed(*warmed.seconds)

    def _set_calls(self, warmed: Warmed) -> None:
        self._predictions = Predictions(warmed)
        policy = Policy.of(self._settings.batching, warmed.sizes)
        self._queue = Queue(policy, self._predictions.seconds, self._settings.max_queue)

    def wake(self) -> None:
        """There are more or fewer slots than before. If there is none, those who wait are refused, as who comes is."""
        if self._runner.slots() == 0:
            self._refuse_waiting(_not_ready())
        self._queue.replan(self._free())
        self._begin()

    async def generate(self, request: ImageRequest) -> ImageResult:
        """The images of a request. Cancelling it gives the request up.

        Raises:
            Refused: no room, no time, nothing is ready, or the sampling failed.
        """
        async with aclosing(self._answer(request, streamed=False)) as items:
            async for item in items:
                if isinstance(item, ImageResult):
                    return item
        raise AssertionError("an answer ends with its result")

    def stream(self, request: ImageRequest) -> AsyncGenerator[Item, None]:
        """Previews of a request, then its result. Closing it gives the request up. Raises Refused, as `generate`."""
        return self._answer(request, streamed=True)

    async def drain(self, seconds: float) -> None:
        """Let nobody in any more, and wait until all who are in are answered, so many seconds at most.

        Who is not answered by then is refused with status 503, and running calls end at their next wave.
        """
        self._closing = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            self._refuse_waiting(_shutting_down())
            for running in self._running:
                running.task.cancel()

    async def _answer(self, request: ImageRequest, *, streamed: bool) -> AsyncGenerator[Item, None]:
        arrived, status = self._clock(), CLIENT_LEFT
        job = None
        try:
            job = self._admitted(request, arrived, streamed)
            while status == CLIENT_LEFT:
                item = await job.items.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, ImageResult):
                    status = 200
                yield item
        except Refused as why:
            status = why.status
            raise
        finally:
            if job is not None and status != 200:
                self._leave(job)
            self._metrics.answered(status, self._clock() - arrived)

    def _admitted(self, request: ImageRequest, arrived: float, streamed: bool) -> _Job:
        if self._closing:
            raise _shutting_down()
        if self._runner.slots() == 0:
            raise _not_ready()
        job, shape = _Job(request, arrived, streamed), Kind.of(request)
        due = None if request.deadline is None else arrived + request.deadline
        kind = None if streamed else shape
        job.waiting = self._queue.admit(kind, shape, request.n, due, self._free(), arrived, job)
        self._begin()
        return job

    def _free(self) -> list[float]:
        """When each device is free."""
        now = self._clock()
        busy = [max(now, running.ends) for running in self._running]
        return [now] * (self._runner.slots() - len(busy)) + busy or [now]

    def _begin(self) -> None:
        """Begin calls while devices are free."""
        while len(self._running) < self._runner.slots() and (call := self._queue.next()) is not None:
            self._start(call)
        self._metrics.queue(len(self._queue), len(self._running), self._runner.slots())
        if self._running or len(self._queue):
            self._idle.clear()
        else:
            self._idle.set()

    def _start(self, call: Call) -> None:
        now = self._clock()
        running = _Running(call, now, now + call.seconds(self._predictions.seconds))
        for job in running.jobs:
            job.waiting, job.call = None, running
        self._running.add(running)
        # a context of its own: Ray cancels what was begun in the context of a request whose client has left
        context = contextvars.Context()
        running.task = asyncio.get_running_loop().create_task(self._run(running), context=context)
        running.task.add_done_callback(functools.partial(self._ended, running))

    async def _run(self, running: _Running) -> None:
        jobs, call = running.jobs, running.call
        try:
            if jobs[0].streamed:
                async with aclosing(self._runner.stream(jobs[0].request)) as items:
                    async for item in items:
                        self._deliver(running, jobs[0], item)
            else:
                results = await self._runner.generate([job.request for job in jobs], call.way)
                for job, result in zip(jobs, results, strict=True):
                    self._deliver(running, job, result)
                seconds = self._clock() - running.begun
                self._predictions.record(call.members[0].shape, call.way, call.images, seconds)
        except Refused as why:
            _fail(jobs, why)
        except Exception as why:
            logger.error("A call failed.", exc_info=why)
            _fail(jobs, Refused(500, "The call failed. The log of the server has the reason.", code="call_failed"))

    def _ended(self, running: _Running, task: asyncio.Task[None]) -> None:
        """Not in `_run`, of which nothing runs if it is cancelled at once."""
        if task.cancelled():
            _fail(running.jobs, _shutting_down())  # who has left does not read it
        self._running.discard(running)
        self._begin()

    def _deliver(self, running: _Running, job: _Job, item: Item) -> None:
        if isinstance(item, ImageResult):
            queued = running.begun - job.arrived
            usage = replace(item.usage, seconds=self._clock() - job.arrived, queued_seconds=queued)
            item = ImageResult(item.images, replace(usage, batch=len(running.jobs)))
            self._metrics.made(item.usage, running.call.way, first=job is running.jobs[0])
        job.items.put_nowait(item)

    def _refuse_waiting(self, why: Refused) -> None:
        for waiting in self._queue.waiting:
            job = cast(_Job, waiting.job)
            job.items.put_nowait(why)
            self._leave(job)

    def _leave(self, job: _Job) -> None:
        """Nobody wants the answer. A call ends when that is true of all its requests."""
        job.left = True
        if job.waiting is not None:
            waiting, job.waiting = job.waiting, None
            self._queue.leave(waiting, self._free())
            self._begin()
        elif job.call is not None and all(each.left for each in job.call.jobs):
            job.call.task.cancel()


def _fail(jobs: Sequence[_Job], why: Exception) -> None:
    for job in jobs:
        job.items.put_nowait(why)


def _not_ready() -> Refused:
    return Refused(
        503,
        "No replica is ready: each loads the model and warms up, at the start or after a failure. Try again in "
        f"{AGAIN:.0f} seconds; /readyz tells when one is ready.",
        code="not_ready",
        retry_after=AGAIN,
    )


def _shutting_down() -> Refused:
    return Refused(
        503, "The server is shutting down. Try again in a few seconds.", code="shutting_down", retry_after=AGAIN
    )
